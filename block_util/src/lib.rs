//! Disks of a virtual machine, without the machine: what a disk is ([`DiskFile`]), how data moves to and from it
//! ([`DiskIo`]), raw files and block devices ([`RawDisk`]), and a limit on how fast ([`RateLimiter`]).
//!
//! For image formats: the file below them with the same engines ([`DataFile`]), and queues whose requests a function carries out
//! ([`CallIo`], [`Helpers`]).
//!
//! ```
//! use block_util::{AlignedBuf, DiskFile, DiskIo, IoOptions, LockMode, Operation, RawDisk, RawOptions, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = tempfile::NamedTempFile::new()?;
//! image.as_file().set_len(1 << 20)?;
//!
//! let disk = RawDisk::open(image.path(), &RawOptions::default())?;
//! disk.lock(LockMode::Exclusive)?;
//! let mut queue = disk.open_io(&IoOptions { depth: 8, ..IoOptions::default() })?;
//!
//! let mut sector = AlignedBuf::new(512, 512).ok_or("no memory")?;
//! sector.as_mut_slice().fill(0xa5);
//! // SAFETY: `sector` is left alone until the request has completed, below.
//! let buffers = [unsafe { sector.io_buf() }];
//! queue.submit(Request {
//!     operation: Operation::Write { offset: 4096, buffers: &buffers, durable: false },
//!     user_data: 7,
//! })?;
//! queue.kick()?;
//! while queue.in_flight() > 0 {
//!     queue.wait()?;
//!     for done in queue.drain() {
//!         assert_eq!(done.user_data, 7);
//!         done.result?;
//!     }
//! }
//! queue.run(Operation::Flush)?;
//! # assert_eq!(std::fs::read(image.path())?[4096..4608], [0xa5; 512]);
//! # Ok(()) }
//! ```

mod buffer;
mod call;
mod disk;
mod image_type;
mod io;
mod lock;
mod rate_limiter;
mod raw;

pub use buffer::{AlignedBuf, IoBuf};
pub use call::{CallIo, HelperIo, Helpers};
pub use disk::{DiskError, DiskFile, Engine, Geometry, IoOptions, LockGranularity, LockMode};
pub use image_type::{ImageType, UnknownImageType};
pub use io::{Completion, DiskIo, Drain, Operation, QueueFull, Request};
pub use lock::{ImageLock, lock_file, unlock_file};
pub use rate_limiter::{
    BucketConfig, Clock, LimiterTimer, ManualClock, MonotonicClock, RateLimiter, RateLimiterConfig,
    RateLimiterError,
};
pub use raw::{DataFile, RawDisk, RawOptions};
