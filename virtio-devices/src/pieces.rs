//! Guest memory as the kernel takes it: a list of iovecs.
#![allow(unsafe_code)]

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// As many as one system call takes (UIO_MAXIOV).
pub(crate) const MOST: usize = libc::UIO_MAXIOV as usize;

/// Pieces of memory, whose mappings whoever fills it keeps until they are used. It makes no reference to them.
#[derive(Default)]
pub(crate) struct Pieces(Vec<libc::iovec>);

// SAFETY: they are addresses, which mean the same on each thread; only unsafe functions use them.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Adds guest memory.
    pub fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>) {
        self.0.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
    }

    /// Adds memory of our own, for one call.
    pub fn push_own(&mut self, bytes: &mut [u8]) {
        self.0.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
    }

    /// Adds pieces of another list, for one call.
    pub fn copy(&mut self, pieces: &[libc::iovec]) {
        self.0.extend_from_slice(pieces);
    }

    /// Takes the last one away.
    pub fn pop(&mut self) {
        self.0.pop();
    }

    /// Takes the first `count` away.
    pub fn remove_first(&mut self, count: usize) {
        self.0.drain(..count.min(self.0.len()));
    }

    /// Keeps the first `count` alone.
    pub fn truncate(&mut self, count: usize) {
        self.0.truncate(count);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }
}
