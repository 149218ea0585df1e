//! The block device: what it says of itself, data in every mode of the queue, refusals.
//!
//! Words: `blk_index=N` which block device (0), `blk_first=SECTOR` and `blk_count=SECTORS` the part of the disk that may be
//! written (all of it), `blk_seed=N` for `virtio_blk_fill` and `virtio_blk_verify` (1); and what there is to be:
//! `blk_sectors=N`, `blk_queues=N`, `blk_serial=TEXT`, `blk_ro=0|1`. With `lenient=1` a read-only disk may say that it discarded.

use super::{at_cpl3, ensure, pattern, same, virtio_data};
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason};
use crate::virtio::blk::{
    Blk, DISCARD, F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_SEG_MAX, F_TOPOLOGY,
    F_WRITE_ZEROES, FLUSH, GET_ID, IN, IOERR, OK, OUT, Setup, UNSUPP, WRITE_ZEROES,
};
use crate::virtio::common;
use crate::virtio::queue::Segment;
use crate::{dma, line, number, option};

/// First sector and number of sectors that may be written.
pub fn area(blk: &Blk) -> Outcome<(u64, u64)> {
    let first = number("blk_first").unwrap_or(0);
    let rest = blk.capacity().saturating_sub(first);
    let count = number("blk_count").unwrap_or(rest).min(rest);
    ensure("the disk has 64 sectors to write", count >= 64)?;
    Ok((first, count))
}

/// Everything but resets and hostile rings.
pub fn blk() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let mut blk = Blk::open(Setup::FULL)?;
        told(&blk)?;
        identity(&mut blk)?;
        let (first, count) = area(&blk)?;
        refusals(&mut blk, first)?;
        if blk.features & F_RO != 0 {
            return read_only(&mut blk, first);
        }
        flush(&mut blk)?;
        write_cache(&mut blk)?;
        unaligned_memory(&mut blk, first)?;
        discard(&mut blk, first)?;
        write_zeroes(&mut blk, first)?;
        let offered = blk.features;
        drop(blk);
        virtio_data::modes(offered, first, count)?;
        virtio_data::queues(offered, first, count)
    })
}

/// The configuration, held against the command line.
fn told(blk: &Blk) -> Outcome {
    let config = blk.transport.config;
    let at = config.at;
    line!("VALUE blk_features {:#x}", blk.features);
    line!("VALUE blk_sectors {}", blk.capacity());
    line!("VALUE blk_queue_count {}", blk.transport.queue_count());
    line!("VALUE blk_queue_size {}", blk.transport.select(0));
    line!("VALUE blk_config_length {}", config.length);
    if blk.features & F_SEG_MAX != 0 {
        let most: u32 = read(at + 12);
        line!("VALUE blk_seg_max {most}");
        ensure(
            "seg_max leaves room for header and status",
            most > 0 && most <= 1 << 15,
        )?;
    }
    if blk.features & F_BLK_SIZE != 0 {
        let size: u32 = read(at + 20);
        line!("VALUE blk_block_size {size}");
        ensure(
            "a block size of 512 or more",
            size >= 512 && size.is_power_of_two(),
        )?;
    }
    if blk.features & F_TOPOLOGY != 0 {
        let least: u16 = read(at + 26);
        line!(
            "VALUE blk_topology exponent={} offset={} min={least} opt={}",
            read::<u8>(at + 24),
            read::<u8>(at + 25),
            read::<u32>(at + 28)
        );
    }
    if blk.features & F_DISCARD != 0 {
        let [sectors, segments, align]: [u32; 3] = [read(at + 36), read(at + 40), read(at + 44)];
        line!("VALUE blk_discard sectors={sectors} segments={segments} align={align}");
        ensure("discard has limits", sectors > 0 && segments > 0)?;
    }
    if blk.features & F_WRITE_ZEROES != 0 {
        let [sectors, segments]: [u32; 2] = [read(at + 48), read(at + 52)];
        line!(
            "VALUE blk_write_zeroes sectors={sectors} segments={segments} unmap={}",
            read::<u8>(at + 56)
        );
        ensure("write zeroes has limits", sectors > 0 && segments > 0)?;
    }
    // Any width shows the same bytes, and nothing changes meanwhile.
    let generation: u8 = blk.transport.get(common::GENERATION);
    let bytes = (0..8).fold(0, |all, i| all | u64::from(read::<u8>(at + i)) << (8 * i));
    let halves = (0..4).fold(0, |all, i| {
        all | u64::from(read::<u16>(at + 2 * i)) << (16 * i)
    });
    same("capacity by bytes", bytes, blk.capacity())?;
    same("capacity by halves", halves, blk.capacity())?;
    same(
        "the generation",
        u64::from(blk.transport.get::<u8>(common::GENERATION)),
        u64::from(generation),
    )?;
    let queues: u16 = if blk.features & F_MQ != 0 {
        read(at + 34)
    } else {
        1
    };
    line!("VALUE blk_queues {queues}");
    number("blk_sectors").map_or(Ok(()), |n| same("sectors", blk.capacity(), n))?;
    number("blk_queues").map_or(Ok(()), |n| same("queues", u64::from(queues), n))?;
    let ro = u64::from(blk.features & F_RO != 0);
    number("blk_ro").map_or(Ok(()), |n| same("read-only", ro, n))
}

