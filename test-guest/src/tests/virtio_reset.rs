//! The block device reset in mid-flight: afterwards it touches nothing, and works again.
//!
//! `resets=N` is how often (default 8).

use super::virtio_blk::area;
use super::{at_cpl3, ensure, pattern, same};
use crate::clock::within;
use crate::cpu::idt;
use crate::map::read;
use crate::outcome::{Outcome, Reason};
use crate::virtio::blk::{Blk, F_RO, IN, OK, OUT, Setup};
use crate::virtio::queue::Segment;
use crate::virtio::{Transport, common};
use crate::{dma, line, number};

/// Sectors a request, at most.
const CHUNK: u64 = 128;
/// Requests in flight, at most.
const DEPTH: u64 = 48;

/// Fills the queues, resets at once, watches the memory, sets up again and reads what the disk holds now.
pub fn reset() -> Outcome {
    at_cpl3(|| {
        states()?;
        let times = number("resets").unwrap_or(8);
        let (mut in_flight, mut lost) = (0, 0);
        for i in 0..times {
            let counts = one(i)?;
            in_flight += counts.0;
            lost += counts.1;
        }
        line!("VALUE blk_resets {times} in_flight={in_flight} lost={lost}");
        Ok(())
    })
}

/// What a reset leaves: status 0, no queue enabled, no vectors; at any point of the set-up, and twice over.
fn states() -> Outcome {
    dma::reset();
    let blk = Blk::open(Setup::FULL)?;
    let transport = &blk.transport;
    for stage in 0..4 {
        if stage > 0 {
            let features = transport.negotiate(u64::MAX >> 34)?;
            if stage > 1 {
                transport.interrupts()?;
                transport.queue(0, 32, features)?;
            }
            if stage > 2 {
                transport.go()?;
            }
        }
        transport.reset()?;
        transport.reset()?;
        ensure("a queue has its size again", transport.select(0) >= 2)?;
        same(
            "a queue is off",
            u64::from(transport.get::<u16>(common::QUEUE_ENABLE)),
            0,
        )?;
        same(
            "a queue's vector",
            u64::from(transport.get::<u16>(common::QUEUE_VECTOR)),
            0xffff,
        )?;
        same(
            "the configuration's vector",
            u64::from(transport.get::<u16>(common::CONFIG_VECTOR)),
            0xffff,
        )?;
    }
    Ok(())
}

/// One reset; how many requests were in flight then, and how many of them never came back.
fn one(turn: u64) -> Outcome<(u64, u64)> {
    dma::reset();
    let setup = Setup {
        queues: 8,
        size: 64,
        interrupts: turn.is_multiple_of(2),
        ..Setup::FULL
    };
    let mut blk = Blk::open(setup)?;
    let (first, count) = area(&blk)?;
    let chunk = (count / DEPTH).clamp(1, CHUNK);
    let requests = DEPTH.min(count / chunk);
    let bytes = chunk * 512;
    let buffer = dma::take(requests * bytes, 4096)?;
    let (old, new) = (60 + turn, 61 + turn);
    let writes = blk.features & F_RO == 0;
    if writes {
        for i in 0..requests {
            let sector = first + i * chunk;
            pattern::fill(buffer, old, sector, chunk);
            let done = blk.run(0, OUT, sector, &[Segment::readable(buffer, bytes as u32)])?;
            same("status of a write", u64::from(done.status), u64::from(OK))?;
        }
    }

    // Every other request reads, where the disk can be written.
    let kind = |i: u64| {
        if writes && i.is_multiple_of(2) {
            OUT
        } else {
            IN
        }
    };
    let mut sent = 0;
    for i in 0..requests {
        let (sector, at) = (first + i * chunk, buffer + i * bytes);
        let segment = if kind(i) == OUT {
            pattern::fill(at, new, sector, chunk);
            Segment::readable(at, bytes as u32)
        } else {
            dma::fill(at, bytes, 0);
            Segment::writable(at, bytes as u32)
        };
        let queue = i as usize % blk.count;
        sent += u64::from(blk.start(queue, kind(i), sector, &[segment])?.is_some());
    }
    for queue in 0..blk.count {
        blk.kick(queue)?;
    }
    // Later and later: a turn waits until so many have come back.
    let mut answered = 0;
    for _ in 0..(turn.min(4) * 3).min(sent) {
        let done = blk.finish(answered as usize % blk.count)?;
        same("status of a request", u64::from(done.status), u64::from(OK))?;
        answered += 1;
    }
    let mut in_flight = sent - answered;
    for queue in 0..blk.count {
        in_flight -= u64::from(blk.queue(queue)?.used_count());
    }
    blk.transport.reset()?;
    let mut lost = sent - answered;
    for queue in 0..blk.count {
        lost -= u64::from(blk.queue(queue)?.used_count());
    }

    // From here on memory is ours alone.
    for i in 0..requests {
        dma::fill(buffer + i * bytes, bytes, 0xc3);
    }
    let changed = within(20, || {
        (0..requests).any(|i| read::<u8>(buffer + (i + 1) * bytes - 1) != 0xc3)
    });
    let still = dma::all(buffer, requests * bytes, 0xc3);
    ensure("no memory changes after a reset", !changed && still)?;
    // What was on its way has arrived by now.
    let interrupts = || {
        (0..8)
            .map(|i| idt::count(Transport::queue_vector(i)))
            .sum::<u32>()
    };
    let seen = interrupts();
    ensure(
        "no interrupts after a reset",
        !within(5, || interrupts() != seen),
    )?;
    drop(blk);

    let mut blk = Blk::open(setup)?;
    for i in 0..requests {
        let sector = first + i * chunk;
        let done = blk.run(0, IN, sector, &[Segment::writable(buffer, bytes as u32)])?;
        same(
            "status of a read after a reset",
            u64::from(done.status),
            u64::from(OK),
        )?;
        for s in 0..if writes { chunk } else { 0 } {
            let at = buffer + s * 512;
            let good = pattern::is(at, old, sector + s)
                || (kind(i) == OUT && pattern::is(at, new, sector + s));
            if !good {
                return Err(Reason(
                    "a sector holds neither old nor new data",
                    sector + s,
                    turn,
                ));
            }
        }
    }
    Ok((in_flight, lost))
}
