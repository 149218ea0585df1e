//! The engine that every kernel has: each request is done, on the caller's thread, when it is submitted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::target::Target;
use super::transfer::{Step, Transfer};
use crate::io::{Completion, DiskIo, QueueFull, Request};

/// A queue that blocks.
#[derive(Debug)]
pub struct SyncIo {
    target: Arc<Target>,
    transfer: Transfer,
    done: VecDeque<Completion>,
    depth: usize,
    event: EventFd,
    /// Whether `event` was written to, and not read since.
    raised: bool,
}

impl SyncIo {
    pub fn new(target: Arc<Target>, depth: usize) -> io::Result<SyncIo> {
        Ok(SyncIo {
            target,
            transfer: Transfer::new(),
            done: VecDeque::with_capacity(depth),
            depth,
            event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
            raised: false,
        })
    }
}

impl DiskIo for SyncIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        if self.done.len() == self.depth {
            return Err(QueueFull { depth: self.depth });
        }
        self.transfer.start(&self.target, &request);
        let result = loop {
            if let Step::Done(result) = self.transfer.step() {
                break result;
            }
            self.transfer.run_step(&self.target);
        };
        self.done.push_back(Completion {
            user_data: request.user_data,
            result: result.map_err(io::Error::from_raw_os_error),
        });
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if !self.done.is_empty() && !self.raised {
            self.event.write(1)?;
            self.raised = true;
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let next = self.done.pop_front();
        // Nobody else reads it, so that it can be read is certain.
        if next.is_none() && self.raised && self.event.read().is_ok() {
            self.raised = false;
        }
        next
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        super::sys::borrow(&self.event)
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }
}
