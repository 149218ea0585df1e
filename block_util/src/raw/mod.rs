//! Raw disks: a file or a block device whose bytes are the disk's.
//!
//! ```text
//! RawDisk or DataFile ──open_io──▶ UringIo, AioIo or CallIo: carry out the steps
//!    │                                 │
//!    └── Target ◀──────────────────────┴── Transfer: one request, told as a sequence of steps
//! ```

mod aio;
mod bounce;
mod data;
mod sync;
mod sys;
mod target;
#[cfg(test)]
mod tests;
mod transfer;
mod uring;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use crate::disk::{DiskError, DiskFile, Engine, Geometry, IoOptions, LockGranularity, LockMode};
use crate::io::DiskIo;
use crate::lock::ImageLock;
use aio::AioIo;
pub use data::DataFile;
pub(crate) use sys::borrow;
use target::Target;
use uring::UringIo;

/// How a raw disk is opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RawOptions {
    /// Nothing may be written.
    pub read_only: bool,
    /// Past the host's page cache (`O_DIRECT`). Memory that is not aligned is copied; offsets and lengths must be
    /// multiples of [`Geometry::logical_block_size`].
    pub direct: bool,
    /// Discards give space back, and so do zeroes that may. Without it the image stays as allocated as it is.
    pub sparse: bool,
    /// Refuses writes that would make the image look like another format: for images whose type was found, not told.
    pub protect_format: bool,
    /// What [`lock`](DiskFile::lock) locks.
    pub lock: LockGranularity,
}

impl Default for RawOptions {
    fn default() -> Self {
        RawOptions {
            read_only: false,
            direct: false,
            sparse: true,
            protect_format: false,
            lock: LockGranularity::default(),
        }
    }
}

/// A raw disk image or a block device.
#[derive(Debug)]
pub struct RawDisk {
    target: Arc<Target>,
    lock: ImageLock,
}

impl RawDisk {
    /// Opens what is at `path`; takes no lock.
    ///
    /// # Errors
    ///
    /// [`DiskError::Open`], [`DiskError::NotADisk`], [`DiskError::Inspect`].
    pub fn open(path: &Path, options: &RawOptions) -> Result<RawDisk, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(if options.direct { libc::O_DIRECT } else { 0 })
            .open(path)
            .map_err(|source| DiskError::Open {
                path: path.to_owned(),
                source,
            })?;
        Ok(RawDisk {
            target: Arc::new(Target::new(file, path, options, true)?),
            lock: ImageLock::new(options.lock),
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.target.file
    }
}

impl DiskFile for RawDisk {
    fn size(&self) -> u64 {
        self.target.size()
    }

    fn geometry(&self) -> Geometry {
        self.target.geometry
    }

    fn is_read_only(&self) -> bool {
        self.target.options.read_only
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.lock.grow(&self.target.file, &self.target.path, size)?;
        self.target.resize(size)
    }

    fn lock(&self, mode: LockMode) -> Result<(), DiskError> {
        self.lock.lock(&self.target.file, &self.target.path, mode)
    }

    fn unlock(&self) -> Result<(), DiskError> {
        self.lock.unlock(&self.target.file, &self.target.path)
    }

    fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
        open_engine(&self.target, options)
    }
}

fn open_engine(target: &Arc<Target>, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
    let failed = |source| DiskError::Engine {
        path: target.path.clone(),
        depth: options.depth,
        engine: options.engine,
        source,
    };
    if !(1..=IoOptions::MAX_DEPTH).contains(&options.depth) {
        return Err(failed(io::Error::from(io::ErrorKind::InvalidInput)));
    }
    let (target, depth) = (|| Arc::clone(target), options.depth);
    let uring = || UringIo::new(target(), depth).map(|io| Box::new(io) as Box<dyn DiskIo>);
    let aio = || AioIo::new(target(), depth).map(|io| Box::new(io) as Box<dyn DiskIo>);
    let sync = || sync::open(target(), depth);
    match options.engine {
        Engine::IoUring => uring(),
        Engine::Aio => aio(),
        Engine::Sync => sync(),
        Engine::Auto if target().options.direct => uring().or_else(|_| aio()).or_else(|_| sync()),
        Engine::Auto => uring().or_else(|_| sync()),
    }
    .map_err(failed)
}
