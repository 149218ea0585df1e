//! Ends a vCPU's run from another thread (KVM API, `immediate_exit` of `struct kvm_run`).

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::vcpu::Kick;

const PAGE: usize = 4096;

/// A mapping of its own of the first page of a vCPU's `struct kvm_run`. It keeps the kernel's vCPU
/// (and with it the VM) alive until it is dropped.
pub(super) struct KvmKick {
    page: NonNull<u8>,
}

// SAFETY: the page is only reached through the atomic of `immediate_exit()`.
unsafe impl Send for KvmKick {}
// SAFETY: as above.
unsafe impl Sync for KvmKick {}

impl KvmKick {
    /// Maps the page once more.
    pub(super) fn new(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let address = unsafe {
            libc::mmap(
                null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        match NonNull::new(address.cast()) {
            Some(page) => Ok(Self { page }),
            None => Err(io::Error::other("the kernel mapped the page at address 0")),
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(kvm_bindings::kvm_run, immediate_exit);
        // SAFETY: the byte lies in our mapping, which lives as long as `self`; the kernel only
        // reads it, and this process writes it only here, atomically.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset)) }
    }
}

impl Kick for KvmKick {
    fn set(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    fn clear(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Drop for KvmKick {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe {
            libc::munmap(self.page.as_ptr().cast(), PAGE);
        }
    }
}