/// GET_ID: 20 bytes at most, ended by NUL when shorter.
fn identity(blk: &mut Blk) -> Outcome {
    let at = dma::take(64, 1)?;
    dma::fill(at, 64, 0xa5);
    let done = blk.run(0, GET_ID, 0, &[Segment::writable(at, 20)])?;
    same("status of GET_ID", u64::from(done.status), u64::from(OK))?;
    ensure("nothing past the 20 bytes", dma::all(at + 20, 44, 0xa5))?;
    let bytes: [u8; 20] = read(at);
    let length = bytes.iter().position(|&b| b == 0).unwrap_or(20);
    let text = core::str::from_utf8(&bytes[..length]).unwrap_or("?");
    line!("VALUE blk_id {text}");
    match option("blk_serial") {
        Some(wanted) => ensure("the serial number", text == wanted),
        None => Ok(()),
    }
}

fn status(blk: &mut Blk, kind: u32, sector: u64, data: &[Segment]) -> Outcome<u8> {
    Ok(blk.run(0, kind, sector, data)?.status)
}

/// Fails unless the request comes back with one of two statuses.
fn refused(what: &'static str, got: u8, wanted: [u8; 2]) -> Outcome {
    if wanted.contains(&got) {
        return Ok(());
    }
    Err(Reason(what, u64::from(got), u64::from(wanted[0])))
}

/// Past the end, lengths that are no sectors, kinds that nobody knows; and the disk still answers.
fn refusals(blk: &mut Blk, first: u64) -> Outcome {
    let buffer = dma::take(8192, 512)?;
    let end = blk.capacity();
    let bad = [IOERR, IOERR];
    let places = [
        (end, 512),
        (end - 1, 1024),
        (end, 4096),
        (end + 1, 512),
        (u64::MAX, 512),
    ];
    let far = [
        (u64::MAX - 1, 1024),
        (1 << 55, 512),
        (1 << 63, 512),
        (u64::MAX >> 9, 512),
    ];
    for (sector, length) in places.into_iter().chain(far) {
        dma::fill(buffer, 8192, 0x5a);
        let got = status(blk, IN, sector, &[Segment::writable(buffer, length)])?;
        refused("a read past the end", got, bad)?;
        ensure(
            "no bytes of it",
            dma::all(buffer + u64::from(length), 512, 0x5a),
        )?;
        let got = status(blk, OUT, sector, &[Segment::readable(buffer, length)])?;
        refused("a write past the end", got, bad)?;
    }
    for length in [1, 511, 513, 1000, 4095] {
        let got = status(blk, IN, first, &[Segment::writable(buffer, length)])?;
        refused("a read that is no sectors", got, [IOERR, UNSUPP])?;
        let got = status(blk, OUT, first, &[Segment::readable(buffer, length)])?;
        refused("a write that is no sectors", got, [IOERR, UNSUPP])?;
    }
    // Odd kinds and those with the highest bit had a meaning once, and some devices still see it.
    for kind in [6, 10, 98, 0x1000, 0x7fff_fff0] {
        let got = status(blk, kind, 0, &[Segment::writable(buffer, 512)])?;
        refused("a request of no known kind", got, [UNSUPP, UNSUPP])?;
    }
    let got = status(blk, IN, end - 1, &[Segment::writable(buffer, 512)])?;
    same("a read of the last sector", u64::from(got), u64::from(OK))
}

