//! The network device under load.
//!
//! `bench_net_tx` sends frames of `size=BYTES` (60; past 1514 they are TCP segments that the device is to cut) as fast as they
//! are taken. `bench_net_rx` prints `VALUE bench_ready`, waits for a byte of serial input, and only then gives buffers, so that
//! `count=N` frames wait for it; `segments=1` takes TCP segments that nobody has cut. `bench_net_echo` sends frames back until a byte of serial input comes.
//! All frames but segments have the ethertype 0x88b5 (local experiments).

use super::{Count, measure};
use crate::clock::within;
use crate::cpu::rdtsc;
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason, ensure};
use crate::tests::at_cpl3;
use crate::virtio::net::{BUFFER, F_CSUM, F_HOST_TSO4, F_MAC, F_MRG_RXBUF, HEADER, Net, Setup};
use crate::virtio::queue::MAX_SIZE;
use crate::virtio::{F_EVENT_IDX, PATIENCE};
use crate::{dma, line, number, serial};

/// Feature: packets may come without checksums.
const F_GUEST_CSUM: u64 = 1 << 1;
/// Feature: TCP segments over IPv4 may come uncut.
const F_GUEST_TSO4: u64 = 1 << 7;

/// The ethertype as it lies in memory.
const ETHERTYPE: u16 = 0x88b5u16.to_be();
/// Frames past this are segments to cut.
const LONGEST: u64 = 1514;
/// Payload of the segments that those are cut into.
const SEGMENT: u16 = 1448;
/// Ethernet, IPv4 and TCP headers.
const HEADERS: u16 = 54;
/// Buffers for frames that are sent.
const SLOTS: u64 = 64;

fn open(more: u64) -> Outcome<Net> {
    dma::reset();
    Net::open(Setup {
        features: F_EVENT_IDX | F_MAC | F_MRG_RXBUF | more,
        pairs: 1,
        size: MAX_SIZE,
    })
}

/// Writes a header and a frame of `size` bytes.
fn compose(net: &Net, at: u64, size: u64) {
    let frame = at + HEADER;
    // To another station, so that a host's stack drops it early.
    for (i, byte) in [2u8, 0, 0, 0, 0, 1]
        .into_iter()
        .chain(net.mac())
        .enumerate()
    {
        write(frame + i as u64, byte);
    }
    if size <= LONGEST {
        write(frame + 12, ETHERTYPE);
        return;
    }
    let big = |at: u64, value: u16| write(frame + at, value.to_be());
    // The header: NEEDS_CSUM, TCPv4, lengths, where the checksum is (§5.1.6).
    write(at, 1u8);
    write(at + 1, 1u8);
    write(at + 2, HEADERS);
    write(at + 4, SEGMENT);
    write(at + 6, 34u16);
    write(at + 8, 16u16);
    big(12, 0x0800);
    big(14, 0x4500);
    big(16, (size - 14) as u16);
    write(frame + 22, 64u8);
    write(frame + 23, 6u8);
    write(frame + 26, [192u8, 168, 249, 2]);
    write(frame + 30, [192u8, 168, 249, 3]);
    big(34, 5001);
    big(36, 5001);
    // Five words of header; ACK.
    big(46, 0x5010);
    big(48, 0xffff);
}

/// Sends.
pub fn transmit() -> Outcome {
    at_cpl3(|| {
        let size = number("size").unwrap_or(60);
        ensure("a size", (60..=65_000).contains(&size))?;
        let segments = size > LONGEST;
        let offload = F_CSUM | F_HOST_TSO4;
        let mut net = open(if segments { offload } else { 0 })?;
        ensure(
            "the device cuts segments",
            !segments || net.features & offload == offload,
        )?;
        let room = (HEADER + size).next_multiple_of(BUFFER);
        let frames = dma::take(room * SLOTS, 4096)?;
        for slot in 0..SLOTS {
            compose(&net, frames + slot * room, size);
        }
        measure(|limit| {
            let mut count = Count {
                operations: 0,
                ticks: 0,
                kicks: 0,
            };
            let start = rdtsc();
            let mut sent = 0;
            let mut last = 0;
            loop {
                while net.transmitter(0)?.take()?.is_some() {
                    count.operations += 1;
                }
                count.ticks = rdtsc().wrapping_sub(start);
                if limit.reached(count.operations, count.ticks) {
                    break;
                }
                let before = sent;
                while sent < limit.count
                    && net.send(0, frames + sent % SLOTS * room, HEADER + size)?
                {
                    sent += 1;
                }
                if sent != before {
                    let queue = net.transmitter(0)?;
                    // An interrupt comes after 65536 packets, unless this is said again.
                    if sent - last > 16384 {
                        queue.ask_for_interrupt(false);
                        last = sent;
                    }
                    count.kicks += u64::from(queue.kick());
                }
            }
            Ok(count)
        })
    })
}

