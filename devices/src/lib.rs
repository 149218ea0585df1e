//! The small platform devices: serial, CMOS, i8042, IOAPIC, ACPI ports, debug ports, pvpanic.
//!
//! Each is a device on a bus of `vm-device` and knows neither the hypervisor nor the other devices: interrupts,
//! resets and output leave through what its constructor is given.
//!
//! ```
//! use std::io;
//! use std::sync::Arc;
//! use devices::serial::Serial;
//! use vm_device::{BusDeviceMut, Trigger};
//!
//! let nothing: Arc<dyn Trigger> = Arc::new(|| -> io::Result<()> { Ok(()) });
//! let mut com1 = Serial::new(nothing.clone(), Box::new(io::stdout()), nothing);
//! com1.write(0, b"!"); // the guest sends a byte
//! assert_eq!(com1.queue_input(b"k"), 1); // the user types one
//! let mut byte = [0];
//! com1.read(0, &mut byte);
//! assert_eq!(&byte, b"k");
//! ```

pub mod acpi;
pub mod cmos;
pub mod debug_port;
pub mod firmware_debug;
pub mod i8042;
pub mod ioapic;
pub mod pvpanic;
pub mod serial;

#[cfg(test)]
mod test_support;

/// Fills `data` from byte-wide registers, as the ISA bus splits a wide access. A register past the last is
/// whatever `read` says of it.
fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (index, byte) in (0..).zip(data) {
        *byte = read(offset.saturating_add(index));
    }
}

/// Spreads `data` over byte-wide registers, as the ISA bus splits a wide access.
fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (index, &byte) in (0..).zip(data) {
        write(offset.saturating_add(index), byte);
    }
}

/// Fills `data` from the little-endian bytes of a register, starting at its byte `from`; zeroes past its end.
fn read_slice(register: &[u8], from: usize, data: &mut [u8]) {
    let bytes = register
        .iter()
        .skip(from)
        .copied()
        .chain(std::iter::repeat(0));
    for (to, byte) in data.iter_mut().zip(bytes) {
        *to = byte;
    }
}
