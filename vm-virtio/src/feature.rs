//! Feature bits that are not of one device type (virtio 1.2 §6), as masks of the 64-bit feature word.

use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The driver may point to a table of descriptors elsewhere in memory (§2.7.5.3).
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Both sides say at which index they want to be notified (§2.7.7.1, §2.7.8.1).
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// The device is not a legacy one. Every device offers it, every driver must accept it.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// The addresses that the driver gives are translated by an IOMMU. Where it is offered it must be accepted.
pub const ACCESS_PLATFORM: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM;
/// Packed rings (§2.8), which this crate does not serve: no device built on it may offer them.
pub const RING_PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;

/// What [`DeviceQueue`](crate::DeviceQueue) can do: a device whose queues are served by it offers all of these.
pub const RING_FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;
