//! A qcow2 image as a disk.
//!
//! ```text
//!                    clusters that are there
//! submit ─▶ QcowIo ─────────────────────────▶ DataFile (io_uring): guest memory ◀─▶ image file
//!              │
//!              └─ all else ─▶ Helpers: threads of the disk ─▶ Copier ─▶ the library's blocking calls
//! ```

mod copy;
mod queue;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use block_util::{
    DataFile, DiskError, DiskFile, DiskIo, Geometry, Helpers, ImageLock, IoBuf, IoOptions,
    LockMode, Operation,
};
use qcow::Image;
use vm_virtio::Spawn;

use self::copy::{Copier, to_io};
use self::queue::QcowIo;
use crate::config::DiskConfig;

const SECTOR: u32 = 512;
/// Threads of a disk that carry out what needs metadata.
const HELPERS: usize = 4;

/// A qcow2 image.
pub(super) struct QcowDisk {
    shared: Arc<Shared>,
    read_only: bool,
}

/// What its queues keep open. The order is that in which it goes away.
struct Shared {
    helpers: Arc<Helpers>,
    data: DataFile,
    /// What its requests are multiples of.
    block: u64,
    image: Arc<Image>,
    /// For the lock.
    file: File,
    lock: ImageLock,
    path: PathBuf,
}

impl QcowDisk {
    /// Opens the image of `config`. Its backing file is followed only if the config says so. `id` and a number name the
    /// disk's threads.
    pub fn open(config: &DiskConfig, id: &str, spawn: &Spawn) -> Result<Self, DiskError> {
        Self::open_in_blocks(config, 1, id, spawn)
    }

    /// As [`Self::open`]; direct I/O is in blocks of at least `block` bytes.
    fn open_in_blocks(
        config: &DiskConfig,
        block: u64,
        id: &str,
        spawn: &Spawn,
    ) -> Result<Self, DiskError> {
        let path = config.path.clone();
        let file = OpenOptions::new()
            .read(true)
            .write(!config.readonly)
            .custom_flags(if config.direct { libc::O_DIRECT } else { 0 })
            .open(&path)
            .map_err(|source| DiskError::Open {
                path: path.clone(),
                source,
            })?;
        // Before the image is read: what another process is writing must not be.
        let lock = ImageLock::new(config.lock_granularity.of_lock());
        lock.lock(&file, &path, super::lock_mode(config))?;
        let options = qcow::OpenOptions::new()
            .write(!config.readonly)
            .follow_backing(config.backing_files)
            .follow_data_file(config.backing_files)
            .punch_holes(config.sparse)
            .direct(config.direct)
            .direct_block(block);
        let image = Image::open(&path, &options).map_err(|source| DiskError::Format {
            path: path.clone(),
            source: Box::new(source),
        })?;
        let image = Arc::new(image);
        let inspect = |what| {
            let path = path.clone();
            move |source| DiskError::Inspect { path, what, source }
        };
        let data = image
            .data_file()
            .ok_or_else(|| io::ErrorKind::Unsupported.into())
            .and_then(File::try_clone)
            .map_err(inspect("data file"))?;
        let data = DataFile::new(data, &path, config.readonly, config.direct)?;
        let spawn = |name, job| spawn(name, job);
        let helpers = Helpers::new(&format!("{id}_w"), HELPERS, &spawn, || {
            let mut copier = Copier::new(Arc::clone(&image));
            move |operation: &Operation<'_>| copier.carry_out(operation)
        })
        .map_err(inspect("threads"))?;
        Ok(Self {
            shared: Arc::new(Shared {
                helpers,
                data,
                block: image.data_block(),
                image,
                file,
                lock,
                path,
            }),
            read_only: config.readonly,
        })
    }
}

impl fmt::Debug for QcowDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QcowDisk({:?})", self.shared.path)
    }
}

impl DiskFile for QcowDisk {
    fn size(&self) -> u64 {
        self.shared.image.len()
    }

    fn geometry(&self) -> Geometry {
        let bytes = |n: u64| u32::try_from(n).unwrap_or(SECTOR);
        let logical = bytes(self.shared.block).max(SECTOR);
        let physical = logical.max(4096);
        let cluster = bytes(self.shared.image.cluster_size()).max(logical);
        Geometry {
            logical_block_size: logical,
            physical_block_size: physical,
            minimum_io_size: physical,
            optimal_io_size: cluster,
            discard_granularity: if self.read_only { 0 } else { cluster },
        }
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.shared
            .image
            .resize(size, qcow::Shrink::Discard)
            .map_err(|source| DiskError::Resize {
                path: self.shared.path.clone(),
                size,
                source: to_io(source),
            })
    }

    fn lock(&self, mode: LockMode) -> Result<(), DiskError> {
        let Shared {
            lock, file, path, ..
        } = &*self.shared;
        lock.lock(file, path, mode)
    }

    fn unlock(&self) -> Result<(), DiskError> {
        let Shared {
            lock, file, path, ..
        } = &*self.shared;
        lock.unlock(file, path)
    }

    fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
        // A request may be in several pieces.
        let pieces = IoOptions {
            depth: options.depth.saturating_mul(2).min(IoOptions::MAX_DEPTH),
            engine: options.engine,
        };
        let data = self.shared.data.open_io(&pieces)?;
        let io = QcowIo::new(&self.shared, data, options.depth);
        let io = io.map_err(|source| DiskError::Engine {
            path: self.shared.path.clone(),
            depth: options.depth,
            engine: options.engine,
            source,
        })?;
        Ok(Box::new(io))
    }
}

/// Bytes of `buffers`, if that is a number.
fn length(buffers: &[IoBuf]) -> Option<u64> {
    buffers
        .iter()
        .try_fold(0_u64, |sum, b| sum.checked_add(b.len() as u64))
}
