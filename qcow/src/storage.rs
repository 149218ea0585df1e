//! Where an image's bytes live: a trait, and two implementations of it, a file and memory.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::RwLock;

use crate::error::{Error, Result};
use crate::odirect::Direct;
use crate::options::OpenOptions;

/// Random access to bytes, by several threads at once.
///
/// What was written is durable after [`Storage::flush`] returns; before that, any of it may be lost, in any order.
pub trait Storage: Send + Sync + Debug {
    /// Fills `buf` from byte `offset` on. Bytes past the end are zeros.
    ///
    /// # Errors
    /// What the host reports.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at byte `offset`, growing the storage as needed.
    ///
    /// # Errors
    /// What the host reports.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// What the host reports.
    fn flush(&self) -> io::Result<()>;

    /// Length in bytes.
    ///
    /// # Errors
    /// What the host reports.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is zero.
    ///
    /// # Errors
    /// What the host reports.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends (with zeros) to `len` bytes.
    ///
    /// # Errors
    /// What the host reports.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Says that `len` bytes at `offset` are no longer needed. They read as zeros or as before.
    ///
    /// # Errors
    /// What the host reports; a storage that cannot do it returns `Ok`.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }

    /// The file below, where there is one with the same bytes at the same offsets.
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// Bytes of a block, a power of two: to write a part of one, the storage reads it first. 1 where that is never so.
    fn block(&self) -> u64 {
        1
    }
}

impl<S: Storage + ?Sized> Storage for std::sync::Arc<S> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }

    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        (**self).set_len(len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).discard(offset, len)
    }

    fn as_file(&self) -> Option<&File> {
        (**self).as_file()
    }

    fn block(&self) -> u64 {
        (**self).block()
    }
}

/// A regular file or block device, through the page cache or past it.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    direct: Option<Direct>,
}

impl FileStorage {
    /// Uses an open file, of which only positional reads and writes are made.
    pub fn new(file: File) -> Self {
        FileStorage { file, direct: None }
    }

    /// Uses a file that is open with `O_DIRECT`. Reads and writes may still be of any bytes, though those of whole blocks in aligned
    /// memory are faster.
    ///
    /// After a write the file may be longer than it, up to the end of its last block: by zeros.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where the file takes only blocks of more than 1 MiB.
    pub fn direct(file: File) -> io::Result<Self> {
        FileStorage::direct_in_blocks(file, 1)
    }

    /// As [`FileStorage::direct`], in blocks of at least `block` bytes, a power of two.
    ///
    /// # Errors
    /// As [`FileStorage::direct`], and for a `block` that is no power of two.
    pub fn direct_in_blocks(file: File, block: u64) -> io::Result<Self> {
        let direct = Direct::new(&file, block)?;
        Ok(FileStorage {
            file,
            direct: Some(direct),
        })
    }

    /// Opens the file at `path` for reading, or as well for writing, as `options` say of the page cache.
    pub(crate) fn open(path: &Path, write: bool, options: &OpenOptions) -> Result<Self> {
        let flags = if options.direct { libc::O_DIRECT } else { 0 };
        let opened = File::options()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(path)
            .and_then(|file| {
                if options.direct {
                    FileStorage::direct_in_blocks(file, options.direct_block)
                } else {
                    Ok(FileStorage::new(file))
                }
            });
        opened.map_err(|source| Error::Open {
            path: path.to_owned(),
            source,
        })
    }

    /// The file below.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Storage for FileStorage {
    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            return direct.read_at(&self.file, buf, offset);
        }
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    buf = buf.get_mut(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) => direct.write_at(&self.file, buf, offset),
            None => self.file.write_all_at(buf, offset),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        // Unlike the metadata's length, this is right for block devices too.
        (&self.file).seek(SeekFrom::End(0))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn block(&self) -> u64 {
        self.direct.as_ref().map_or(1, Direct::block)
    }

    #[allow(unsafe_code)]
    fn discard(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            (offset, len) = direct.blocks_within(offset, len);
        }
        if len == 0 {
            return Ok(());
        }
        let (Ok(start), Ok(length)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Ok(());
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open as long as `self.file` lives, and the call touches no memory of ours.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, start, length) };
        if result == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // File systems without holes: the bytes stay, which is allowed.
            e if e.raw_os_error() == Some(libc::EOPNOTSUPP)
                || e.raw_os_error() == Some(libc::ENODEV) =>
            {
                Ok(())
            }
            e => Err(e),
        }
    }
}

/// Bytes in memory, for tests and for images that are made to be sent elsewhere.
#[derive(Debug, Default)]
pub struct MemStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemStorage {
    /// Storage that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        MemStorage {
            bytes: RwLock::new(bytes),
        }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.lock_shared().clone()
    }

    // A panic elsewhere leaves whole bytes behind, so a poisoned lock is as good as any.
    fn lock_shared(&self) -> std::sync::RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(|e| e.into_inner())
    }

    fn lock(&self) -> std::sync::RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(|e| e.into_inner())
    }
}

/// More than this in memory is a mistake, or an image that was made to exhaust it.
const MEM_LIMIT: u64 = 1 << 32;

fn index(offset: u64) -> io::Result<usize> {
    if offset > MEM_LIMIT {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "storage in memory is limited to 4 GiB",
        ));
    }
    usize::try_from(offset).map_err(io::Error::other)
}

impl Storage for MemStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.lock_shared();
        let start = offset.min(bytes.len() as u64) as usize;
        let n = buf.len().min(bytes.len() - start);
        buf[..n].copy_from_slice(&bytes[start..start + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let end = index(offset.saturating_add(buf.len() as u64))?;
        let mut bytes = self.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[end - buf.len()..end].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock_shared().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = index(len)?;
        self.lock().resize(len, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exercise(s: &dyn Storage) {
        s.write_at(b"hello", 10).unwrap();
        assert_eq!(s.len().unwrap(), 15);
        let mut b = [1u8; 8];
        s.read_at(&mut b, 12).unwrap();
        assert_eq!(&b, b"llo\0\0\0\0\0");
        s.read_at(&mut b, 1 << 40).unwrap();
        assert_eq!(b, [0; 8]);
        s.set_len(12).unwrap();
        s.set_len(20).unwrap();
        s.read_at(&mut b, 10).unwrap();
        assert_eq!(&b, b"he\0\0\0\0\0\0");
        s.discard(0, 4096).unwrap();
        s.flush().unwrap();
        assert!(!s.is_empty().unwrap());
    }

    #[test]
    fn file_and_memory_behave_alike() {
        exercise(&MemStorage::default());
        exercise(&FileStorage::new(tempfile::tempfile().unwrap()));
    }

    #[test]
    fn memory_is_bounded() {
        let s = MemStorage::default();
        assert!(s.write_at(b"x", u64::MAX).is_err());
        assert!(s.set_len(1 << 40).is_err());
    }
}
