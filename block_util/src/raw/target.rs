//! What the queues of a raw disk share: the open file, and what it can do.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::RawOptions;
use super::bounce;
use super::sys::{self, DirectAlignment};
use crate::buffer::AlignedBuf;
use crate::disk::{DiskError, Geometry};
use crate::image_type::{ImageType, SECTOR};
use crate::lock::unlock_file;

/// The file behind a raw disk.
#[derive(Debug)]
pub struct Target {
    pub file: File,
    pub path: PathBuf,
    pub options: RawOptions,
    pub geometry: Geometry,
    pub is_device: bool,
    /// The disk ends where the file does: requests past it are refused. Otherwise what is read there is zeroes.
    pub bounded: bool,
    /// Told when the file is open for direct I/O.
    pub direct: Option<DirectAlignment>,
    /// What is written where the storage knows no zeroing.
    pub zeroes: AlignedBuf,
    /// Found out by trying: the storage punches no holes, zeroes no ranges.
    pub no_punch: AtomicBool,
    pub no_zero_range: AtomicBool,
    size: AtomicU64,
}

impl Target {
    pub fn new(
        file: File,
        path: &Path,
        options: &RawOptions,
        bounded: bool,
    ) -> Result<Target, DiskError> {
        let failed = |what| {
            move |source| DiskError::Inspect {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let metadata = file.metadata().map_err(failed("kind"))?;
        let kind = metadata.file_type();
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            return Err(DiskError::NotADisk {
                path: path.to_owned(),
            });
        }
        let direct = if options.direct {
            Some(sys::direct_alignment(&file).map_err(failed("alignment"))?)
        } else {
            None
        };
        let (size, geometry) = if is_device {
            let size = sys::device_size(&file).map_err(failed("size"))?;
            let geometry = device_geometry(&file, options).map_err(failed("blocks"))?;
            (size, geometry)
        } else {
            let block = u32::try_from(metadata.blksize()).unwrap_or(4096);
            let size = metadata.len();
            let punches = options.sparse && !options.read_only && sys::punches_holes(&file, size);
            (size, file_geometry(block, direct, punches))
        };
        let zeroes = AlignedBuf::new(bounce::CHUNK, bounce::ALIGNMENT)
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
            .map_err(failed("zeroes"))?;
        Ok(Target {
            file,
            path: path.to_owned(),
            options: *options,
            geometry,
            is_device,
            bounded,
            direct,
            zeroes,
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            size: AtomicU64::new(size),
        })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub fn resize(&self, size: u64) -> Result<(), DiskError> {
        let failed = |source| DiskError::Resize {
            path: self.path.clone(),
            size,
            source,
        };
        if self.options.read_only {
            return Err(failed(io::Error::from_raw_os_error(libc::EROFS)));
        }
        if self.is_device {
            let actual = sys::device_size(&self.file).map_err(failed)?;
            if size > actual {
                return Err(DiskError::DeviceSize {
                    path: self.path.clone(),
                    size,
                    actual,
                });
            }
        } else {
            if size < self.size() && self.options.protect_format && self.footer_at(size) {
                return Err(failed(io::Error::from_raw_os_error(libc::EPERM)));
            }
            self.file.set_len(size).map_err(failed)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Whether a disk of `size` bytes would end in another format's footer; yes where that cannot be found out.
    fn footer_at(&self, size: u64) -> bool {
        let Some(footer) = size.checked_sub(SECTOR) else {
            return false;
        };
        let mut magic = [0; 8];
        bounce::read_at(self, &mut magic, footer).is_err() || ImageType::is_footer(&magic)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Nothing is in flight, but the kernel may let go of an engine's hold on the file a little later, and a lock would
        // last as long. Below an image format it is not ours.
        if self.bounded {
            let _ = unlock_file(&self.file, &self.path);
        }
    }
}

fn device_geometry(file: &File, options: &RawOptions) -> io::Result<Geometry> {
    let [logical, physical, minimum, optimal] = sys::device_blocks(file)?;
    let discard = if options.sparse && !options.read_only {
        sys::device_discard_granularity(file)?
    } else {
        0
    };
    Ok(Geometry {
        logical_block_size: logical,
        physical_block_size: physical.max(logical),
        minimum_io_size: minimum,
        optimal_io_size: optimal,
        discard_granularity: discard,
    })
}

/// `block` is the file system's; `punches` tells whether the file can have holes made.
fn file_geometry(block: u32, direct: Option<DirectAlignment>, punches: bool) -> Geometry {
    let logical = direct.map_or(512, |d| d.offset.max(512));
    let physical = block.max(logical);
    Geometry {
        logical_block_size: logical,
        physical_block_size: physical,
        minimum_io_size: physical,
        optimal_io_size: 0,
        discard_granularity: if punches { physical } else { 0 },
    }
}
