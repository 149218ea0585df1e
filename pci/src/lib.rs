//! PCI: configuration space with BARs, MSI and MSI-X, the bus that devices sit on, and the ways a guest reaches it. Knows
//! no hypervisor: interrupts leave through a [`MsiSink`], addresses through the buses of `vm-device`.
//!
//! A device is a [`PciDevice`]: its [`ConfigurationSpace`] and what lies behind its BARs. On a [`PciBus`] its BARs get
//! addresses, and move when the guest says so.

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
