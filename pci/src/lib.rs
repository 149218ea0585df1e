//! PCI: configuration space with BARs, MSI and MSI-X, the bus that devices sit on, and the ways a guest reaches it. Knows
//! no hypervisor: interrupts leave through a [`MsiSink`], addresses through the buses of `vm-device`.
//!
//! A device is a [`PciDevice`]: its [`ConfigurationSpace`] and what lies behind its BARs. On a [`PciBus`] its BARs get
//! addresses, and move when the guest says so.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//!
//! use pci::{
//!     BarKind, Bars, ConfigurationBuilder, ConfigurationSpace, Identity, PciBus, PciConfigIo, PciDevice,
//!     Windows,
//! };
//! use vm_device::{Bus, BusDevice};
//!
//! /// Answers with the offset.
//! struct Echo(Mutex<ConfigurationSpace>);
//!
//! impl PciDevice for Echo {
//!     fn read_config(&self, offset: u16, data: &mut [u8]) {
//!         self.0.lock().unwrap().read(offset, data);
//!     }
//!     fn write_config(&self, offset: u16, data: &[u8]) {
//!         self.0.lock().unwrap().write(offset, data);
//!     }
//!     fn bars(&self) -> Bars {
//!         self.0.lock().unwrap().bars()
//!     }
//!     fn read_bar(&self, _bar: usize, offset: u64, data: &mut [u8]) {
//!         data.fill(offset as u8);
//!     }
//!     fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let identity = Identity { vendor: 0x1af4, device: 0x1041, class: 0x02_00_00, ..Identity::default() };
//! let mut config = ConfigurationBuilder::new(identity);
//! config.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000)?;
//! let echo = Arc::new(Echo(Mutex::new(config.build())));
//!
//! let (memory, ports) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
//! let windows = Windows { memory32: Some(0xc000_0000..=0xe7ff_ffff), ..Windows::default() };
//! let bus = Arc::new(PciBus::new(0, windows, memory.clone(), ports));
//! let slot = bus.add(None, echo)?;
//! assert_eq!(bus.bdf(slot).to_string(), "0000:00:01.0");
//!
//! // The guest looks for the device, and lets it answer in memory.
//! let config = PciConfigIo::new(bus);
//! let mut ids = [0; 4];
//! config.write(0, &0x8000_0800u32.to_le_bytes());
//! config.read(4, &mut ids);
//! assert_eq!(u32::from_le_bytes(ids), 0x1041_1af4);
//! config.write(0, &0x8000_0804u32.to_le_bytes());
//! config.write(4, &[2, 0]);
//! let mut byte = [0];
//! assert!(memory.read(0xc000_0017, &mut byte));
//! assert_eq!(byte, [0x17]);
//! # Ok(()) }
//! ```

mod access;
mod bar;
mod bus;
mod configuration;
mod device;
mod host_bridge;
mod msi;
mod msix;
pub mod registers;
mod state;
#[cfg(test)]
mod testing;
mod vectors;
mod windows;

pub use access::{
    CONFIG_PORT, CONFIG_PORTS, ECAM_SIZE, PciConfigIo, PciConfigIoState, PciConfigMmio,
};
pub use bar::{AddressSpace, BARS, Bar, BarKind, Bars};
pub use bus::{PciBus, PciBusError, SLOTS, Segments};
pub use configuration::{ConfigurationBuilder, ConfigurationError, ConfigurationSpace, Identity};
pub use device::{BarRegion, Bdf, PciDevice};
pub use host_bridge::{HOST_BRIDGE_DEVICE, HOST_BRIDGE_VENDOR, HostBridge};
pub use msi::{Msi, MsiError};
pub use msix::{MAX_MSIX_VECTORS, MsixError, MsixLayout, MsixTable, MsixVector, MsixVectorState};
pub use state::{ConfigurationState, StateError};
pub use vectors::{MsiMessage, MsiSink};
pub use windows::Windows;
