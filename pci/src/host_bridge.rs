//! The host bridge in slot 0: 8086:0d57, no BARs, no capabilities.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bar::Bars;
use crate::configuration::{ConfigurationBuilder, ConfigurationSpace, Identity};
use crate::device::PciDevice;
use crate::state::{ConfigurationState, StateError};

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
    /// What to save.
    #[must_use]
    pub fn save(&self) -> ConfigurationState {
        self.config().save()
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// The state is not of a host bridge.
    pub fn restore(&self, state: &ConfigurationState) -> Result<(), StateError> {
        self.config().restore(state)
    }

    fn config(&self) -> MutexGuard<'_, ConfigurationSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    fn bars(&self) -> Bars {
        Bars::default()
    }

    fn read_bar(&self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header() {
        let bridge = HostBridge::default();
        let mut bytes = [0; 64];
        for (dword, bytes) in (0..).zip(bytes.chunks_exact_mut(4)) {
            bridge.read_config(dword * 4, bytes);
        }
        let mut expected = [0; 64];
        expected[..4].copy_from_slice(&[0x86, 0x80, 0x57, 0x0d]);
        expected[0xb] = 6;
        assert_eq!(bytes, expected);
        assert_eq!(bridge.bars(), [None; 6]);
    }

    #[test]
    fn state_survives() {
        let bridge = HostBridge::default();
        bridge.write_config(0x3c, &[9]);
        let other = HostBridge::default();
        other.restore(&bridge.save()).unwrap();
        let mut line = [0];
        other.read_config(0x3c, &mut line);
        assert_eq!(line, [9]);
    }
}
