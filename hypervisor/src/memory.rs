//! What the back end needs of guest RAM: bounded copies at guest-physical addresses.

use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::fallback::compare_exchange_16;

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
    /// If the 16 bytes at `gpa`, a multiple of 16, are `current`, replaces them by `new`, in one step
    /// for the guest's vCPUs. Gives whether it did.
    fn compare_exchange(&self, gpa: u64, current: u128, new: u128) -> Result<bool, RamError>;
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

    #[allow(unsafe_code)]
    fn compare_exchange(&self, gpa: u64, current: u128, new: u128) -> Result<bool, RamError> {
        let error = || RamError { gpa, len: 16 };
        let memory = self.memory();
        let slice = memory
            .get_slice(GuestAddress(gpa), 16)
            .map_err(|_| error())?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: 16 bytes of guest RAM that `memory` keeps mapped.
        let done = unsafe { compare_exchange_16(guard.as_ptr(), current, new) };
        slice.bitmap().mark_dirty(0, 16);
        done.ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;
    use vm_memory::bitmap::AtomicBitmap;

    use super::*;

    fn ram() -> Arc<GuestMemoryMmap<AtomicBitmap>> {
        let ranges = [(GuestAddress(0x1000), 0x2000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap_or_default())
    }

    #[test]
    fn exchanges_only_what_matches_and_marks_it_dirty() {
        let ram = ram();
        assert!(matches!(ram.compare_exchange(0x2010, 1, 2), Ok(false)));
        assert!(matches!(ram.compare_exchange(0x2010, 0, 2), Ok(true)));
        let mut bytes = [0; 32];
        assert!(GuestRam::read(&ram, 0x2000, &mut bytes).is_ok());
        assert_eq!(bytes[16..], 2_u128.to_le_bytes());
        let region = ram.get_slice(GuestAddress(0x1000), 0x2000).ok();
        let dirty = |at| region.as_ref().is_some_and(|r| r.bitmap().dirty_at(at));
        assert_eq!((dirty(0), dirty(0x1010)), (false, true));
    }

    #[test]
    fn names_what_is_not_ram() {
        let ram = ram();
        for gpa in [0x2ff8, 0x3000, 0x2008] {
            let error = ram.compare_exchange(gpa, 0, 1).err().map(|e| e.to_string());
            let wanted = format!("16 bytes at guest-physical {gpa:#x} are not all RAM");
            assert_eq!(error, Some(wanted));
        }
    }
}
