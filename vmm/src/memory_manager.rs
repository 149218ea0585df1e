//! Guest RAM: allocated, mapped into the VM, and kept mapped for as long as the VM lives.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use hypervisor::{MemorySlot, Vm, VmError};
use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use crate::config::MemoryConfig;

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
    #[error("mapping {size} bytes of guest memory at {address:#x}")]
    Map {
        /// Guest-physical address.
        address: u64,
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
}

/// Guest RAM of one VM.
pub struct MemoryManager {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl MemoryManager {
    /// Allocates RAM of `config.size` bytes, around the hole below 4 GiB.
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let file = if config.shared {
            Some(memfd(config)?)
        } else {
            None
        };
        let mut regions = Vec::new();
        let mut offset = 0u64;
        for (address, size) in arch::layout::ram_regions(config.size) {
            regions.push(region(config, file.as_ref(), offset, address, size)?);
            offset += size;
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .map_err(|e| MemoryError::Arrange(e.to_string()))?;
        Ok(Self {
            memory: GuestMemoryAtomic::new(memory),
        })
    }

    /// The memory, for devices and the loader.
    pub fn memory(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.memory
    }

    /// Gives each region to `vm` as a slot of its own. The caller keeps this manager until the VM
    /// and its vCPUs are gone.
    #[allow(unsafe_code)]
    pub fn map_into(&self, vm: &Arc<dyn Vm>) -> Result<(), MemoryError> {
        use vm_memory::GuestAddressSpace;
        let memory = self.memory.memory();
        for (slot, region) in (0u32..).zip(memory.iter()) {
            let slot = MemorySlot {
                slot,
                guest_address: region.start_addr().0,
                size: region.len(),
                host_address: region.as_ptr() as u64,
                read_only: false,
                log_dirty: false,
            };
            // SAFETY: the region is our own mapping, and `Machine` drops its vCPUs and VM
            // before this manager, which owns the mapping.
            unsafe { vm.set_memory_slot(&slot) }.map_err(MemoryError::Slot)?;
        }
        Ok(())
    }
}

/// An unnamed file of the whole size, of huge pages if the user wants them.
#[allow(unsafe_code)]
fn memfd(config: &MemoryConfig) -> Result<File, MemoryError> {
    let kind = if config.hugepages {
        "huge-page"
    } else {
        "shared"
    };
    let failed = |source| MemoryError::Create {
        size: config.size,
        kind,
        source,
    };
    let mut flags = libc::MFD_CLOEXEC;
    if config.hugepages {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    let name = CString::default();
    // SAFETY: the name is a valid C string, and the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(config.size).map_err(failed)?;
    Ok(file)
}

fn region(
    config: &MemoryConfig,
    file: Option<&File>,
    offset: u64,
    address: GuestAddress,
    size: u64,
) -> Result<GuestRegionMmap, MemoryError> {
    // Ordinary pages are found when the guest touches them. Huge pages are set aside at once: a
    // host that has too few says so here, and not by a signal when the guest touches one.
    let mut flags = if config.hugepages {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let length = usize::try_from(size).map_err(|_| {
        MemoryError::Arrange(format!("{size} bytes are more than this host addresses"))
    })?;
    let mut builder = MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(config.hugepages);
    match file {
        Some(file) => {
            let file = file.try_clone().map_err(|source| MemoryError::Create {
                size,
                kind: "shared",
                source,
            })?;
            builder = builder.with_file_offset(FileOffset::new(file, offset));
            flags |= libc::MAP_SHARED;
        }
        None => {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            if config.hugepages {
                flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
            }
        }
    }
    let mapping = builder
        .with_mmap_flags(flags)
        .build()
        .map_err(|source| match source {
            MmapRegionError::Mmap(source) if config.hugepages => {
                MemoryError::HugePages { size, source }
            }
            source => MemoryError::Map {
                address: address.0,
                size,
                source,
            },
        })?;
    if config.mergeable {
        merge(mapping.as_ptr(), length, size)?;
    }
    GuestRegionMmap::new(mapping, address)
        .ok_or_else(|| MemoryError::Arrange(format!("a region at {:#x} wraps", address.0)))
}

/// Lets the host merge equal pages (KSM).
#[allow(unsafe_code)]
fn merge(start: *mut u8, length: usize, size: u64) -> Result<(), MemoryError> {
    // SAFETY: the range is a mapping that the caller just made; the advice changes no content.
    if unsafe { libc::madvise(start.cast(), length, libc::MADV_MERGEABLE) } != 0 {
        return Err(MemoryError::Create {
            size,
            kind: "mergeable",
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddressSpace};

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
