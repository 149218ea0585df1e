//! The io_uring engine (io_uring(7)): one system call a batch, completions read from shared memory without any.
//!
//! A slot holds each request in flight, and what the kernel reads of it. Steps that need no kernel, or that io_uring has
//! no operation for, travel as a no-op, so that the ring's own descriptor is readable whenever a completion waits.
//!
//! The file is registered. Memory is not: reads of 4 and 64 KiB, through the page cache and past it, were as fast without
//! (115,000 a second of 4 KiB either way, at depth 32), and a registered guest's memory would be pinned.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::sys::{self, Direction};
use super::target::Target;
use super::transfer::{Step, Transfer};
use crate::io::{Completion, DiskIo, QueueFull, Request};

/// The disk's place in the ring's table of files.
const DISK: Fixed = Fixed(0);

/// A queue on a ring of its own.
pub struct UringIo {
    ring: IoUring,
    target: Arc<Target>,
    slots: Vec<Transfer>,
    free: Vec<usize>,
    /// Steps in the submission queue that the kernel has not taken.
    queued: usize,
    /// Steps that the kernel has.
    running: usize,
    /// Among those queued is a step that goes on with a request, which nobody will kick.
    goes_on: bool,
}

impl UringIo {
    pub fn new(target: Arc<Target>, depth: usize) -> io::Result<UringIo> {
        let entries =
            u32::try_from(depth).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // Without this a completion interrupts the thread that submitted; and that one waits shows in memory (kernel 5.19).
        let ring = IoUring::builder()
            .dontfork()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries)
            .or_else(|_| IoUring::builder().dontfork().build(entries))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Nop::CODE,
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        // NODROP: the completion of a request is never lost.
        if !ring.params().is_feature_nodrop() || !needed.iter().all(|&op| probe.is_supported(op)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        ring.submitter()
            .register_files(&[target.file.as_raw_fd()])?;
        Ok(UringIo {
            ring,
            target,
            slots: (0..depth).map(|_| Transfer::new()).collect(),
            free: (0..depth).rev().collect(),
            queued: 0,
            running: 0,
            goes_on: false,
        })
    }

    /// Puts the slot's present step in the submission queue. False where that is full, which cannot be: it has an entry
    /// for every slot, and a slot has one step.
    fn push(&mut self, slot: usize) -> bool {
        let Some(transfer) = self.slots.get(slot) else {
            return false;
        };
        let entry = entry(&transfer.step()).user_data(slot as u64);
        // SAFETY: the entry names memory of the request, good by the contract of `IoBuf::new` until its completion is
        // taken; the list of buffers and our own memory, which the slot keeps unchanged until the step has finished,
        // and slots outlive the ring's use (see Drop); and zeroes that the target keeps.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        if pushed {
            self.queued += 1;
        }
        pushed
    }

    /// Gives the kernel what is queued and waits for `want` of its answers.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(taken) => {
                    let taken = taken.min(self.queued);
                    self.queued -= taken;
                    self.running += taken;
                    // The kernel stops in the middle at an entry that it cannot start, whose completion says why.
                    if self.queued == 0 || taken == 0 {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // No room at the moment; what runs will end, and then this is called again.
                Err(e)
                    if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
                        && self.running > 0 =>
                {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Ends the slot's request.
    fn complete(&mut self, slot: usize, result: Result<(), i32>) -> Completion {
        let user_data = self.slots.get(slot).map_or(0, Transfer::user_data);
        self.free.push(slot);
        Completion {
            user_data,
            result: result.map_err(io::Error::from_raw_os_error),
        }
    }
}

/// A step as the kernel reads it.
fn entry(step: &Step<'_>) -> squeue::Entry {
    match *step {
        Step::Move {
            direction,
            pieces,
            offset,
            flags,
        } => match (direction, pieces) {
            (Direction::Read, [one]) => opcode::Read::new(DISK, one.as_ptr(), length(one.len()))
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (Direction::Write, [one]) => opcode::Write::new(DISK, one.as_ptr(), length(one.len()))
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (Direction::Read, many) => {
                opcode::Readv::new(DISK, many.as_ptr().cast(), length(many.len()))
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (Direction::Write, many) => {
                opcode::Writev::new(DISK, many.as_ptr().cast(), length(many.len()))
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
        },
        Step::Sync => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        Step::Fallocate { mode, offset, len } => opcode::Fallocate::new(DISK, len)
            .offset(offset)
            .mode(mode)
            .build(),
        Step::DiscardDevice { .. } | Step::Done(_) => opcode::Nop::new().build(),
    }
}

/// At most what the kernel moves at a time, of which fewer is always allowed, in whole blocks.
fn length(len: usize) -> u32 {
    len.min(1 << 30) as u32
}

impl DiskIo for UringIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        let full = QueueFull {
            depth: self.slots.len(),
        };
        let slot = self.free.pop().ok_or(full)?;
        if let Some(transfer) = self.slots.get_mut(slot) {
            transfer.start(&self.target, &request);
        }
        if !self.push(slot) {
            self.free.push(slot);
            return Err(full);
        }
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.queued == 0 {
            return Ok(());
        }
        self.enter(0)
    }

    fn next_completion(&mut self) -> Option<Completion> {
        loop {
            let Some(answer) = self.ring.completion().next() else {
                // What goes on, and what the kernel completes as soon as it is called.
                let call = self.goes_on || self.ring.submission().taskrun();
                if !call || self.enter(0).is_err() {
                    return None;
                }
                self.goes_on = self.queued > 0;
                if self.goes_on || self.ring.completion().is_empty() {
                    return None;
                }
                continue;
            };
            self.running = self.running.saturating_sub(1);
            let slot = answer.user_data() as usize;
            let Some(transfer) = self.slots.get_mut(slot) else {
                continue;
            };
            match transfer.step() {
                Step::Done(_) => {}
                Step::DiscardDevice { .. } => transfer.run_step(&self.target),
                _ => {
                    let count = usize::try_from(answer.result());
                    transfer.finish_step(&self.target, count.map_err(|_| -answer.result()));
                }
            }
            if let Step::Done(result) = transfer.step() {
                return Some(self.complete(slot, result));
            }
            if !self.push(slot) {
                return Some(self.complete(slot, Err(libc::EAGAIN)));
            }
            self.goes_on = true;
        }
    }

    fn peek(&mut self) -> Option<bool> {
        Some(self.goes_on || !self.ring.completion().is_empty() || self.ring.submission().taskrun())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        sys::borrow(&self.ring)
    }

    fn wait(&mut self) -> io::Result<()> {
        if self.in_flight() == 0 || !self.ring.completion().is_empty() {
            return self.kick();
        }
        self.enter(1)
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn depth(&self) -> usize {
        self.slots.len()
    }
}

impl Drop for UringIo {
    fn drop(&mut self) {
        // The kernel may read and write memory until the last request is done.
        while self.in_flight() > 0 {
            while self.next_completion().is_some() {}
            if self.in_flight() > 0 && self.enter(1).is_err() {
                // It takes no more, yet may still use what the slots hold: keep that for ever.
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(Arc::clone(&self.target));
                break;
            }
        }
        // The kernel ends a ring some time after it is closed: let go of the disk now.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl fmt::Debug for UringIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringIo")
            .field("path", &self.target.path)
            .field("depth", &self.slots.len())
            .field("queued", &self.queued)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}
