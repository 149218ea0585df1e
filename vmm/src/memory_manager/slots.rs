//! Memory that the guest finds beside its RAM: an address, a slot of the hypervisor and a region of guest memory each, for as long
//! as a [`MappedRegion`] lives.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::{MemorySlot, Vm};
use vm_allocator::{AddressAllocator, IdAllocator};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use super::MemoryError;

/// Gives out addresses above RAM and slots, and keeps guest memory in step with them.
pub struct MemorySlots {
    vm: Arc<dyn Vm>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    free: Mutex<Free>,
}

struct Free {
    /// None where there is no room above RAM.
    addresses: Option<AddressAllocator>,
    slots: IdAllocator,
}

impl MemorySlots {
    /// Of `vm`, whose RAM has the slots before `first_slot`. Regions lie in `window`, and come into `memory`.
    pub(super) fn new(
        vm: Arc<dyn Vm>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        window: Option<&RangeInclusive<u64>>,
        first_slot: u32,
        slot_count: u32,
    ) -> Result<Self, MemoryError> {
        let addresses = match window {
            // A window ends below 2^64, so its size is a number.
            Some(window) => Some(
                AddressAllocator::new(*window.start(), window.end() - window.start() + 1)
                    .map_err(MemoryError::Room)?,
            ),
            None => None,
        };
        Ok(Self {
            vm,
            memory,
            free: Mutex::new(Free {
                addresses,
                slots: IdAllocator::new(first_slot, slot_count.saturating_sub(1)),
            }),
        })
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `mapping` before the guest's eyes, at a multiple of `alignment`, which is a power of two. Devices reach it too.
    ///
    /// # Errors
    /// [`MemoryError::Room`], [`MemoryError::NoRoom`], [`MemoryError::Slot`], [`MemoryError::Arrange`]. Nothing is left behind.
    pub fn map(
        self: &Arc<Self>,
        mapping: MmapRegion,
        alignment: u64,
    ) -> Result<MappedRegion, MemoryError> {
        let size = mapping.size() as u64;
        let (address, slot) = self.allocate(size, alignment)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(address));
        let mapped = region
            .ok_or_else(|| MemoryError::Arrange(format!("a region at {address:#x} wraps")))
            .and_then(|region| self.insert(slot, Arc::new(region)));
        if mapped.is_err() {
            self.give_back(address, slot);
        }
        mapped
    }

    fn allocate(&self, size: u64, alignment: u64) -> Result<(u64, u32), MemoryError> {
        let mut free = self.free();
        let slot = free.slots.allocate().map_err(MemoryError::Room)?;
        let address = match &mut free.addresses {
            Some(addresses) => addresses
                .allocate(size, alignment)
                .map_err(MemoryError::Room),
            None => Err(MemoryError::NoRoom(size)),
        };
        if address.is_err() {
            // It was given out just now.
            let _ = free.slots.free(slot);
        }
        Ok((address?, slot))
    }

    fn give_back(&self, address: u64, slot: u32) {
        let mut free = self.free();
        // Both were given out by `allocate`.
        let _ = free.slots.free(slot);
        if let Some(addresses) = &mut free.addresses {
            let _ = addresses.free(address);
        }
    }

    #[allow(unsafe_code)]
    fn insert(
        self: &Arc<Self>,
        slot: u32,
        region: Arc<GuestRegionMmap>,
    ) -> Result<MappedRegion, MemoryError> {
        let memory_slot = MemorySlot {
            slot,
            guest_address: region.start_addr().0,
            size: region.len(),
            host_address: region.as_ptr() as u64,
            read_only: false,
            log_dirty: false,
        };
        // SAFETY: the region is a mapping of ours. `MappedRegion` keeps it until it has removed the slot.
        unsafe { self.vm.set_memory_slot(&memory_slot) }.map_err(MemoryError::Slot)?;
        let arranged = self.change(|memory| memory.insert_region(region.clone()));
        if let Err(e) = arranged {
            self.remove_slot(slot, region);
            return Err(e);
        }
        Ok(MappedRegion {
            slots: self.clone(),
            slot,
            region,
        })
    }

    /// Takes a slot from the VM, and then lets go of its memory. Whether the VM has it no more.
    fn remove_slot(&self, slot: u32, region: Arc<GuestRegionMmap>) -> bool {
        let removed = self.vm.remove_memory_slot(slot);
        if let Err(e) = &removed {
            log::error!("{}", crate::error_chain(e));
            // The guest may still reach it, so it stays for good.
            std::mem::forget(region);
        }
        removed.is_ok()
    }

