//! What the back end needs of guest RAM: bounded copies at guest-physical addresses.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

/// An access that does not lie wholly in guest RAM.
#[derive(Debug, Error)]
#[error("{len} bytes at guest-physical {gpa:#x} are not all RAM")]
pub struct RamError {
    /// First address of the access.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: usize,
}

/// Guest RAM as the instruction fallback sees it. Accesses are checked, never partial in effect
/// on the host, and may race with the guest.
pub trait GuestRam: Send + Sync {
    /// Copies guest RAM at `gpa` into `buf`.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), RamError>;
    /// Copies `buf` to guest RAM at `gpa`.
    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), RamError>;
}

impl<T> GuestRam for T
where
    T: GuestAddressSpace + Send + Sync,
    T::M: GuestMemoryBackend,
{
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), RamError> {
        let len = buf.len();
        self.memory()
            .read_slice(buf, GuestAddress(gpa))
            .map_err(|_| RamError { gpa, len })
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), RamError> {
        let len = buf.len();
        self.memory()
            .write_slice(buf, GuestAddress(gpa))
            .map_err(|_| RamError { gpa, len })
    }
}
