//! The host program that disks are compared to: one thread, one ring, the file registered, a system call a batch (io_uring(7)).
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::{Job, Kind, SPAN};
use crate::counters::{Plain, own_time};
use crate::order::{BLOCK, mark, offset};

/// Memory for requests, aligned as O_DIRECT wants it.
struct Buffers {
    memory: Vec<u8>,
    first: usize,
    size: usize,
}

impl Buffers {
    fn new(count: usize, size: usize) -> Self {
        let memory = vec![0; (count * size) + BLOCK as usize];
        let first = memory.as_ptr().align_offset(BLOCK as usize);
        Self {
            memory,
            first,
            size,
        }
    }

    fn of(&mut self, slot: usize) -> &mut [u8] {
        let at = self.first + slot * self.size;
        &mut self.memory[at..at + self.size]
    }
}

/// A request in flight.
#[derive(Clone, Copy, Default)]
struct Flight {
    at: u64,
    flush_follows: bool,
}

/// Runs a job on a raw image.
///
/// # Errors
/// When the file or the ring fails, or what is read is not what should be there.
pub fn run(path: &Path, job: &Job, time: Duration) -> Result<Plain> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if job.direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .with_context(|| format!("opening {}", path.display()))?;
    let depth = job.pattern.depth;
    let mut buffers = Buffers::new(depth as usize, job.pattern.size as usize);
    let mut flights = vec![Flight::default(); depth as usize];
    // Dropped first: the kernel lets go of buffers and file before they go.
    let mut ring = IoUring::builder()
        .setup_coop_taskrun()
        .build(depth.next_power_of_two())
        .context("making an io_uring")?;
    ring.submitter()
        .register_files(&[file.as_raw_fd()])
        .context("registering a file")?;

    let mut started = 0;
    let before = own_time();
    let start = Instant::now();
    for (slot, flight) in flights.iter_mut().enumerate() {
        *flight = begin(&mut ring, &mut buffers, slot, started, job)?;
        started += 1;
    }
    let mut operations = 0;
    let mut in_flight = depth as usize;
    let mut passed = None;
    while in_flight > 0 {
        ring.submit_and_wait(1).context("io_uring_enter")?;
        loop {
            let done = ring.completion().next();
            let Some(done) = done else { break };
            let slot = done.user_data() as usize;
            ensure!(
                done.result() >= 0,
                "a request of the host program failed: {}",
                std::io::Error::from_raw_os_error(-done.result())
            );
            if flights[slot].flush_follows {
                flights[slot].flush_follows = false;
                let flush = opcode::Fsync::new(Fixed(0)).flags(FsyncFlags::DATASYNC);
                push(&mut ring, &flush.build().user_data(slot as u64))?;
                continue;
            }
            if job.pattern.kind == Kind::Read {
                let first = buffers.of(slot).first_chunk().copied().unwrap_or_default();
                if u64::from_le_bytes(first) != mark(flights[slot].at / BLOCK) {
                    bail!("the host program read something else than it should");
                }
            }
            if passed.is_some() {
                in_flight -= 1;
                continue;
            }
            operations += 1;
            flights[slot] = begin(&mut ring, &mut buffers, slot, started, job)?;
            started += 1;
        }
        let now = start.elapsed();
        if passed.is_none() && operations > 0 && now >= time {
            passed = Some(Plain::rate(operations, now.as_secs_f64(), before));
        }
    }
    passed.context("no time has passed")
}

fn begin(
    ring: &mut IoUring,
    buffers: &mut Buffers,
    slot: usize,
    n: u64,
    job: &Job,
) -> Result<Flight> {
    let pattern = &job.pattern;
    let at = offset(n, pattern.size, pattern.size, SPAN, pattern.sequential);
    let buffer = buffers.of(slot);
    let length = buffer.len() as u32;
    let entry = if pattern.kind == Kind::Read {
        opcode::Read::new(Fixed(0), buffer.as_mut_ptr(), length)
            .offset(at)
            .build()
    } else {
        for (i, block) in buffer.chunks_exact_mut(BLOCK as usize).enumerate() {
            block[..8].copy_from_slice(&mark(at / BLOCK + i as u64).to_le_bytes());
        }
        opcode::Write::new(Fixed(0), buffer.as_ptr(), length)
            .offset(at)
            .build()
    };
    push(ring, &entry.user_data(slot as u64))?;
    Ok(Flight {
        at,
        flush_follows: pattern.kind == Kind::Flush,
    })
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> Result<()> {
    // SAFETY: an entry's buffer stays where it is until the ring is dropped, before it, and is touched again only when its
    // request has completed.
    let pushed = unsafe { ring.submission().push(entry) };
    pushed.context("the ring is full, which it cannot be")
}
