//! The system calls that std does not have: ioctls of block devices (linux/fs.h), `fallocate`, alignment by `statx`,
//! vectored I/O with flags. Each is a safe function here but the last, which touches memory that is not ours.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use crate::buffer::{AlignedBuf, IoBuf};

const BLKIOMIN: libc::c_ulong = 0x1278;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

fn checked(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Bytes of a block device.
pub fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    checked(unsafe { ioctl_with_mut_ref(file, BLKGETSIZE64, &mut size) })?;
    Ok(size)
}

fn device_u32(file: &File, request: libc::c_ulong) -> io::Result<u32> {
    let mut value = 0u32;
    // SAFETY: private to this file, and called with requests that write one 32-bit integer.
    checked(unsafe { ioctl_with_mut_ref(file, request, &mut value) })?;
    Ok(value)
}

/// Sizes of a block device: logical block, physical block, least and best I/O, in bytes.
pub fn device_blocks(file: &File) -> io::Result<[u32; 4]> {
    Ok([
        device_u32(file, BLKSSZGET)?,
        device_u32(file, BLKPBSZGET)?,
        device_u32(file, BLKIOMIN)?,
        device_u32(file, BLKIOOPT)?,
    ])
}

/// The unit in which a block device discards, in bytes; 0 when it does not.
pub fn device_discard_granularity(file: &File) -> io::Result<u32> {
    let device = file.metadata()?.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    // A partition's queue is its disk's.
    for queue in ["queue", "../queue"] {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/discard_granularity");
        match fs::read_to_string(&path) {
            Ok(text) => return text.trim().parse().map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(0)
}

/// Discards a range of a block device.
pub fn device_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64.
    checked(unsafe { ioctl_with_ref(file, BLKDISCARD, &[offset, len]) })
}

/// `fallocate`; works on block devices too, where punching and zeroing are those of BLKZEROOUT.
pub fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    // SAFETY: takes no pointers, and the descriptor is open.
    checked(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) })
}

/// Whether the file system punches holes: one is tried past the end of the file, where nothing is.
pub fn punches_holes(file: &File, size: u64) -> bool {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let tried = fallocate(file, mode, size, 4096).map_err(|e| e.kind());
    tried != Err(io::ErrorKind::Unsupported)
}

/// What `O_DIRECT` asks of a request, in bytes, powers of two.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DirectAlignment {
    /// Of the memory's address.
    pub memory: u32,
    /// Of the offset and the length.
    pub offset: u32,
}

/// What direct I/O on `file`, opened with `O_DIRECT`, has to be aligned to.
pub fn direct_alignment(file: &File) -> io::Result<DirectAlignment> {
    if let Some(told) = told_alignment(file) {
        return Ok(told);
    }
    // A kernel before 6.1, or a file system that does not tell: the smallest read that works.
    let mut buffer =
        AlignedBuf::new(4096, 4096).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let start = buffer.as_mut_slice().as_mut_ptr();
    for size in [512u32, 1024, 2048] {
        // SAFETY: `size` bytes from `start` are within the buffer, which lives through the call.
        let piece = unsafe { IoBuf::new(start, size as usize) };
        // SAFETY: as above.
        if unsafe { transfer(file, Direction::Read, &[piece], 0, 0) }.is_ok() {
            return Ok(DirectAlignment {
                memory: size,
                offset: size,
            });
        }
    }
    Ok(DirectAlignment {
        memory: 4096,
        offset: 4096,
    })
}

fn told_alignment(file: &File) -> Option<DirectAlignment> {
    // SAFETY: all zeroes is a `statx`, which is integers.
    let mut answer: libc::statx = unsafe { mem::zeroed() };
    // SAFETY: the path is an empty string that ends, and the kernel writes one `statx`.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
    let told = result == 0
        && answer.stx_mask & libc::STATX_DIOALIGN != 0
        && memory.is_power_of_two()
        && offset.is_power_of_two();
    told.then_some(DirectAlignment { memory, offset })
}

/// Which way data moves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From the disk to memory.
    Read,
    /// From memory to the disk.
    Write,
}

/// `preadv2` and `pwritev2`: bytes moved, fewer than asked for at will. `flags` are RWF_.
///
/// # Safety
///
/// The contract of [`IoBuf::new`] holds for the `pieces` until this returns.
pub unsafe fn transfer(
    file: &File,
    direction: Direction,
    pieces: &[IoBuf],
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let Ok(offset) = offset.try_into() else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    // An IoBuf is laid out as an iovec.
    let iovecs = pieces.as_ptr().cast::<libc::iovec>();
    let count = pieces.len().min(libc::UIO_MAXIOV as usize) as i32;
    let fd = file.as_raw_fd();
    // SAFETY: `count` iovecs are at `iovecs`; the memory they name is good by this function's contract.
    let moved = unsafe {
        match direction {
            Direction::Read => libc::preadv2(fd, iovecs, count, offset, flags),
            Direction::Write => libc::pwritev2(fd, iovecs, count, offset, flags),
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// The descriptor of an object that has one, for as long as the object is borrowed.
pub fn borrow<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: the owner keeps it open, and is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
