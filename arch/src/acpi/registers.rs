//! The memory-mapped registers between the DSDT's methods and the VMM's hotplug devices. They are of this
//! project's own design; the guest knows them by the DSDT alone. All are little-endian; the methods access
//! each with its own width. Bits that are not named read as zero and ignore writes.

/// The generic event device.
///
/// | offset | bytes | access | what |
/// |---|---|---|---|
/// | 0 | 1 | read | events since the last read; the read clears them |
pub mod ged {
    /// Bytes of the block.
    pub const SIZE: u64 = 4;
    /// A CPU came or shall go: the guest looks through [`super::cpu`].
    pub const CPU: u8 = 1;
    /// Memory came: the guest looks through [`super::memory`].
    pub const MEMORY: u8 = 2;
    /// A PCI device came or shall go: the guest looks through [`super::pci`].
    pub const PCI: u8 = 4;
    /// The power button was pressed.
    pub const POWER_BUTTON: u8 = 8;
}

/// CPU hotplug.
///
/// | offset | bytes | access | what |
/// |---|---|---|---|
/// | 0 | 4 | read, write | place in `AcpiConfig::cpus` of the CPU that the flags are about |
/// | 4 | 1 | read, write | flags of that CPU |
pub mod cpu {
    /// Bytes of the block.
    pub const SIZE: u64 = 8;
    /// Selector, 4 bytes.
    pub const SELECTOR: u64 = 0;
    /// Flags, 1 byte.
    pub const FLAGS: u64 = 4;
    /// Read: the CPU is there.
    pub const ENABLED: u8 = 1;
    /// Read: the CPU came and the guest has not looked yet. Writing 1 clears it.
    pub const INSERTING: u8 = 2;
    /// Read: the CPU shall go and the guest has not looked yet. Writing 1 clears it.
    pub const REMOVING: u8 = 4;
    /// Writing 1: the guest has let the CPU go. Reads as 0.
    pub const EJECT: u8 = 8;
}

/// Memory hotplug.
///
/// | offset | bytes | access | what |
/// |---|---|---|---|
/// | 0 | 4 | read, write | slot that the other registers are about |
/// | 4 | 1 | read, write | flags of that slot |
/// | 8 | 8 | read | guest-physical address of the slot's memory |
/// | 16 | 8 | read | bytes of the slot's memory |
pub mod memory {
    /// Bytes of the block.
    pub const SIZE: u64 = 24;
    /// Selector, 4 bytes.
    pub const SELECTOR: u64 = 0;
    /// Flags, 1 byte.
    pub const FLAGS: u64 = 4;
    /// Address, 8 bytes; the guest may read it as two halves.
    pub const BASE: u64 = 8;
    /// Length in bytes, 8 bytes; the guest may read it as two halves.
    pub const LENGTH: u64 = 16;
    /// Read: the slot holds memory.
    pub const ENABLED: u8 = 1;
    /// Read: the memory came and the guest has not looked yet. Writing 1 clears it.
    pub const INSERTING: u8 = 2;
}

/// PCI hotplug. In each mask, bit n is slot n of the selected segment's root bus.
///
/// | offset | bytes | access | what |
/// |---|---|---|---|
/// | 0 | 4 | read, write | segment group number that the masks are about |
/// | 4 | 4 | read | slots filled since the last read; the read clears them |
/// | 8 | 4 | read | slots that shall be emptied, since the last read; the read clears them |
/// | 12 | 4 | write | slots that the guest has let go |
pub mod pci {
    /// Bytes of the block.
    pub const SIZE: u64 = 16;
    /// Segment selector, 4 bytes.
    pub const SEGMENT: u64 = 0;
    /// Filled slots, 4 bytes.
    pub const INSERTED: u64 = 4;
    /// Slots to empty, 4 bytes.
    pub const REMOVING: u64 = 8;
    /// Slots let go, 4 bytes.
    pub const EJECT: u64 = 12;
}
