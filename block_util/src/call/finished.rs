//! Requests that are done, and an eventfd that is readable while one of them waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use vmm_sys_util::eventfd::EventFd;

use crate::io::Completion;

/// The eventfd is written to once for any number of completions, and read from once they are all taken.
#[derive(Debug)]
pub struct Finished {
    done: VecDeque<Completion>,
    event: EventFd,
    /// Whether `event` was written to, and not read since.
    raised: bool,
}

impl Finished {
    /// With room for `depth` completions.
    pub fn new(depth: usize) -> io::Result<Finished> {
        Ok(Finished {
            done: VecDeque::with_capacity(depth),
            event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
            raised: false,
        })
    }

    pub fn push(&mut self, completion: Completion) {
        self.done.push_back(completion);
    }

    /// Makes the eventfd readable if a completion waits.
    pub fn raise(&mut self) -> io::Result<()> {
        if !self.done.is_empty() && !self.raised {
            self.event.write(1)?;
            self.raised = true;
        }
        Ok(())
    }

    /// Takes a completion; where none is left, the eventfd is readable no more.
    pub fn take(&mut self) -> Option<Completion> {
        let next = self.done.pop_front();
        // Nobody else reads it, so that it can be read is certain.
        if next.is_none() && self.raised && self.event.read().is_ok() {
            self.raised = false;
        }
        next
    }

    pub fn len(&self) -> usize {
        self.done.len()
    }

    /// A descriptor of the eventfd for as long as `self`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        crate::raw::borrow(&self.event)
    }

    /// The eventfd under another descriptor.
    pub fn event(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }
}
