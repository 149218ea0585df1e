//! Offsets and bits of the type 0 header and of the MSI capabilities (PCI Local Bus 3.0 §6.1, §6.2, §6.7, §6.8).

/// Bytes of conventional configuration space.
pub const SIZE: usize = 256;
/// Bytes of a function's configuration space in the PCI Express form (PCI Express Base 6.0 §7.2).
pub const EXTENDED_SIZE: u16 = 4096;

/// Vendor id, 2 bytes.
pub const VENDOR: u16 = 0x00;
/// Device id, 2 bytes.
pub const DEVICE: u16 = 0x02;
/// Command, 2 bytes.
pub const COMMAND: u16 = 0x04;
/// Status, 2 bytes.
pub const STATUS: u16 = 0x06;
/// Revision, 1 byte; the three bytes of the class follow.
pub const REVISION: u16 = 0x08;
/// Cache line size, 1 byte.
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Latency timer, 1 byte.
pub const LATENCY_TIMER: u16 = 0x0d;
/// The first base address register.
pub const BAR0: u16 = 0x10;
/// Subsystem vendor id, 2 bytes.
pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
/// Subsystem id, 2 bytes.
pub const SUBSYSTEM: u16 = 0x2e;
/// Offset of the first capability, 1 byte.
pub const CAPABILITIES: u16 = 0x34;
/// Interrupt line, 1 byte, the guest's to use.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin, 1 byte: 1 is INTA#, 0 none.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Where the header ends and capabilities may lie.
pub const HEADER_END: u16 = 0x40;

/// Command: answers to ports.
pub const COMMAND_IO: u16 = 1;
/// Command: answers to memory.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: may reach memory by itself.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: reports parity errors.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// Command: reports system errors.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: does not assert its interrupt pin.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status: the function wants its interrupt pin asserted.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there are capabilities.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Status: error bits, cleared by writing 1.
pub const STATUS_ERRORS: u16 = 0xf900;

/// Capability id of MSI.
pub const CAPABILITY_MSI: u8 = 0x05;
/// Capability id of a vendor's own structure.
pub const CAPABILITY_VENDOR: u8 = 0x09;
/// Capability id of MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;

/// Offset of base address register `index`.
pub(crate) fn bar_register(index: usize) -> u16 {
    // No caller goes past 5.
    BAR0 + 4 * (index as u16 & 7)
}
