//! The two ways to configuration space: ports 0xcf8 to 0xcff (PCI Local Bus 3.0 §3.2.2.3.2) and memory (ECAM, PCI
//! Express Base 6.0 §7.2.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vm_device::BusDevice;
use vm_migration::Schema;

use crate::bus::PciBus;

/// First port.
pub const CONFIG_PORT: u64 = 0xcf8;
/// Ports: four of the address register, four of the data window.
pub const CONFIG_PORTS: u64 = 8;
/// Bytes of memory for the configuration space of a segment: 256 buses of 32 slots of 8 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 256 << 20;

/// Address register: the data window is open.
const ENABLE: u32 = 1 << 31;
/// Address register: bits that exist. 23:16 bus, 15:11 device, 10:8 function, 7:2 dword.
const ADDRESS_BITS: u32 = 0x80ff_fffc;
/// Where the data window starts.
const DATA: u64 = 4;

/// The address register, saved.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PciConfigIoState {
    /// As the guest reads it.
    pub address: u32,
}

impl Schema for PciConfigIoState {
    const KIND: &'static str = "pci-config-io";
    const VERSION: u32 = 1;
}

/// Ports 0xcf8 to 0xcff, for the bus of segment 0. The address register may be written in parts; an access that reaches
/// from it into the data window, or past that, reads as all ones and writes nothing.
pub struct PciConfigIo {
    bus: Arc<PciBus>,
    address: AtomicU32,
}

impl PciConfigIo {
    /// The ports of `bus`, with the data window closed.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self {
            bus,
            address: AtomicU32::new(0),
        }
    }

    /// What to save.
    pub fn save(&self) -> PciConfigIoState {
        PciConfigIoState {
            address: self.address.load(Ordering::Relaxed),
        }
    }

    /// Becomes what was saved.
    pub fn restore(&self, state: PciConfigIoState) {
        self.address
            .store(state.address & ADDRESS_BITS, Ordering::Relaxed);
    }

    /// Slot, function and dword that the data window shows, if it shows any.
    fn window(&self) -> Option<(u8, u8, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let [dword, place, bus, _] = address.to_le_bytes();
        (address & ENABLE != 0 && bus == 0).then_some((place >> 3, place & 7, u16::from(dword)))
    }
}

/// Where an access lies.
enum Part {
    Address(usize),
    Data(u16),
}

fn part(offset: u64, len: usize) -> Option<Part> {
    let end = offset.checked_add(len as u64)?;
    if end <= DATA {
        Some(Part::Address(offset as usize))
    } else if offset >= DATA && end <= CONFIG_PORTS {
        Some(Part::Data((offset - DATA) as u16))
    } else {
        None
    }
}

impl BusDevice for PciConfigIo {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match part(offset, data.len()) {
            Some(Part::Address(at)) => {
                let bytes = self.address.load(Ordering::Relaxed).to_le_bytes();
                for (byte, held) in data.iter_mut().zip(bytes.into_iter().skip(at)) {
                    *byte = held;
                }
            }
            Some(Part::Data(at)) => {
                if let Some((slot, function, dword)) = self.window() {
                    self.bus.read_config(slot, function, dword + at, data);
                }
            }
            None => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match part(offset, data.len()) {
            Some(Part::Address(at)) => {
                let mut bytes = self.address.load(Ordering::Relaxed).to_le_bytes();
                for (held, byte) in bytes.iter_mut().skip(at).zip(data) {
                    *held = *byte;
                }
                let address = u32::from_le_bytes(bytes) & ADDRESS_BITS;
                self.address.store(address, Ordering::Relaxed);
            }
            Some(Part::Data(at)) => {
                if let Some((slot, function, dword)) = self.window() {
                    self.bus.write_config(slot, function, dword + at, data);
                }
            }
            None => {}
        }
    }
}

/// The memory of a segment's configuration space, [`ECAM_SIZE`] bytes. Bus 0 is the only one there is.
pub struct PciConfigMmio {
    bus: Arc<PciBus>,
}

impl PciConfigMmio {
    /// The configuration space of `bus`.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }
}

/// Slot, function and register of an offset: bits 27:20 bus, 19:15 device, 14:12 function, 11:0 register.
fn split(offset: u64) -> Option<(u8, u8, u16)> {
    let place = u8::try_from(offset >> 12).ok()?;
    Some((place >> 3, place & 7, (offset & 0xfff) as u16))
}

impl BusDevice for PciConfigMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match split(offset) {
            Some((slot, function, register)) => {
                self.bus.read_config(slot, function, register, data);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, function, register)) = split(offset) {
            self.bus.write_config(slot, function, register, data);
        }
    }
}

#[cfg(test)]
mod tests;
