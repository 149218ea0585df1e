//! Guest memory: RAM, allocated, mapped into the VM, and kept mapped for as long as the VM lives; and what the guest finds
//! beside it ([`MemorySlots`]).

mod host;
mod slots;
mod window;

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use hypervisor::{MemorySlot, Vm, VmError};
use thiserror::Error;
use vm_allocator::AllocatorError;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::config::MemoryConfig;

pub use host::{HostMemory, merge};
pub use slots::MemorySlots;
pub use window::HighWindows;

/// What can go wrong with guest RAM.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host has no such memory to give.
    #[error("creating {size} bytes of {kind} memory")]
    Create {
        /// Bytes wanted.
        size: u64,
        /// `anonymous`, `shared` or `huge-page`.
        kind: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Mapping it failed.
    #[error("mapping {size} bytes of guest memory")]
    Map {
        /// Bytes.
        size: u64,
        /// What stood in the way.
        #[source]
        source: MmapRegionError,
    },
    /// The host has set too few huge pages aside.
    #[error(
        "--memory: hugepages=on needs {} free huge pages of 2 MiB (see /proc/meminfo, and set vm.nr_hugepages)",
        size >> 21
    )]
    HugePages {
        /// Bytes wanted.
        size: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Regions do not fit together.
    #[error("arranging guest memory: {0}")]
    Arrange(String),
    /// KVM refused a slot.
    #[error("giving guest memory to the VM")]
    Slot(#[source] VmError),
    /// No address or slot is left.
    #[error("finding room for memory beside RAM")]
    Room(#[source] AllocatorError),
    /// The guest's addresses end where its RAM does.
    #[error("the guest has no addresses above its RAM for {0} bytes more")]
    NoRoom(u64),
}

/// Memory of one VM.
pub struct MemoryManager {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ram: GuestMemoryMmap,
}

impl MemoryManager {
    /// Allocates RAM of `config.size` bytes, around the hole below 4 GiB.
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let host = HostMemory::new(config, config.size)?;
        let mut regions = Vec::new();
        let mut offset = 0u64;
        for (address, size) in arch::layout::ram_regions(config.size) {
            let region = GuestRegionMmap::new(host.map(offset, size)?, address);
            regions.push(region.ok_or_else(|| {
                MemoryError::Arrange(format!("a region at {:#x} wraps", address.0))
            })?);
            offset += size;
        }
        let ram = GuestMemoryMmap::from_regions(regions)
            .map_err(|e| MemoryError::Arrange(e.to_string()))?;
        Ok(Self {
            memory: GuestMemoryAtomic::new(ram.clone()),
            ram,
        })
    }

    /// All that devices reach: RAM, and what comes beside it.
    pub fn memory(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.memory
    }

    /// The RAM that the guest starts with.
    pub fn ram(&self) -> &GuestMemoryMmap {
        &self.ram
    }

    /// Gives each region of RAM to `vm` as a slot of its own, of the `slot_count` that it can have. What comes beside RAM gets the
    /// others, and addresses in `window`. The caller keeps this manager until the VM and its vCPUs are gone.
    ///
    /// # Errors
    /// [`MemoryError::Slot`].
    #[allow(unsafe_code)]
    pub fn map_into(
        &self,
        vm: &Arc<dyn Vm>,
        slot_count: u32,
        window: Option<&RangeInclusive<u64>>,
    ) -> Result<Arc<MemorySlots>, MemoryError> {
        let mut next = 0;
        for region in self.ram.iter() {
            let slot = MemorySlot {
                slot: next,
                guest_address: region.start_addr().0,
                size: region.len(),
                host_address: region.as_ptr() as u64,
                read_only: false,
                log_dirty: false,
            };
            // SAFETY: the region is our own mapping, and `Machine` drops its vCPUs and VM
            // before this manager, which owns the mapping.
            unsafe { vm.set_memory_slot(&slot) }.map_err(MemoryError::Slot)?;
            next += 1;
        }
        let slots = MemorySlots::new(vm.clone(), self.memory.clone(), window, next, slot_count)?;
        Ok(Arc::new(slots))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    #[test]
    fn ram_goes_around_the_hole() {
        let config = MemoryConfig {
            size: 4 << 30,
            ..MemoryConfig::default()
        };
        let manager = MemoryManager::new(&config).unwrap();
        let memory = manager.memory().memory();
        let ranges: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        assert!(memory.read_obj::<u8>(GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn shared_regions_lie_one_after_another_in_one_file() {
        let config = MemoryConfig {
            size: 5 << 30,
            shared: true,
            ..MemoryConfig::default()
        };
        let manager = MemoryManager::new(&config).unwrap();
        let memory = manager.memory().memory();
        let offsets: Vec<_> = memory
            .iter()
            .map(|r| r.file_offset().unwrap().start())
            .collect();
        assert_eq!(offsets, [0, 3 << 30]);
    }
}
