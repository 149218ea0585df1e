//! Requests that a function carries out, blocking: on the caller's thread ([`CallIo`]), or on threads that the queues of a disk
//! share ([`Helpers`]). Both end in [`Finished`].
//!
//! ```text
//! submit ─▶ CallIo: function ─────────────────────────────▶ Finished ─▶ next_completion
//! submit ─▶ HelperIo ─▶ jobs of all queues ─▶ function ───▶    │
//!                                                              └─ eventfd, readable while one waits
//! ```

mod finished;
mod helpers;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use crate::io::{Completion, DiskIo, Operation, QueueFull, Request};
use finished::Finished;
pub use helpers::{HelperIo, Helpers};

/// A queue whose requests a function carries out, on the caller's thread, when they are submitted.
///
/// ```
/// use block_util::{CallIo, DiskIo, Operation};
///
/// # fn main() -> std::io::Result<()> {
/// let mut flushes = 0;
/// let mut queue = CallIo::new(8, move |operation: &Operation<'_>| match operation {
///     Operation::Flush => Ok(flushes += 1),
///     _ => Err(std::io::ErrorKind::Unsupported.into()),
/// })?;
/// (&mut queue as &mut dyn DiskIo).run(Operation::Flush)?;
/// # Ok(()) }
/// ```
pub struct CallIo<F> {
    call: F,
    finished: Finished,
    listening: bool,
    depth: usize,
}

impl<F: FnMut(&Operation<'_>) -> io::Result<()> + Send> CallIo<F> {
    /// A queue of `depth` requests.
    ///
    /// # Errors
    ///
    /// When the kernel has no eventfd for it.
    pub fn new(depth: usize, call: F) -> io::Result<Self> {
        Ok(CallIo {
            call,
            finished: Finished::new(depth)?,
            listening: true,
            depth,
        })
    }
}

impl<F: FnMut(&Operation<'_>) -> io::Result<()> + Send> DiskIo for CallIo<F> {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        if self.finished.len() == self.depth {
            return Err(QueueFull { depth: self.depth });
        }
        let result = (self.call)(&request.operation);
        self.finished.push(Completion {
            user_data: request.user_data,
            result,
        });
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.listening {
            self.finished.raise()?;
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.finished.take()
    }

    fn peek(&mut self) -> Option<bool> {
        Some(self.finished.len() > 0)
    }

    fn listen(&mut self, on: bool) {
        self.listening = on;
        // The counter of an eventfd that is 0 takes a 1.
        let _ = self.kick();
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.finished.fd()
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }
}

impl<F> fmt::Debug for CallIo<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallIo")
            .field("finished", &self.finished.len())
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
