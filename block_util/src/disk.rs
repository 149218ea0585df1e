//! The control plane of a disk: what it is, how large, who may use it, and queues into it.

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::io::DiskIo;

/// An image, a block device, or anything else that holds a disk's bytes.
///
/// All methods take `&self`: a disk is shared between the thread that controls it and the opening of its queues.
pub trait DiskFile: Debug + Send + Sync {
    /// Bytes that the guest sees.
    fn size(&self) -> u64;

    /// What to tell the guest of blocks.
    fn geometry(&self) -> Geometry;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Makes the disk `size` bytes long, while queues run. New bytes read as zeroes; bytes past a smaller size are gone.
    ///
    /// # Errors
    ///
    /// [`DiskError::Resize`] when the storage refuses, [`DiskError::DeviceSize`] for a block device that is smaller.
    fn resize(&self, size: u64) -> Result<(), DiskError>;

    /// Keeps others out, without waiting, until [`Self::unlock`] or the last use of the disk ends. A held lock changes its mode.
    ///
    /// # Errors
    ///
    /// [`DiskError::InUse`] when another holds it, [`DiskError::Lock`] when the file system knows no locks.
    fn lock(&self, mode: LockMode) -> Result<(), DiskError>;

    /// Lets others in again; fine without a lock.
    ///
    /// # Errors
    ///
    /// [`DiskError::Lock`].
    fn unlock(&self) -> Result<(), DiskError>;

    /// A queue into the disk; one for each thread that does I/O. It keeps the disk open by itself.
    ///
    /// # Errors
    ///
    /// [`DiskError::Engine`] when the kernel has no such engine or no room for it.
    fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError>;
}

/// Blocks of a disk, all in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Geometry {
    /// The unit of requests: 512, or more where the storage takes no less.
    pub logical_block_size: u32,
    /// What the storage writes without reading first; at least a logical block.
    pub physical_block_size: u32,
    /// Smallest length that does well; 0 when unknown.
    pub minimum_io_size: u32,
    /// Length that does best; 0 when unknown.
    pub optimal_io_size: u32,
    /// Discards free units of this size, aligned to it; 0 when the disk cannot discard.
    pub discard_granularity: u32,
}

/// What of a file is locked.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LockGranularity {
    /// The bytes that it has when it is locked, and those of later resizes. Storage that takes a lock of a whole file for a mandatory
    /// one lets others read it then, as for a backup. A file of no bytes is locked as a whole.
    #[default]
    ByteRange,
    /// All of it, wherever its end comes to be.
    Full,
}

/// How a disk is locked. Locks belong to the open file, not to the process, and go away with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LockMode {
    /// Others may share it: for disks that are only read.
    Shared,
    /// Nobody else.
    Exclusive,
}

/// How requests reach the kernel.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Engine {
    /// io_uring where the kernel has it, else [`Engine::Aio`] for direct I/O and [`Engine::Sync`] for all other.
    #[default]
    Auto,
    /// io_uring: one system call a batch.
    IoUring,
    /// Linux AIO. Blocks the caller's thread but for direct reads and writes, and flushes.
    Aio,
    /// Blocking calls on the caller's thread, in [`DiskIo::submit`].
    Sync,
}

/// How a queue is opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IoOptions {
    /// Requests in flight, 1 to [`IoOptions::MAX_DEPTH`].
    pub depth: usize,
    /// How requests reach the kernel.
    pub engine: Engine,
}

impl IoOptions {
    /// The deepest queue.
    pub const MAX_DEPTH: usize = 4096;
}

impl Default for IoOptions {
    fn default() -> Self {
        IoOptions {
            depth: 128,
            engine: Engine::Auto,
        }
    }
}

/// What can go wrong with a disk, outside of its requests.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The path does not open.
    #[error("opening disk {path:?}")]
    Open {
        /// Of the disk.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A directory, a socket, or what else holds no disk.
    #[error("{path:?} is neither a file nor a block device")]
    NotADisk {
        /// Of the disk.
        path: PathBuf,
    },
    /// Size, blocks or format could not be found out.
    #[error("asking for the {what} of disk {path:?}")]
    Inspect {
        /// Of the disk.
        path: PathBuf,
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another holds the lock.
    #[error("another process uses disk {path:?}: it holds a lock on it")]
    InUse {
        /// Of the disk.
        path: PathBuf,
    },
    /// Locking as such failed.
    #[error("locking disk {path:?}")]
    Lock {
        /// Of the disk.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The size cannot change.
    #[error("resizing disk {path:?} to {size} bytes")]
    Resize {
        /// Of the disk.
        path: PathBuf,
        /// Bytes wanted.
        size: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Block devices are resized by the host.
    #[error("disk {path:?} is a block device of {actual} bytes: it cannot become {size}")]
    DeviceSize {
        /// Of the disk.
        path: PathBuf,
        /// Bytes wanted.
        size: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// A queue does not open.
    #[error("opening a queue of {depth} requests ({engine:?}) into disk {path:?}")]
    Engine {
        /// Of the disk.
        path: PathBuf,
        /// Requests in flight.
        depth: usize,
        /// The engine asked for.
        engine: Engine,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What an image format has to say.
    #[error("disk {path:?}")]
    Format {
        /// Of the disk.
        path: PathBuf,
        /// The format's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
