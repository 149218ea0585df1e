//! Advisory locks on a file that belong to the open file description (fcntl(2), "Open file description locks"):
//! two opens of one file exclude each other even within a process, and a lock goes away with its last descriptor.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::disk::{DiskError, LockGranularity, LockMode};

/// To the end of the file, wherever that comes to be.
const TO_THE_END: u64 = 0;

/// The lock of one image: of all that its file can be, or of the bytes that it has.
#[derive(Debug)]
pub struct ImageLock {
    granularity: LockGranularity,
    /// How it is locked, and the bytes from its start.
    held: Mutex<Option<(LockMode, u64)>>,
}

impl ImageLock {
    /// No lock yet.
    #[must_use]
    pub fn new(granularity: LockGranularity) -> Self {
        Self {
            granularity,
            held: Mutex::new(None),
        }
    }

    /// Locks `file`, whose `path` is for errors, without waiting. A lock that is held changes its mode.
    ///
    /// # Errors
    ///
    /// As [`lock_file`], and [`DiskError::Inspect`] when the file does not tell its size.
    pub fn lock(&self, file: &File, path: &Path, mode: LockMode) -> Result<(), DiskError> {
        let len = match self.granularity {
            LockGranularity::Full => TO_THE_END,
            LockGranularity::ByteRange => physical_size(file).map_err(|source| {
                let path = path.to_owned();
                let what = "size";
                DiskError::Inspect { path, what, source }
            })?,
        };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        // What was locked when it was larger is still.
        let len = match *held {
            Some((_, TO_THE_END)) => TO_THE_END,
            Some((_, before)) => len.max(before),
            None => len,
        };
        lock_range(file, path, mode, len)?;
        *held = Some((mode, len));
        Ok(())
    }

    /// Before the file becomes one of `len` bytes: the lock, if there is one, is for these too.
    ///
    /// # Errors
    ///
    /// As [`lock_file`].
    pub fn grow(&self, file: &File, path: &Path, len: u64) -> Result<(), DiskError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let (LockGranularity::ByteRange, Some((mode, before))) = (self.granularity, *held)
            && before != TO_THE_END
            && len > before
        {
            lock_range(file, path, mode, len)?;
            *held = Some((mode, len));
        }
        Ok(())
    }

    /// Gives the lock up; fine without one.
    ///
    /// # Errors
    ///
    /// [`DiskError::Lock`].
    pub fn unlock(&self, file: &File, path: &Path) -> Result<(), DiskError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        unlock_file(file, path)?;
        *held = None;
        Ok(())
    }
}

/// Bytes of a file or of a block device. Nothing else uses the place in it.
fn physical_size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Locks all of `file`, whose `path` is for errors, without waiting. A lock held through the same open changes its mode.
///
/// # Errors
///
/// [`DiskError::InUse`] when another open of it has a lock that conflicts, [`DiskError::Lock`] for all else: a shared
/// lock needs a file open for reading, an exclusive one a file open for writing.
pub fn lock_file(file: &File, path: &Path, mode: LockMode) -> Result<(), DiskError> {
    lock_range(file, path, mode, TO_THE_END)
}

/// Locks the first `len` bytes. A file of none is locked to the end, as the kernel has it.
fn lock_range(file: &File, path: &Path, mode: LockMode, len: u64) -> Result<(), DiskError> {
    let kind = match mode {
        LockMode::Shared => libc::F_RDLCK,
        LockMode::Exclusive => libc::F_WRLCK,
    };
    set(file, kind, len).map_err(|source| match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => DiskError::InUse {
            path: path.to_owned(),
        },
        _ => DiskError::Lock {
            path: path.to_owned(),
            source,
        },
    })
}

/// Gives the lock up; fine without one.
///
/// # Errors
///
/// [`DiskError::Lock`].
pub fn unlock_file(file: &File, path: &Path) -> Result<(), DiskError> {
    set(file, libc::F_UNLCK, TO_THE_END).map_err(|source| DiskError::Lock {
        path: path.to_owned(),
        source,
    })
}

fn set(file: &File, kind: i32, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: len,
        // Has to be 0 for this kind of lock.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel reads a `flock` that lives until the call returns.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
