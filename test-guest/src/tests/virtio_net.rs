//! The network device (virtio 1.2 §5.1) against a peer that sends every frame back, sender and receiver exchanged.
//!
//! A frame: 6 + 6 bytes of addresses, ethertype 0x88b5, its number (4 bytes, big-endian), bytes that follow from the number, and at
//! the end 8 bytes of FNV-1a over all between the addresses and it (little-endian). The peer checks that sum too.
//!
//! Words: `net_pairs=N` pairs of queues that must come into use (1), `net_mtu=N` the MTU that must be told, or none.
//! `READY virtio_net` says that the peer is to type a byte when it listens.

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::map::{read, write};
use crate::outcome::Outcome;
use crate::virtio::net::{
    BUFFER, F_MAC, F_MRG_RXBUF, F_MTU, F_STATUS, HEADER, MAX_PAIRS, Net, Setup,
};
use crate::virtio::{F_EVENT_IDX, F_INDIRECT, F_VERSION_1, PATIENCE, wait_for};
use crate::{dma, line, number, serial};

const ETHERTYPE: u16 = 0x88b5u16.to_be();
/// Frames sent before the first is waited for.
const BURST: u32 = 48;
/// Room for the longest frame.
const ROOM: u64 = 16384;

/// Frames of all lengths on all pairs, alone and in bursts, with and without merged buffers.
pub fn net() -> Outcome {
    at_cpl3(|| {
        line!("READY virtio_net");
        let typed = within(PATIENCE, || serial::poll().is_some());
        ensure("the peer listens", typed)?;
        let wanted = number("net_pairs").unwrap_or(1) as usize;
        let ring = [F_EVENT_IDX | F_INDIRECT, 0];
        let merge = [F_MRG_RXBUF, 0];
        for (ring, merge) in ring.into_iter().zip(merge) {
            dma::reset();
            let mut net = Net::open(Setup {
                features: u64::MAX >> 34 & !(F_EVENT_IDX | F_INDIRECT | F_MRG_RXBUF | OFFLOADS)
                    | ring
                    | merge,
                pairs: wanted.min(MAX_PAIRS),
                size: 64,
            })?;
            same("pairs in use", net.pairs as u64, wanted as u64)?;
            told(&net)?;
            for pair in 0..net.pairs {
                net.refill(pair)?;
            }
            lengths(&mut net)?;
            burst(&mut net)?;
        }
        Ok(())
    })
}

/// Checksums and segments: packets would come that nobody has completed.
const OFFLOADS: u64 = 0x7f83 | 1 << 21;