/// Writes are refused and change nothing; reads go on.
fn read_only(blk: &mut Blk, first: u64) -> Outcome {
    let (before, after) = (dma::take(512, 512)?, dma::take(512, 512)?);
    let good = |got| same("a read of a read-only disk", u64::from(got), u64::from(OK));
    good(status(blk, IN, first, &[Segment::writable(before, 512)])?)?;
    let new = dma::take(512, 512)?;
    pattern::fill(new, 9, first, 1);
    let got = status(blk, OUT, first, &[Segment::readable(new, 512)])?;
    refused("a write to a read-only disk", got, [IOERR, UNSUPP])?;
    let range = segment_list(&[(first, 1, 0)])?;
    for kind in [DISCARD, WRITE_ZEROES] {
        let got = status(blk, kind, 0, &[range])?;
        if number("lenient") != Some(1) {
            refused("discard on a read-only disk", got, [IOERR, UNSUPP])?;
        }
    }
    good(status(blk, IN, first, &[Segment::writable(after, 512)])?)?;
    let equal = (0..64).all(|i| read::<u64>(before + i * 8) == read::<u64>(after + i * 8));
    ensure("a read-only disk stays as it is", equal)
}

/// A flush is done, where it is offered.
pub fn flush(blk: &mut Blk) -> Outcome {
    let got = status(blk, FLUSH, 0, &[])?;
    if blk.features & F_FLUSH != 0 {
        same("status of a flush", u64::from(got), u64::from(OK))
    } else {
        refused("a flush that isn't offered", got, [UNSUPP, OK])
    }
}

/// CONFIG_WCE: the byte keeps what is written, 0 or 1, and flush works either way.
fn write_cache(blk: &mut Blk) -> Outcome {
    if blk.features & F_CONFIG_WCE == 0 {
        return Ok(());
    }
    let at = blk.transport.config.at + 32;
    let old: u8 = read(at);
    line!("VALUE blk_writeback {old}");
    for mode in [0u8, 1, old] {
        write(at, mode);
        same(
            "write cache mode",
            u64::from(read::<u8>(at)),
            u64::from(mode),
        )?;
        flush(blk)?;
    }
    Ok(())
}

/// Writes sectors of a pattern, in one request; reads them back.
fn store(blk: &mut Blk, seed: u64, sector: u64, count: u64, buffer: u64) -> Outcome {
    pattern::fill(buffer, seed, sector, count);
    let got = status(
        blk,
        OUT,
        sector,
        &[Segment::readable(buffer, (count * 512) as u32)],
    )?;
    same("status of a write", u64::from(got), u64::from(OK))?;
    load(blk, sector, count, buffer)?;
    pattern::check(buffer, seed, sector, count)
}

fn load(blk: &mut Blk, sector: u64, count: u64, buffer: u64) -> Outcome {
    dma::fill(buffer, count * 512, 0xee);
    let done = blk.run(
        0,
        IN,
        sector,
        &[Segment::writable(buffer, (count * 512) as u32)],
    )?;
    same("status of a read", u64::from(done.status), u64::from(OK))?;
    same(
        "bytes that a read wrote",
        u64::from(done.length),
        count * 512 + 1,
    )
}

/// Buffers at odd addresses, cut at odd places, where the queue lets a request have them.
fn unaligned_memory(blk: &mut Blk, first: u64) -> Outcome {
    let base = dma::take(16384, 4096)?;
    for shift in [1, 2, 3, 511, 4093] {
        store(blk, 20 + shift, first, 4, base + shift)?;
    }
    if blk.segments() < 4 {
        return Ok(());
    }
    let cuts = [(0, 7), (7, 993), (1000, 1), (1001, 1047)];
    let pieces = |make: fn(u64, u32) -> Segment| cuts.map(|(from, n)| make(base + 5 + from, n));
    pattern::fill(base + 5, 30, first, 4);
    let got = status(blk, OUT, first, &pieces(Segment::readable))?;
    same(
        "status of a write in odd pieces",
        u64::from(got),
        u64::from(OK),
    )?;
    dma::fill(base, 16384, 0xee);
    let got = status(blk, IN, first, &pieces(Segment::writable))?;
    same(
        "status of a read in odd pieces",
        u64::from(got),
        u64::from(OK),
    )?;
    pattern::check(base + 5, 30, first, 4)?;
    ensure("nothing before the pieces", dma::all(base, 5, 0xee))?;
    ensure(
        "nothing past the pieces",
        dma::all(base + 5 + 2048, 64, 0xee),
    )
}

/// The data of discard and write zeroes: sector, count and flags of each range.
fn segment_list(ranges: &[(u64, u32, u32)]) -> Outcome<Segment> {
    let at = dma::take(16 * ranges.len() as u64, 8)?;
    for (i, &(sector, count, flags)) in ranges.iter().enumerate() {
        let entry = at + 16 * i as u64;
        write(entry, sector);
        write(entry + 8, count);
        write(entry + 12, flags);
    }
    Ok(Segment::readable(at, 16 * ranges.len() as u32))
}