/// Takes what waits.
pub fn receive() -> Outcome {
    at_cpl3(|| {
        let segments = number("segments") == Some(1);
        let offload = F_GUEST_CSUM | F_GUEST_TSO4;
        let mut net = open(if segments { offload } else { 0 })?;
        ensure(
            "the device leaves segments as they are",
            !segments || net.features & offload == offload,
        )?;
        let idle = number("idle").unwrap_or(u64::MAX);
        line!("VALUE bench_ready 1");
        wait_for_byte()?;
        measure(|limit| {
            let mut count = Count {
                operations: 0,
                ticks: 0,
                kicks: 0,
            };
            net.refill(0)?;
            let start = rdtsc();
            let mut last = start;
            let mut fresh = 0;
            loop {
                let mut ours = false;
                let packet = net.next(0, |at, length| {
                    ours |= length >= 14 && read::<u16>(at + 12) == ETHERTYPE;
                })?;
                let now = rdtsc();
                if let Some((length, buffers)) = packet {
                    fresh += buffers;
                    ours |= length > LONGEST;
                    count.operations += u64::from(ours);
                    if ours {
                        last = now;
                    }
                }
                // Buffers go back by the quarter of the queue.
                if fresh >= MAX_SIZE / 4 || (packet.is_none() && fresh > 0) {
                    net.receiver(0)?.ask_for_interrupt(false);
                    net.refill(0)?;
                    fresh = 0;
                }
                count.ticks = last.wrapping_sub(start);
                // What was dropped on the way doesn't come.
                if limit.reached(count.operations, now.wrapping_sub(start))
                    || now.wrapping_sub(last) > idle
                {
                    return Ok(count);
                }
            }
        })
    })
}

/// Sends back.
pub fn echo() -> Outcome {
    at_cpl3(|| {
        let mut net = open(0)?;
        let frames = dma::take(SLOTS * BUFFER, 4096)?;
        net.refill(0)?;
        line!("VALUE bench_ready 1");
        measure(|_| {
            let mut count = Count {
                operations: 0,
                ticks: 0,
                kicks: 0,
            };
            let start = rdtsc();
            let mut looks = 0u32;
            loop {
                let at = frames + count.operations % SLOTS * BUFFER;
                let mut ours = false;
                let packet = net.next(0, |from, length| {
                    if length >= 14 && length + HEADER <= BUFFER {
                        ours = read::<u16>(from + 12) == ETHERTYPE;
                        // SAFETY: both are memory for devices of ours, of this length or more.
                        unsafe {
                            core::ptr::copy_nonoverlapping(
                                from as *const u8,
                                (at + HEADER) as *mut u8,
                                length as usize,
                            );
                        }
                    }
                })?;
                let Some((length, _)) = packet else {
                    // A look at the serial port costs as much as a packet takes.
                    looks += 1;
                    if looks.is_multiple_of(1 << 20) && serial::poll().is_some() {
                        count.ticks = rdtsc().wrapping_sub(start);
                        return Ok(count);
                    }
                    continue;
                };
                if ours {
                    let (to, from): ([u8; 6], [u8; 6]) = (read(at + HEADER), read(at + HEADER + 6));
                    write(at + HEADER, from);
                    write(at + HEADER + 6, to);
                    ensure("room to send", net.send(0, at, HEADER + length)?)?;
                    count.operations += 1;
                    count.kicks += u64::from(net.transmitter(0)?.kick());
                }
                net.refill(0)?;
                while net.transmitter(0)?.take()?.is_some() {}
            }
        })
    })
}

fn wait_for_byte() -> Outcome {
    let came = within(PATIENCE, || serial::poll().is_some());
    if came {
        Ok(())
    } else {
        Err(Reason("nobody typed", 0, 1))
    }
}
