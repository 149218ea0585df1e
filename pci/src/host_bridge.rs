//! The host bridge in slot 0: 8086:0d57, no BARs, no capabilities.

use std::sync::{Mutex, PoisonError};

use crate::bar::Bars;
use crate::configuration::{ConfigurationBuilder, ConfigurationSpace, Identity};
use crate::device::PciDevice;

/// Vendor id.
pub const HOST_BRIDGE_VENDOR: u16 = 0x8086;
/// Device id.
pub const HOST_BRIDGE_DEVICE: u16 = 0x0d57;
/// Bridge, host.
const CLASS: u32 = 0x06_00_00;

/// The host bridge.
pub struct HostBridge {
    config: Mutex<ConfigurationSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        let identity = Identity {
            vendor: HOST_BRIDGE_VENDOR,
            device: HOST_BRIDGE_DEVICE,
            class: CLASS,
            ..Identity::default()
        };
        Self {
            config: Mutex::new(ConfigurationBuilder::new(identity).build()),
        }
    }
}

impl HostBridge {
    /// Its configuration space, to save and restore.
    pub fn config(&self) -> &Mutex<ConfigurationSpace> {
        &self.config
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.write(offset, data);
    }

    fn bars(&self) -> Bars {
        Bars::default()
    }

    fn read_bar(&self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}
