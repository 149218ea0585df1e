//! The data plane of a disk: requests go in, completions come out, and at most one system call is made a batch.
//!
//! ```text
//!            submit()          kick()                        next_completion()
//! caller ───────────▶ queued ─────────▶ in the kernel ─────▶ done ─────────────▶ caller
//!            │                                                 │
//!            └─ QueueFull at depth                             └─ completion_fd() is readable while one waits
//! ```

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use thiserror::Error;

use crate::buffer::IoBuf;

/// What a request does. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Fills `buffers`, in order, from `offset` on.
    Read {
        /// First byte of the disk.
        offset: u64,
        /// Where the data goes.
        buffers: &'a [IoBuf],
    },
    /// Writes what `buffers` hold, in order, from `offset` on.
    Write {
        /// First byte of the disk.
        offset: u64,
        /// Where the data comes from.
        buffers: &'a [IoBuf],
        /// Completes only when the data is on stable storage (a write-through cache).
        durable: bool,
    },
    /// Completes when all writes that completed before it was submitted are on stable storage.
    Flush,
    /// The range is no longer needed. It reads as zeroes or as what it was; from a raw file, as zeroes.
    /// [`io::ErrorKind::Unsupported`] where [`crate::Geometry::discard_granularity`] is 0.
    Discard {
        /// First byte of the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range reads as zeroes afterwards, on any disk.
    WriteZeroes {
        /// First byte of the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The space may be given back.
        may_unmap: bool,
    },
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What is to be done.
    pub operation: Operation<'a>,
    /// Comes back in the [`Completion`]; of no meaning here, need not be unique.
    pub user_data: u64,
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub user_data: u64,
    /// `Ok` when every byte was moved: there are no short transfers. After an error any part may have been.
    ///
    /// Kinds that a caller can tell apart: `InvalidInput` (outside the disk, or unaligned with direct I/O),
    /// `ReadOnlyFilesystem`, `Unsupported`, `PermissionDenied` (a probed raw image must not become another format);
    /// all else is the storage failing.
    pub result: io::Result<()>,
}

/// The queue holds as many requests as it was opened for. Take completions, then submit again.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("the disk queue holds all {depth} requests that it has room for")]
pub struct QueueFull {
    /// Requests that the queue was opened for.
    pub depth: usize,
}

/// One queue into a disk; a thread of its own may drive each.
///
/// Requests run in any order and complete in any order. A wrong request (outside the disk, to a read-only disk)
/// completes with an error: `submit` fails only where the queue is full.
///
/// Drop waits for what is in flight, so that no memory is written to afterwards. The thread that called `kick`
/// must not end while requests are in flight.
pub trait DiskIo: Debug + Send {
    /// Takes a request. The list of buffers is copied; their memory is used until the completion is taken
    /// ([`IoBuf::new`] has the contract).
    ///
    /// # Errors
    ///
    /// [`QueueFull`] when [`Self::depth`] requests are in flight.
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull>;

    /// Starts everything that was submitted, in one system call.
    ///
    /// # Errors
    ///
    /// When the kernel takes no requests. Those submitted stay queued for the next call.
    fn kick(&mut self) -> io::Result<()>;

    /// Takes a completion if there is one; never blocks for storage.
    fn next_completion(&mut self) -> Option<Completion>;

    /// Readable while completions wait, for a level-triggered poll. Never read from it: taking all completions
    /// makes it unreadable again.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Whether a completion may wait, as far as can be told without a system call. None where it cannot be told, or only by
    /// [`Self::next_completion`].
    fn peek(&mut self) -> Option<bool> {
        None
    }

    /// Off, the caller looks for completions by itself, and [`Self::completion_fd`] need not be readable while some wait, which saves whoever
    /// completes requests the making of it. On, as at the start, it is again.
    fn listen(&mut self, on: bool) {
        let _ = on;
    }

    /// Blocks until a completion waits, or nothing is in flight. Starts what was submitted.
    ///
    /// # Errors
    ///
    /// As [`Self::kick`].
    fn wait(&mut self) -> io::Result<()>;

    /// Requests submitted whose completion was not taken yet.
    fn in_flight(&self) -> usize;

    /// How many requests may be in flight.
    fn depth(&self) -> usize;
}

impl<'d> dyn DiskIo + 'd {
    /// Takes the completions that wait now.
    pub fn drain(&mut self) -> Drain<'_, 'd> {
        Drain { io: self }
    }

    /// Submits one request, waits for it and returns its result; for use without other requests in flight.
    ///
    /// # Errors
    ///
    /// The request's result; [`io::ErrorKind::ResourceBusy`] while others are in flight.
    pub fn run(&mut self, operation: Operation<'_>) -> io::Result<()> {
        if self.in_flight() != 0 {
            return Err(io::Error::from(io::ErrorKind::ResourceBusy));
        }
        let request = Request {
            operation,
            user_data: 0,
        };
        self.submit(request).map_err(io::Error::other)?;
        loop {
            self.wait()?;
            if let Some(done) = self.next_completion() {
                return done.result;
            }
        }
    }
}

/// The completions of a [`DiskIo`] that wait; see [`DiskIo::next_completion`].
#[derive(Debug)]
pub struct Drain<'a, 'd> {
    io: &'a mut (dyn DiskIo + 'd),
}

impl Iterator for Drain<'_, '_> {
    type Item = Completion;

    fn next(&mut self) -> Option<Completion> {
        self.io.next_completion()
    }
}
