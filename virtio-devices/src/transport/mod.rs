//! What a virtio device sits behind: where its registers are, and how its notifications and interrupts travel.

pub mod pci;
