//! Guest memory as a back end is told of it: regions with a file each, and where the rings are in them.
//!
//! The protocol gives each region two addresses: the guest's, and the front end's own, which the back end uses for nothing but to find
//! rings again. Both are the guest's here: our own addresses are nobody's business.

use std::os::fd::AsRawFd;

use vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory::{GuestAddressSpace, GuestMemory, GuestRegionMmap};
use vm_virtio::{DeviceMemory, QueueV1};

use super::VhostUserError;

/// Memory of devices whose regions are mappings. A bound, and no more.
pub trait MappedMemory:
    DeviceMemory<M: GuestMemory<PhysicalMemory = GuestMemoryMmap<Self::Pages>>>
{
    /// What notes the pages that were written.
    type Pages: Bitmap;
}

impl<T, B: Bitmap> MappedMemory for T
where
    T: DeviceMemory,
    T::M: GuestMemory<PhysicalMemory = GuestMemoryMmap<B>>,
{
    type Pages = B;
}

/// The regions that another process can have.
fn shared<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
) -> impl Iterator<Item = (&GuestRegionMmap<B>, VhostUserMemoryRegionInfo)> {
    memory.iter().filter_map(|region| {
        let file = region.file_offset()?;
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let address = region.start_addr().raw_value();
        shared.then(|| {
            let info = VhostUserMemoryRegionInfo {
                guest_phys_addr: address,
                memory_size: region.len(),
                userspace_addr: address,
                mmap_offset: file.start(),
                mmap_handle: file.file().as_raw_fd(),
            };
            (region, info)
        })
    })
}

/// What the back end is told of `memory`. The descriptors are those of its regions.
pub(super) fn regions<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
) -> Result<Vec<VhostUserMemoryRegionInfo>, VhostUserError> {
    let regions: Vec<_> = shared(memory).map(|(_, info)| info).collect();
    match regions.len() {
        0 => Err(VhostUserError::Memory("none of it is shared")),
        1..=MAX_ATTACHED_FD_ENTRIES => Ok(regions),
        _ => Err(VhostUserError::Memory("it has too many regions")),
    }
}

/// Where queue number `index` is, whose rings are in memory as its `state` says. With `event_idx` they have the event fields.
pub(super) fn rings<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    index: u16,
    state: &QueueV1,
    event_idx: bool,
) -> Result<VringConfigData, VhostUserError> {
    let entries = u64::from(state.size);
    let event = if event_idx { 2 } else { 0 };
    let all = [
        (state.descriptors, 16 * entries),
        (state.available, 4 + 2 * entries + event),
        (state.used, 4 + 8 * entries + event),
    ];
    let in_one_piece = all.iter().all(|&(address, len)| {
        shared(memory).any(|(region, _)| {
            region
                .to_region_addr(GuestAddress(address))
                .is_some_and(|offset| region.len() - offset.raw_value() >= len)
        })
    });
    if !in_one_piece {
        return Err(VhostUserError::Ring { queue: index });
    }
    Ok(VringConfigData {
        queue_max_size: state.size,
        queue_size: state.size,
        flags: 0,
        desc_table_addr: state.descriptors,
        used_ring_addr: state.used,
        avail_ring_addr: state.available,
        log_addr: None,
    })
}

/// Guest memory behind `memory`, unless it is translated on the way.
pub(super) fn physical<M: MappedMemory>(
    memory: &<M as GuestAddressSpace>::M,
) -> Result<&GuestMemoryMmap<M::Pages>, VhostUserError> {
    memory
        .physical_memory()
        .ok_or(VhostUserError::Memory("it is behind an IOMMU"))
}
