//! The Linux AIO engine (io_submit(2)): for kernels, or sandboxes, without io_uring. Only direct I/O is asynchronous in it;
//! the kernel does buffered requests while they are submitted.
//!
//! What AIO has no operation for (zeroing, discarding) is done on the caller's thread. An eventfd is readable while
//! completions wait: the kernel adds to it for each, this engine for those of its own.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmm_sys_util::aio::{IoContext, IoControlBlock, IoEvent};
use vmm_sys_util::eventfd::EventFd;

use super::sys::{self, Direction};
use super::target::Target;
use super::transfer::{Step, Transfer};
use crate::io::{Completion, DiskIo, QueueFull, Request};

// linux/aio_abi.h
const IOCB_CMD_FDSYNC: u16 = 3;
const IOCB_CMD_PREADV: u16 = 7;
const IOCB_CMD_PWRITEV: u16 = 8;
const IOCB_FLAG_RESFD: u32 = 1;
/// No command of the kernel's, which refuses it.
const NO_COMMAND: u16 = u16::MAX;

/// A queue on an AIO context of its own.
pub struct AioIo {
    /// Before the slots, so that it goes first: the kernel ends what runs when it does.
    context: IoContext,
    target: Arc<Target>,
    slots: Vec<Transfer>,
    free: Vec<usize>,
    /// Slots whose step the kernel has not taken.
    queued: Vec<usize>,
    /// Steps that the kernel has.
    running: usize,
    /// What the kernel answered and nobody looked at yet.
    answers: VecDeque<IoEvent>,
    /// Room for answers.
    events: Vec<IoEvent>,
    /// Completions that never were with the kernel.
    done: VecDeque<usize>,
    event: EventFd,
}

impl AioIo {
    pub fn new(target: Arc<Target>, depth: usize) -> io::Result<AioIo> {
        let entries =
            u32::try_from(depth).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(AioIo {
            context: IoContext::new(entries)?,
            target,
            slots: (0..depth).map(|_| Transfer::new()).collect(),
            free: (0..depth).rev().collect(),
            queued: Vec::with_capacity(depth),
            running: 0,
            answers: VecDeque::with_capacity(depth),
            events: vec![IoEvent::default(); depth],
            done: VecDeque::with_capacity(depth),
            event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
        })
    }

    /// Does what the kernel does not do by itself, up to a step that it does, which is queued, or to the end.
    fn go_on(&mut self, slot: usize) {
        let Some(transfer) = self.slots.get_mut(slot) else {
            return;
        };
        loop {
            match transfer.step() {
                Step::Move { .. } | Step::Sync => return self.queued.push(slot),
                Step::Done(_) => return self.done.push_back(slot),
                Step::Fallocate { .. } | Step::DiscardDevice { .. } => {
                    transfer.run_step(&self.target);
                }
            }
        }
    }

    /// The step of a slot as the kernel reads it.
    fn block(&self, slot: usize) -> IoControlBlock {
        let mut block = IoControlBlock {
            aio_lio_opcode: NO_COMMAND,
            aio_data: slot as u64,
            aio_fildes: self.target.file.as_raw_fd() as u32,
            aio_flags: IOCB_FLAG_RESFD,
            aio_resfd: self.event.as_raw_fd() as u32,
            ..IoControlBlock::default()
        };
        match self.slots.get(slot).map(Transfer::step) {
            Some(Step::Move {
                direction,
                pieces,
                offset,
                flags,
            }) => {
                block.aio_lio_opcode = match direction {
                    Direction::Read => IOCB_CMD_PREADV,
                    Direction::Write => IOCB_CMD_PWRITEV,
                };
                block.aio_buf = pieces.as_ptr().addr() as u64;
                block.aio_nbytes = pieces.len() as u64;
                block.aio_offset = offset.cast_signed();
                // The place of aio_rw_flags where bytes are little-endian.
                block.aio_reserved1 = flags as u32;
            }
            Some(Step::Sync) => block.aio_lio_opcode = IOCB_CMD_FDSYNC,
            _ => {}
        }
        block
    }

