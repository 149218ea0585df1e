//! Advisory locks on a whole file that belong to the open file description (fcntl(2), "Open file description locks"):
//! two opens of one file exclude each other even within a process, and a lock goes away with its last descriptor.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::disk::{DiskError, LockMode};

/// Locks all of `file`, whose `path` is for errors, without waiting. A lock held through the same open changes its mode.
///
/// # Errors
///
/// [`DiskError::InUse`] when another open of it has a lock that conflicts, [`DiskError::Lock`] for all else: a shared
/// lock needs a file open for reading, an exclusive one a file open for writing.
pub fn lock_file(file: &File, path: &Path, mode: LockMode) -> Result<(), DiskError> {
    let kind = match mode {
        LockMode::Shared => libc::F_RDLCK,
        LockMode::Exclusive => libc::F_WRLCK,
    };
    set(file, kind).map_err(|source| match source.raw_os_error() {
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
    set(file, libc::F_UNLCK).map_err(|source| DiskError::Lock {
        path: path.to_owned(),
        source,
    })
}

fn set(file: &File, kind: i32) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        // To the end, wherever that comes to be.
        l_len: 0,
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