    /// Replaces guest memory by what `change` makes of it.
    fn change<E: std::fmt::Display>(
        &self,
        change: impl FnOnce(&GuestMemoryMmap) -> Result<GuestMemoryMmap, E>,
    ) -> Result<(), MemoryError> {
        let guard = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.memory.memory());
        guard.replace(changed.map_err(|e| MemoryError::Arrange(e.to_string()))?);
        Ok(())
    }
}

/// Memory beside RAM, in the guest for as long as this lives.
pub struct MappedRegion {
    slots: Arc<MemorySlots>,
    slot: u32,
    region: Arc<GuestRegionMmap>,
}

impl MappedRegion {
    /// Its first guest-physical address.
    pub fn address(&self) -> u64 {
        self.region.start_addr().0
    }

    /// The region, as guest memory has it.
    pub fn region(&self) -> &Arc<GuestRegionMmap> {
        &self.region
    }
}

impl Drop for MappedRegion {
    fn drop(&mut self) {
        let (start, len) = (self.region.start_addr(), self.region.len());
        let removed = self
            .slots
            .change(|memory| memory.remove_region(start, len).map(|(left, _)| left));
        if let Err(e) = removed {
            log::error!("{}", crate::error_chain(&e));
        }
        if self.slots.remove_slot(self.slot, self.region.clone()) {
            self.slots.give_back(start.0, self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use hypervisor::Hypervisor;
    use hypervisor::kvm::Kvm;
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    const MIB: u64 = 1 << 20;
    const WINDOW: RangeInclusive<u64> = 4 << 30..=(5 << 30) - 1;

    fn memory() -> GuestMemoryAtomic<GuestMemoryMmap> {
        let ranges = [(GuestAddress(0), 1 << 20)];
        GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    /// None where tests are to do without KVM.
    fn slots(window: Option<&RangeInclusive<u64>>, count: u32) -> Option<Arc<MemorySlots>> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(_) if std::env::var_os("CH_TESTS_WITHOUT_KVM").is_some_and(|v| v == "1") => {
                return None;
            }
            Err(e) => panic!("this test makes a VM, and there is no KVM: {e}"),
        };
        let memory = memory();
        let vm = kvm.create_vm(Arc::new(memory.clone())).unwrap();
        let slots = MemorySlots::new(vm, memory, window, 1, count).unwrap();
        Some(Arc::new(slots))
    }

    fn mapping(size: u64) -> MmapRegion {
        MmapRegion::new(size as usize).unwrap()
    }

    #[test]
    fn regions_come_and_go() {
        let Some(slots) = slots(Some(&WINDOW), 4) else {
            return;
        };
        let first = slots.map(mapping(3 * MIB), 2 * MIB).unwrap();
        let second = slots.map(mapping(2 * MIB), 128 * MIB).unwrap();
        let third = slots.map(mapping(2 * MIB), 2 * MIB).unwrap();
        let at = |offset| (4 << 30) + offset;
        assert_eq!(first.address(), at(0));
        assert_eq!(second.address(), at(128 * MIB));
        assert_eq!(third.address(), at(4 * MIB));
        let reaches = |address: u64| {
            let memory = slots.memory.memory();
            memory.check_range(GuestAddress(address), 16)
        };
        assert!(reaches(at(0)) && reaches(at(4 * MIB)) && !reaches(at(3 * MIB)));
        let memory = slots.memory.memory();
        memory.write_obj(7u64, GuestAddress(at(0))).unwrap();
        assert_eq!(
            first
                .region()
                .get_slice(vm_memory::MemoryRegionAddress(0), 8)
                .unwrap()
                .read_obj::<u64>(0)
                .unwrap(),
            7
        );

        let full = slots.map(mapping(MIB), MIB).err().unwrap().to_string();
        assert!(full.starts_with("finding room"), "{full}");
        drop(first);
        assert!(!reaches(at(0)));
        // Who took the memory before still has it.
        assert_eq!(memory.read_obj::<u64>(GuestAddress(at(0))).unwrap(), 7);
        assert_eq!(slots.map(mapping(MIB), MIB).unwrap().address(), at(0));
    }

    #[test]
    fn too_large_is_refused_and_costs_nothing() {
        let Some(slots) = slots(Some(&WINDOW), 3) else {
            return;
        };
        for _ in 0..5 {
            assert!(slots.map(mapping(2 << 30), MIB).is_err());
            // The hypervisor refuses what is no whole page.
            assert!(slots.map(mapping(4097), 4096).is_err());
        }
        assert_eq!(
            slots.map(mapping(1 << 30), 1 << 30).unwrap().address(),
            4 << 30
        );
    }

    #[test]
    fn no_window_is_said_so() {
        let Some(slots) = slots(None, 3) else { return };
        let error = slots.map(mapping(MIB), MIB).err().unwrap().to_string();
        assert!(error.contains("above its RAM"), "{error}");
    }
}