/// What holds of both: neighbours keep their data, bad ranges are refused.
fn ranges(blk: &mut Blk, kind: u32, first: u64, buffer: u64, most: u32) -> Outcome {
    let end = blk.capacity();
    let bad: [(u64, u32, u32); 5] = [
        (end, 1, 0),
        (end - 1, 2, 0),
        (u64::MAX, 1, 0),
        (u64::MAX, u32::MAX, 0),
        (first, 1, 0x8000_0000),
    ];
    for range in bad {
        let list = segment_list(&[range])?;
        refused(
            "a range that can't be",
            status(blk, kind, 0, &[list])?,
            [IOERR, UNSUPP],
        )?;
    }
    if most < u32::MAX {
        let list = segment_list(&[(first, most + 1, 0)])?;
        refused(
            "a range past the limit",
            status(blk, kind, 0, &[list])?,
            [IOERR, UNSUPP],
        )?;
    }
    load(blk, first, 48, buffer)?;
    pattern::check(buffer, 40, first, 48)
}

fn discard(blk: &mut Blk, first: u64) -> Outcome {
    let buffer = dma::take(64 * 512, 4096)?;
    store(blk, 40, first, 48, buffer)?;
    let list = segment_list(&[(first + 16, 16, 0)])?;
    let got = status(blk, DISCARD, 0, &[list])?;
    if blk.features & F_DISCARD == 0 {
        refused("discard that isn't offered", got, [UNSUPP, UNSUPP])?;
        load(blk, first, 48, buffer)?;
        return pattern::check(buffer, 40, first, 48);
    }
    same("status of a discard", u64::from(got), u64::from(OK))?;
    load(blk, first, 48, buffer)?;
    pattern::check(buffer, 40, first, 16)?;
    pattern::check(buffer + 32 * 512, 40, first + 32, 16)?;
    store(blk, 40, first, 48, buffer)?;
    let most: u32 = read(blk.transport.config.at + 36);
    let unmap = segment_list(&[(first, 1, 1)])?;
    refused(
        "discard with a flag",
        status(blk, DISCARD, 0, &[unmap])?,
        [UNSUPP, UNSUPP],
    )?;
    ranges(blk, DISCARD, first, buffer, most)
}

fn write_zeroes(blk: &mut Blk, first: u64) -> Outcome {
    let buffer = dma::take(64 * 512, 4096)?;
    store(blk, 40, first, 48, buffer)?;
    if blk.features & F_WRITE_ZEROES == 0 {
        let list = segment_list(&[(first + 16, 16, 0)])?;
        let got = status(blk, WRITE_ZEROES, 0, &[list])?;
        refused("write zeroes that isn't offered", got, [UNSUPP, UNSUPP])?;
        load(blk, first, 48, buffer)?;
        return pattern::check(buffer, 40, first, 48);
    }
    let config = blk.transport.config.at;
    let (most, segments): (u32, u32) = (read(config + 48), read(config + 52));
    for unmap in [0, 1] {
        store(blk, 40, first, 48, buffer)?;
        let list = segment_list(&[(first + 15, 17, unmap)])?;
        let got = status(blk, WRITE_ZEROES, 0, &[list])?;
        same("status of write zeroes", u64::from(got), u64::from(OK))?;
        load(blk, first, 48, buffer)?;
        pattern::check(buffer, 40, first, 15)?;
        ensure(
            "zeroes are written",
            dma::all(buffer + 15 * 512, 17 * 512, 0),
        )?;
        pattern::check(buffer + 32 * 512, 40, first + 32, 16)?;
    }
    store(blk, 40, first, 48, buffer)?;
    if segments > 1 {
        let list = segment_list(&[(first, 1, 0), (first + 2, 3, 0)])?;
        let got = status(blk, WRITE_ZEROES, 0, &[list])?;
        same("status of two ranges", u64::from(got), u64::from(OK))?;
        load(blk, first, 8, buffer)?;
        ensure("the first range", dma::all(buffer, 512, 0))?;
        pattern::check(buffer + 512, 40, first + 1, 1)?;
        ensure("the second range", dma::all(buffer + 1024, 1536, 0))?;
        pattern::check(buffer + 5 * 512, 40, first + 5, 3)?;
        store(blk, 40, first, 48, buffer)?;
    }
    ranges(blk, WRITE_ZEROES, first, buffer, most)
}