/// The configuration is what the command line of the VMM says.
fn told(net: &Net) -> Outcome {
    ensure("the standard", net.features & F_VERSION_1 != 0)?;
    ensure("an address is told", net.features & F_MAC != 0)?;
    let [a, b, c, d, e, f] = net.mac();
    line!("VALUE net_mac {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    ensure("the address is a station's", a & 1 == 0)?;
    if net.features & F_STATUS != 0 {
        let status: u16 = read(net.transport.config.at + 6);
        same("the link is up", u64::from(status & 1), 1)?;
    }
    match number("net_mtu") {
        Some(mtu) => same("the MTU", u64::from(net.mtu()), mtu),
        None => ensure("no MTU is told", net.features & F_MTU == 0),
    }
}

/// One frame at a time: the shortest, odd ones, and the longest that the MTU allows.
fn lengths(net: &mut Net) -> Outcome {
    let (at, room) = (dma::take(ROOM, 64)?, dma::take(ROOM, 64)?);
    let longest = u64::from(net.mtu()) + 14;
    let merged = net.features & F_MRG_RXBUF != 0;
    let all = [60, 61, 63, 64, 65, 127, 128, 1000, 1513, 1514, longest];
    let mut most = 0;
    let mut n = 0;
    for pair in 0..net.pairs {
        for length in all {
            if !merged && length + HEADER > BUFFER {
                continue;
            }
            n += 1;
            compose(net, at, n, length);
            ensure("room to send", net.send(pair, at, HEADER + length)?)?;
            net.transmitter(pair)?.kick();
            let (number, got, buffers) = await_frame(net, room)?;
            same("the frame's number", u64::from(number), u64::from(n))?;
            same("the frame's length", got, length)?;
            most = most.max(buffers);
            wait_for(net.transmitter(pair)?, false)?;
        }
    }
    line!("VALUE net_buffers {most}");
    let needed = if merged {
        (longest + HEADER).div_ceil(BUFFER)
    } else {
        1
    };
    same("buffers of the longest frame", u64::from(most), needed)
}

/// Many frames at once, over all pairs; each comes back once.
fn burst(net: &mut Net) -> Outcome {
    let slots = dma::take(2048 * u64::from(BURST), 64)?;
    let room = dma::take(ROOM, 64)?;
    for n in 0..BURST {
        let pair = n as usize % net.pairs;
        let at = slots + 2048 * u64::from(n);
        let length = 60 + u64::from(n) * 29 % 1455;
        compose(net, at, 1000 + n, length);
        ensure("room to send", net.send(pair, at, HEADER + length)?)?;
    }
    for pair in 0..net.pairs {
        net.transmitter(pair)?.kick();
    }
    let mut seen = 0u64;
    for _ in 0..BURST {
        let (number, length, _) = await_frame(net, room)?;
        let n = u64::from(number.wrapping_sub(1000));
        ensure("a frame of the burst", n < u64::from(BURST))?;
        ensure("a frame comes once", seen & 1 << n == 0)?;
        same("its length", length, 60 + n * 29 % 1455)?;
        seen |= 1 << n;
    }
    for n in 0..BURST {
        wait_for(net.transmitter(n as usize % net.pairs)?, false)?;
    }
    Ok(())
}

/// Byte number `i` of what frame number `n` carries.
fn content(n: u32, i: u64) -> u8 {
    (u64::from(n).wrapping_mul(131).wrapping_add(i * 7) >> (i & 3)) as u8
}

fn sum(at: u64, length: u64) -> u64 {
    (at..at + length).fold(0xcbf2_9ce4_8422_2325, |sum, at| {
        (sum ^ u64::from(read::<u8>(at))).wrapping_mul(0x100_0000_01b3)
    })
}

/// Writes a header without wishes, and a frame.
fn compose(net: &Net, at: u64, n: u32, length: u64) {
    dma::fill(at, HEADER, 0);
    let frame = at + HEADER;
    for (i, byte) in [2u8, 0, 0, 0, 0, 1]
        .into_iter()
        .chain(net.mac())
        .enumerate()
    {
        write(frame + i as u64, byte);
    }
    write(frame + 12, ETHERTYPE);
    write(frame + 14, n.to_be_bytes());
    for i in 18..length - 8 {
        write(frame + i, content(n, i));
    }
    write(
        frame + length - 8,
        sum(frame + 12, length - 20).to_le_bytes(),
    );
}

/// Waits for a frame of ours on any pair and checks it: its number, its length, and how many buffers it came in.
fn await_frame(net: &mut Net, room: u64) -> Outcome<(u32, u64, u16)> {
    loop {
        ensure("a frame comes back", within(PATIENCE, || net.has_packet()))?;
        for pair in 0..net.pairs {
            let packet = net.take_into(pair, room, ROOM)?;
            // The host has words of its own to say.
            match packet {
                Some((length, buffers)) if length >= 60 && read::<u16>(room + 12) == ETHERTYPE => {
                    return Ok((check(net, room, length)?, length, buffers));
                }
                _ => {}
            }
        }
    }
}

/// A frame that came back is as it was sent; its number.
fn check(net: &Net, at: u64, length: u64) -> Outcome<u32> {
    let n = u32::from_be_bytes(read(at + 14));
    let mac = net.mac();
    ensure(
        "it is sent back to us",
        (0..6).all(|i| read::<u8>(at + i as u64) == mac[i]),
    )?;
    ensure(
        "its bytes are those that were sent",
        (18..length - 8).all(|i| read::<u8>(at + i) == content(n, i)),
    )?;
    let sum = sum(at + 12, length - 20);
    same("its sum", u64::from_le_bytes(read(at + length - 8)), sum)?;
    Ok(n)
}
