//! Data of the block device in every mode of the queue, and the whole disk filled and verified (words: see `virtio_blk`).

use super::virtio_blk::{area, flush};
use super::{at_cpl3, pattern, same};
use crate::outcome::Outcome;
use crate::virtio::blk::{Blk, F_MQ, F_RO, IN, OK, OUT, Setup};
use crate::virtio::queue::Segment;
use crate::virtio::{F_EVENT_IDX, F_INDIRECT};
use crate::{dma, line, number};

/// Sectors that one round writes, at most.
const ROUND: u64 = 1024;

/// A region to write and read back through one or more queues.
#[derive(Clone, Copy)]
struct Round {
    first: u64,
    count: u64,
    chunk: u64,
    pieces: u64,
    seed: u64,
}

/// Sends all of a round's requests of one kind, chunk after chunk to queue after queue, as many at a time as there is
/// room for; each comes back OK.
fn send(blk: &mut Blk, round: Round, kind: u32, buffer: u64) -> Outcome {
    let (mut at, mut index) = (0, 0);
    let mut pending = [0u64; 8];
    while at < round.count || pending.iter().any(|&n| n > 0) {
        let length = round.chunk.min(round.count - at);
        let started = if length > 0 {
            let mut data = [Segment::readable(0, 0); 32];
            let pieces = round.pieces.min(length);
            let each = length / pieces;
            for i in 0..pieces {
                let n = if i + 1 < pieces {
                    each
                } else {
                    length - each * (pieces - 1)
                };
                let from = buffer + (at + each * i) * 512;
                data[i as usize] = Segment {
                    address: from,
                    length: (n * 512) as u32,
                    writable: kind == IN,
                };
            }
            blk.start(index, kind, round.first + at, &data[..pieces as usize])?
                .is_some()
        } else {
            false
        };
        if started {
            at += length;
            pending[index] += 1;
        } else if pending[index] > 0 {
            blk.kick(index)?;
            let done = blk.finish(index)?;
            same("status of a request", u64::from(done.status), u64::from(OK))?;
            pending[index] -= 1;
        }
        index = (index + 1) % blk.count;
    }
    Ok(())
}

fn round_trip(blk: &mut Blk, round: Round, buffer: u64) -> Outcome {
    pattern::fill(buffer, round.seed, round.first, round.count);
    send(blk, round, OUT, buffer)?;
    dma::fill(buffer, round.count * 512, 0);
    // Read in other portions than those that were written.
    let other = Round {
        chunk: (round.chunk / 2).max(1) + 1,
        pieces: 1,
        ..round
    };
    send(blk, other, IN, buffer)?;
    pattern::check(buffer, round.seed, round.first, round.count)
}

/// EVENT_IDX and indirect descriptors on and off, by interrupt and by polling, in queues of several sizes.
pub fn modes(offered: u64, first: u64, count: u64) -> Outcome {
    let mut seed = 100;
    for bits in 0..8u64 {
        let mut features = Setup::FULL.features & !(F_EVENT_IDX | F_INDIRECT);
        features |= if bits & 1 != 0 { F_EVENT_IDX } else { 0 };
        features |= if bits & 2 != 0 { F_INDIRECT } else { 0 };
        if features & (F_EVENT_IDX | F_INDIRECT) & !offered != 0 {
            continue;
        }
        for size in [4, 16, 128] {
            dma::reset();
            seed += 1;
            let setup = Setup {
                features,
                queues: 1,
                size,
                interrupts: bits & 4 != 0,
            };
            let mut blk = Blk::open(setup)?;
            // Without indirect descriptors a chain must fit the ring.
            let room = if bits & 2 != 0 {
                30
            } else {
                u64::from(blk.queue(0)?.size) - 2
            };
            let pieces = room.min(blk.segments() as u64);
            let round = Round {
                first,
                count: count.min(ROUND),
                chunk: if size == 128 { 3 } else { 32 },
                pieces: if size == 16 { pieces } else { 1 },
                seed,
            };
            let buffer = dma::take(round.count * 512, 4096)?;
            round_trip(&mut blk, round, buffer)?;
            if count > ROUND {
                let end = Round {
                    first: first + count - 64,
                    count: 64,
                    ..round
                };
                round_trip(&mut blk, end, buffer)?;
            }
        }
        line!(
            "VALUE blk_mode event_idx={} indirect={} interrupts={}",
            bits & 1,
            bits >> 1 & 1,
            bits >> 2
        );
    }
    Ok(())
}

/// All queues at once, by interrupt: each has a vector of its own.
pub fn queues(offered: u64, first: u64, count: u64) -> Outcome {
    if offered & F_MQ == 0 {
        return Ok(());
    }
    for (seed, interrupts) in [(200, false), (201, true)] {
        dma::reset();
        let setup = Setup {
            queues: 8,
            size: 16,
            interrupts,
            ..Setup::FULL
        };
        let mut blk = Blk::open(setup)?;
        let round = Round {
            first,
            count: count.min(ROUND),
            chunk: 5,
            pieces: 1,
            seed,
        };
        let buffer = dma::take(round.count * 512, 4096)?;
        round_trip(&mut blk, round, buffer)?;
        line!(
            "VALUE blk_queues_used {} interrupts={}",
            blk.count,
            u8::from(interrupts)
        );
    }
    Ok(())
}

/// Goes through the area in steps of `ROUND`.
fn whole(body: fn(&mut Blk, Round, u64) -> Outcome) -> Outcome {
    dma::reset();
    let setup = Setup {
        queues: 8,
        interrupts: false,
        ..Setup::FULL
    };
    let mut blk = Blk::open(setup)?;
    let (first, count) = area(&blk)?;
    let buffer = dma::take(ROUND * 512, 4096)?;
    let seed = number("blk_seed").unwrap_or(1);
    for at in (0..count).step_by(ROUND as usize) {
        let round = Round {
            first: first + at,
            count: ROUND.min(count - at),
            chunk: 64,
            pieces: 1,
            seed,
        };
        body(&mut blk, round, buffer)?;
    }
    line!("VALUE blk_area {first} {count} seed={seed}");
    if blk.features & F_RO != 0 {
        return Ok(());
    }
    flush(&mut blk)
}

/// Writes the pattern of `blk_seed=` all over the area, and flushes.
pub fn fill() -> Outcome {
    at_cpl3(|| {
        whole(|blk, round, buffer| {
            pattern::fill(buffer, round.seed, round.first, round.count);
            send(blk, round, OUT, buffer)
        })
    })
}

/// Reads the area and finds the pattern of `blk_seed=`.
pub fn verify() -> Outcome {
    at_cpl3(|| {
        whole(|blk, round, buffer| {
            dma::fill(buffer, round.count * 512, 0);
            send(blk, round, IN, buffer)?;
            pattern::check(buffer, round.seed, round.first, round.count)
        })
    })
}