    /// Gives the kernel what is queued.
    fn submit_queued(&mut self) -> io::Result<()> {
        while !self.queued.is_empty() {
            let mut blocks: Vec<IoControlBlock> =
                self.queued.iter().map(|&slot| self.block(slot)).collect();
            let list: Vec<&mut IoControlBlock> = blocks.iter_mut().collect();
            // The memory that the blocks name is the request's, good by the contract of `IoBuf::new` until its
            // completion is taken, and our own, which the slot keeps until the step has finished.
            match self.context.submit(&list) {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(taken) => {
                    let taken = taken.min(self.queued.len());
                    self.queued.drain(..taken);
                    self.running += taken;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // No room at the moment; what runs will end, and then this is called again.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                    return if self.running > 0 { Ok(()) } else { Err(e) };
                }
                // It does not take the first one, which is its answer to that.
                Err(e) => {
                    let slot = self.queued.remove(0);
                    if let Some(transfer) = self.slots.get_mut(slot) {
                        let errno = e.raw_os_error().unwrap_or(libc::EIO);
                        transfer.finish_step(&self.target, Err(errno));
                    }
                    self.go_on(slot);
                }
            }
        }
        Ok(())
    }

    /// Looks for answers, waiting for at least `want`.
    fn look(&mut self, want: libc::c_long) -> io::Result<()> {
        if self.running == 0 {
            return Ok(());
        }
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let timeout = (want == 0).then_some(&mut now);
        match self.context.get_events(want, &mut self.events, timeout) {
            Ok(count) => self.answers.extend(self.events.iter().take(count)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Makes the descriptor readable.
    fn raise(&self) {
        // Fails only where the count is at its limit, and it is readable then.
        let _ = self.event.write(1);
    }

    /// Takes the slot of a request that has ended.
    fn next_done(&mut self) -> Option<usize> {
        loop {
            if let Some(slot) = self.done.pop_front() {
                return Some(slot);
            }
            let answer = self.answers.pop_front()?;
            self.running = self.running.saturating_sub(1);
            let slot = answer.data as usize;
            if let Some(transfer) = self.slots.get_mut(slot) {
                let count = usize::try_from(answer.res);
                transfer.finish_step(&self.target, count.map_err(|_| -answer.res as i32));
                self.go_on(slot);
            }
        }
    }

    fn complete(&mut self, slot: usize) -> Completion {
        self.free.push(slot);
        let (user_data, result) = match self.slots.get(slot) {
            Some(transfer) => match transfer.step() {
                Step::Done(result) => (transfer.user_data(), result),
                _ => (transfer.user_data(), Err(libc::EIO)),
            },
            None => (0, Err(libc::EIO)),
        };
        Completion {
            user_data,
            result: result.map_err(io::Error::from_raw_os_error),
        }
    }
}

impl DiskIo for AioIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        let full = QueueFull {
            depth: self.slots.len(),
        };
        let slot = self.free.pop().ok_or(full)?;
        if let Some(transfer) = self.slots.get_mut(slot) {
            transfer.start(&self.target, &request);
        }
        self.go_on(slot);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        let result = self.submit_queued();
        if !self.done.is_empty() {
            self.raise();
        }
        result
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let mut done = self.next_done();
        if done.is_none() {
            // Those that go on first; a refusal leaves them for the next kick or wait.
            let _ = self.submit_queued();
            self.look(0).ok()?;
            done = self.next_done();
        }
        if done.is_none() && self.event.read().is_ok() {
            // Between the look and the read another may have come, which the read made unreadable.
            self.look(0).ok()?;
            done = self.next_done();
            if !self.answers.is_empty() || !self.done.is_empty() || !self.queued.is_empty() {
                self.raise();
            }
        }
        done.map(|slot| self.complete(slot))
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        sys::borrow(&self.event)
    }

    fn wait(&mut self) -> io::Result<()> {
        self.kick()?;
        if self.done.is_empty() && self.answers.is_empty() {
            self.look(1)?;
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn depth(&self) -> usize {
        self.slots.len()
    }
}

impl Drop for AioIo {
    fn drop(&mut self) {
        // What was submitted is done to its end, and no memory is used afterwards.
        while self.in_flight() > 0 {
            while self.next_completion().is_some() {}
            if self.in_flight() > 0 && self.wait().is_err() {
                // Then at least what runs: dropping the context waits for it.
                break;
            }
        }
    }
}

impl fmt::Debug for AioIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AioIo")
            .field("path", &self.target.path)
            .field("depth", &self.slots.len())
            .field("queued", &self.queued.len())
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}
