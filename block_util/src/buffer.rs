//! Memory that data moves to and from: the caller's ([`IoBuf`]), which may be a guest's, and our own ([`AlignedBuf`]).
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;

/// A piece of memory that a request reads from or writes to. It does not own the memory and has no lifetime: a guest's
/// memory is used by the kernel, by other devices and by the guest at once, which no Rust reference can say.
///
/// ```
/// use block_util::IoBuf;
///
/// let mut sector = [0u8; 512];
/// // SAFETY: `sector` outlives every use of the buffer, which here is none.
/// let buf = unsafe { IoBuf::new(sector.as_mut_ptr(), sector.len()) };
/// assert_eq!(buf.len(), 512);
/// ```
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoBuf(libc::iovec);

// SAFETY: the contract of `IoBuf::new` is for any thread: the memory is used by the kernel, whoever holds the buffer.
unsafe impl Send for IoBuf {}

// SAFETY: as for Send; a shared IoBuf gives out address and length only.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// Names `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// From the submission of a request that names this buffer until its [`crate::Completion`] is taken, or the
    /// [`crate::DiskIo`] is dropped (forgotten does not count), whichever comes first:
    ///
    /// * the `len` bytes at `ptr` stay mapped, readable and writable: not freed, not unmapped, not shrunk;
    /// * no Rust reference is used that says otherwise: none to it at all where a request reads into it, no `&mut`
    ///   where a request writes it out.
    ///
    /// The memory need not hold still. Others (a guest's CPUs) may read and change it at any time: the data of a racing
    /// request is then unspecified, but nothing else is.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        IoBuf(libc::iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// `len` bytes of it from byte `start` on, or what there is of them; for the same request.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> IoBuf {
        let mut part = *self;
        part.advance(start);
        part.0.iov_len = part.0.iov_len.min(len);
        part
    }

    /// Drops the first `count` bytes, at most all.
    pub(crate) fn advance(&mut self, count: usize) {
        let count = count.min(self.0.iov_len);
        self.0.iov_base = self.as_ptr().wrapping_add(count).cast();
        self.0.iov_len -= count;
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.0.iov_base, self.0.iov_len)
    }
}

/// Our own memory at an alignment that direct I/O takes; zeroed at first.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned, and reached through `&self` and `&mut self` only.
unsafe impl Send for AlignedBuf {}

// SAFETY: as for Send.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes, at least one, at an address that is a multiple of `alignment`, a power of two.
    /// `None` when such memory cannot be.
    pub fn new(len: usize, alignment: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len.max(1), alignment).ok()?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            handle_alloc_error(layout)
        };
        Some(AlignedBuf { ptr, layout })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is owned, initialised and as long as the layout says; the borrow is of self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.layout.size()) }
    }

    /// The bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.layout.size()) }
    }

    /// All of it as a request's buffer.
    ///
    /// # Safety
    ///
    /// As [`IoBuf::new`]: keep `self`, and leave its slices alone, until the request has completed.
    pub unsafe fn io_buf(&mut self) -> IoBuf {
        // SAFETY: the memory is mapped and writable as long as self is; the caller sees to the rest.
        unsafe { IoBuf::new(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({:p}+{:#x})", self.ptr, self.layout.size())
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}
