//! The file below an image format, with the engines of raw disks.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::target::Target;
use super::{RawOptions, open_engine};
use crate::disk::{DiskError, IoOptions};
use crate::io::DiskIo;

/// A file in which a format has put a disk's data: requests name bytes of the file. It grows as it is written, and reads as zeroes
/// past its end. Which bytes are anybody's is for the format to say.
///
/// ```
/// use block_util::{DataFile, IoBuf, IoOptions, Operation};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let file = tempfile::tempfile()?;
/// let data = DataFile::new(file, "image".as_ref(), false, false)?;
/// let mut queue = data.open_io(&IoOptions::default())?;
/// let mut bytes = [7; 512];
/// // SAFETY: `bytes` is left alone until the request has completed, below.
/// let buffers = [unsafe { IoBuf::new(bytes.as_mut_ptr(), bytes.len()) }];
/// queue.run(Operation::Read { offset: 1 << 30, buffers: &buffers })?;
/// assert_eq!(bytes, [0; 512]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct DataFile {
    target: Arc<Target>,
}

impl DataFile {
    /// Uses an open file, which `path` names in errors. If it is `direct`, open with `O_DIRECT`, offsets and lengths must be multiples of
    /// what the file system asks for ([`io::ErrorKind::InvalidInput`](std::io::ErrorKind::InvalidInput) else); memory that is not
    /// aligned is copied.
    ///
    /// # Errors
    ///
    /// [`DiskError::NotADisk`], [`DiskError::Inspect`].
    pub fn new(
        file: File,
        path: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<DataFile, DiskError> {
        let options = RawOptions {
            read_only,
            direct,
            sparse: false,
            ..RawOptions::default()
        };
        Ok(DataFile {
            target: Arc::new(Target::new(file, path, &options, false)?),
        })
    }

    /// A queue into the file, as [`crate::DiskFile::open_io`].
    ///
    /// # Errors
    ///
    /// [`DiskError::Engine`].
    pub fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
        open_engine(&self.target, options)
    }
}
