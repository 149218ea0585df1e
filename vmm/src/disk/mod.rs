//! From a `DiskConfig` to an open, locked disk of whatever format.

#[cfg(test)]
mod bench;
mod qcow2;

use std::fs::File;
use std::sync::Arc;

use block_util::{DiskError, DiskFile, LockMode, RawDisk, RawOptions};
use thiserror::Error;
use vm_virtio::Spawn;

use self::qcow2::QcowDisk;
use crate::config::{DiskConfig, ImageType};

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskSetupError {
    /// What the disk itself says.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A format that is not built yet.
    #[error(
        "disk {path:?} looks like {format}, which is not built yet; image_type=raw makes it a raw disk"
    )]
    Format {
        /// The image.
        path: std::path::PathBuf,
        /// What it looks like.
        format: block_util::ImageType,
    },
}

/// Opens and locks the disk of `config`: for writing alone, or for reading with others.
///
/// An image whose type is not told is looked at. If it is raw then, the guest cannot make it look like another format, so that the
/// next start does not take it for one. `id` names the threads of a format that needs some.
pub fn open(
    config: &DiskConfig,
    id: &str,
    spawn: &Spawn,
) -> Result<Arc<dyn DiskFile>, DiskSetupError> {
    let told = config.image_type;
    let image_type = match told {
        Some(told) => told,
        None => probe(config)?,
    };
    match image_type {
        ImageType::Raw => {
            let options = RawOptions {
                read_only: config.readonly,
                direct: config.direct,
                sparse: config.sparse,
                protect_format: told.is_none(),
                lock: config.lock_granularity.of_lock(),
            };
            let disk = RawDisk::open(&config.path, &options)?;
            disk.lock(lock_mode(config))?;
            Ok(Arc::new(disk))
        }
        // It locks before it reads.
        ImageType::Qcow2 => Ok(Arc::new(QcowDisk::open(config, id, spawn)?)),
    }
}

fn lock_mode(config: &DiskConfig) -> LockMode {
    if config.readonly {
        LockMode::Shared
    } else {
        LockMode::Exclusive
    }
}

fn probe(config: &DiskConfig) -> Result<ImageType, DiskSetupError> {
    let path = &config.path;
    let file = File::open(path).map_err(|source| DiskError::Open {
        path: path.clone(),
        source,
    })?;
    let inspect = |source| DiskError::Inspect {
        path: path.clone(),
        what: "format",
        source,
    };
    let metadata = file.metadata().map_err(inspect)?;
    // A footer is looked for in files alone; a directory is refused when it is opened as a disk.
    if metadata.is_dir() {
        return Ok(ImageType::Raw);
    }
    match block_util::ImageType::probe(&file, metadata.len()).map_err(inspect)? {
        block_util::ImageType::Raw => Ok(ImageType::Raw),
        block_util::ImageType::Qcow2 => Ok(ImageType::Qcow2),
        format => Err(DiskSetupError::Format {
            path: path.clone(),
            format,
        }),
    }
}
