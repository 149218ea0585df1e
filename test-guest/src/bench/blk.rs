//! The block device under load: `depth` requests of one kind in flight, each replaced as it comes back.
//!
//! Words: `op=read|write|flush` (`flush` is a write, and a flush when that is done), `depth=N` (1), `size=BYTES` (4096),
//! `stride=BYTES` (the size), `span=BYTES` of the disk, `sequential=1`. See `order.rs` for places and contents.

use super::order::{BLOCK, mark, offset};
use super::{Count, Limit, measure};
use crate::cpu::rdtsc;
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason, ensure, same};
use crate::tests::at_cpl3;
use crate::virtio::blk::{Blk, FLUSH, IN, OK, OUT, Setup};
use crate::virtio::queue::{MAX_SIZE, Segment};
use crate::{dma, number, option};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

struct Job {
    kind: Kind,
    depth: u64,
    size: u64,
    stride: u64,
    span: u64,
    sequential: bool,
}

/// A request in flight: its buffer, where it goes, and whether the flush is still to come.
#[derive(Clone, Copy)]
struct Flight {
    buffer: u64,
    at: u64,
    flush_follows: bool,
}

const NOTHING: Flight = Flight {
    buffer: 0,
    at: 0,
    flush_follows: false,
};

/// Runs the job that the command line tells.
pub fn run() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let job = Job::here()?;
        let mut blk = Blk::open(Setup {
            size: MAX_SIZE,
            interrupts: false,
            ..Setup::FULL
        })?;
        ensure(
            "the span is on the disk",
            job.span <= blk.capacity().saturating_mul(512),
        )?;
        measure(|limit| job.run(&mut blk, limit))
    })
}

impl Job {
    fn here() -> Outcome<Self> {
        let size = number("size").unwrap_or(BLOCK);
        let job = Self {
            kind: match option("op") {
                Some("read") => Kind::Read,
                Some("write") => Kind::Write,
                Some("flush") => Kind::Flush,
                _ => return Err(Reason("op is read, write or flush", 0, 0)),
            },
            depth: number("depth").unwrap_or(1),
            size,
            stride: number("stride").unwrap_or(size),
            span: number("span").unwrap_or(0),
            sequential: number("sequential") == Some(1),
        };
        let places = job.span / job.stride.max(1);
        ensure(
            "size, stride and span fit together",
            job.size.is_multiple_of(BLOCK)
                && job.size > 0
                && job.stride.is_multiple_of(job.size)
                && places.is_power_of_two()
                && places > 1,
        )?;
        ensure("a depth", (1..=u64::from(MAX_SIZE)).contains(&job.depth))?;
        Ok(job)
    }

    fn run(&self, blk: &mut Blk, limit: Limit) -> Outcome<Count> {
        let mut flights = [NOTHING; MAX_SIZE as usize];
        let mut started = 0;
        let mut count = Count {
            operations: 0,
            ticks: 0,
            kicks: 0,
        };
        let most = self.depth.min(limit.count);
        let buffers = dma::take(self.depth * self.size, 4096)?;
        let start = rdtsc();
        while started < most {
            let buffer = buffers + started * self.size;
            self.start(blk, &mut flights, started, buffer)?;
            started += 1;
        }
        count.kicks += u64::from(blk.kick(0)?);
        let mut in_flight = most;
        let mut running = true;
        while in_flight > 0 {
            let before = started;
            let mut flushes = 0;
            while let Some(used) = blk.queue(0)?.take()? {
                let flight = flights[usize::from(used.head)];
                let status = blk.status(0, used.head);
                same("status of a request", u64::from(status), u64::from(OK))?;
                if flight.flush_follows {
                    flushes += 1;
                    let head = blk.start(0, FLUSH, 0, &[])?;
                    let head = head.ok_or(Reason("no room for a flush", 0, 1))?;
                    flights[usize::from(head)] = Flight {
                        flush_follows: false,
                        ..flight
                    };
                    continue;
                }
                if self.kind == Kind::Read {
                    let got: u64 = read(flight.buffer);
                    same("what was read", got, mark(flight.at / BLOCK))?;
                }
                if running {
                    count.operations += 1;
                }
                if running && started < limit.count {
                    self.start(blk, &mut flights, started, flight.buffer)?;
                    started += 1;
                } else {
                    in_flight -= 1;
                }
            }
            if running {
                let now = rdtsc().wrapping_sub(start);
                if limit.reached(count.operations, now) {
                    running = false;
                    count.ticks = now;
                }
            }
            if started != before || flushes != 0 {
                blk.queue(0)?.ask_for_interrupt(false);
                count.kicks += u64::from(blk.kick(0)?);
            }
        }
        Ok(count)
    }

    fn start(
        &self,
        blk: &mut Blk,
        flights: &mut [Flight; MAX_SIZE as usize],
        n: u64,
        buffer: u64,
    ) -> Outcome {
        let at = offset(n, self.size, self.stride, self.span, self.sequential);
        let (kind, data) = if self.kind == Kind::Read {
            (IN, Segment::writable(buffer, self.size as u32))
        } else {
            for block in 0..self.size / BLOCK {
                write(buffer + block * BLOCK, mark(at / BLOCK + block));
            }
            (OUT, Segment::readable(buffer, self.size as u32))
        };
        let head = blk.start(0, kind, at / 512, &[data])?;
        let head = head.ok_or(Reason("the queue is shorter than the depth", n, self.depth))?;
        flights[usize::from(head)] = Flight {
            buffer,
            at,
            flush_follows: self.kind == Kind::Flush,
        };
        Ok(())
    }
}
