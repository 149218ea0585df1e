//! Copies between a caller's memory, which may be a guest's, and our own: where direct I/O takes the caller's not, and
//! where what is written has to be looked at first and must not change after.
#![allow(unsafe_code)]

use std::io;
use std::ptr;

use super::sys::{self, Direction};
use super::target::Target;
use crate::buffer::{AlignedBuf, IoBuf};

/// Bytes copied at a time: what one request may hold of our memory.
pub const CHUNK: usize = 128 << 10;

/// Of our own memory; direct I/O nowhere asks for more.
pub const ALIGNMENT: usize = 4096;

/// Fills `own` from `pieces`; bytes copied, all of `own` where the pieces have them.
///
/// # Safety
///
/// The contract of [`IoBuf::new`] holds for the pieces.
pub unsafe fn gather(pieces: &[IoBuf], own: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let rest = &mut own[done..];
        let count = piece.len().min(rest.len());
        // SAFETY: `count` bytes can be read at the piece and written at `rest`, which is ours alone. A racing guest
        // makes the bytes unspecified, no more: they are looked at only after the copy.
        unsafe { ptr::copy_nonoverlapping(piece.as_ptr().cast_const(), rest.as_mut_ptr(), count) };
        done += count;
        if done == own.len() {
            break;
        }
    }
    done
}

/// Fills `pieces` from `own`; bytes copied.
///
/// # Safety
///
/// The contract of [`IoBuf::new`] holds for the pieces.
pub unsafe fn scatter(own: &[u8], pieces: &[IoBuf]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let rest = &own[done..];
        let count = piece.len().min(rest.len());
        // SAFETY: `count` bytes can be read at `rest` and written at the piece, of which nobody has a reference.
        unsafe { ptr::copy_nonoverlapping(rest.as_ptr(), piece.as_ptr(), count) };
        done += count;
        if done == own.len() {
            break;
        }
    }
    done
}

/// Fills `pieces` with zeroes.
///
/// # Safety
///
/// The contract of [`IoBuf::new`] holds for the pieces.
pub unsafe fn clear(pieces: &[IoBuf]) {
    for piece in pieces {
        // SAFETY: the piece's bytes can be written, and nobody has a reference to them.
        unsafe { ptr::write_bytes(piece.as_ptr(), 0, piece.len()) };
    }
}

/// Reads all of `bytes`, at most 4096, from any offset, aligned or not, waiting for it.
pub fn read_at(target: &Target, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let start = offset - offset % ALIGNMENT as u64;
    let skip = (offset - start) as usize;
    let mut own = AlignedBuf::new(2 * ALIGNMENT, ALIGNMENT)
        .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: `own` lives, and is not looked at, until the transfer has returned.
    let moved = unsafe {
        let piece = own.io_buf();
        sys::transfer(&target.file, Direction::Read, &[piece], start, 0)?
    };
    let found = own.as_slice()[..moved]
        .get(skip..skip + bytes.len())
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
    bytes.copy_from_slice(found);
    Ok(())
}
