//! pvpanic: by one register a guest tells that it panicked (QEMU's "PVPANIC DEVICE" specification), as a PCI function.
//!
//! The register is the first byte of BAR 0. It reads as the events that the host knows; a guest writes those that happened.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pci::{
    BarKind, Bars, ConfigurationBuilder, ConfigurationError, ConfigurationSpace,
    ConfigurationState, Identity, PciDevice, StateError,
};
use vm_device::Trigger;

/// Vendor id.
pub const VENDOR: u16 = 0x1b36;
/// Device id.
pub const DEVICE: u16 = 0x0011;
/// Event bit: the guest panicked.
pub const PANICKED: u8 = 1 << 0;
/// Event bit: it panicked and goes on by itself, in a kernel that was loaded for this.
pub const CRASH_LOADED: u8 = 1 << 1;

/// A base system peripheral of no particular kind.
const CLASS: u32 = 0x08_80_00;
/// The BAR of the register.
const BAR: usize = 0;
/// A page, so that nothing else shares it.
const BAR_SIZE: u64 = 0x1000;

/// The device on its bus.
pub struct Pvpanic {
    config: Mutex<ConfigurationSpace>,
    panicked: Arc<dyn Trigger>,
    crash_loaded: Arc<dyn Trigger>,
}

impl Pvpanic {
    /// Each trigger hears of one event, as often as the guest tells it.
    ///
    /// # Errors
    /// None that this device's one BAR could cause.
    pub fn new(
        panicked: Arc<dyn Trigger>,
        crash_loaded: Arc<dyn Trigger>,
    ) -> Result<Self, ConfigurationError> {
        let mut config = ConfigurationBuilder::new(Identity {
            vendor: VENDOR,
            device: DEVICE,
            revision: 1,
            class: CLASS,
            ..Identity::default()
        });
        let kind = BarKind::Memory32 {
            prefetchable: false,
        };
        config.bar(BAR, kind, BAR_SIZE)?;
        Ok(Self {
            config: Mutex::new(config.build()),
            panicked,
            crash_loaded,
        })
    }

    /// What to save.
    #[must_use]
    pub fn save(&self) -> ConfigurationState {
        self.config().save()
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// The state is of another device.
    pub fn restore(&self, state: &ConfigurationState) -> Result<(), StateError> {
        self.config().restore(state)
    }

    fn config(&self) -> MutexGuard<'_, ConfigurationSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciDevice for Pvpanic {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    fn bars(&self) -> Bars {
        self.config().bars()
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        crate::read_bytes(offset, data, |at| match (bar, at) {
            (BAR, 0) => PANICKED | CRASH_LOADED,
            _ => 0,
        });
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |at, events| {
            if (bar, at) != (BAR, 0) {
                return;
            }
            for (event, trigger) in [
                (PANICKED, &self.panicked),
                (CRASH_LOADED, &self.crash_loaded),
            ] {
                if events & event != 0
                    && let Err(error) = trigger.trigger()
                {
                    log::debug!("pvpanic: telling of event {event:#x}: {error}");
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{Counter, hostile};
    use pci::BarRegion;

    fn device() -> (Arc<Pvpanic>, Arc<Counter>, Arc<Counter>) {
        let (panicked, loaded) = (Counter::new(), Counter::new());
        let device = Pvpanic::new(panicked.clone(), loaded.clone()).unwrap();
        (Arc::new(device), panicked, loaded)
    }

    #[test]
    fn a_guest_finds_it() {
        let (device, ..) = device();
        let dword = |offset| {
            let mut bytes = [0; 4];
            device.read_config(offset, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        assert_eq!(dword(0), 0x0011_1b36);
        assert_eq!(dword(8), 0x0880_0001);
        device.write_config(0x10, &[0xff; 4]);
        assert_eq!(dword(0x10), 0xffff_f000);
    }

    #[test]
    fn events_come_to_their_triggers_and_no_others_do() {
        let (device, panicked, loaded) = device();
        let mut events = [0xff; 2];
        device.read_bar(0, 0, &mut events);
        assert_eq!(events, [3, 0]);
        for (written, expected) in [
            (&[1u8][..], (1, 0)),
            (&[2], (0, 1)),
            (&[3], (1, 1)),
            (&[0], (0, 0)),
            (&[0xfc, 0xff], (0, 0)),
            (&[1, 0, 0, 0], (1, 0)),
        ] {
            device.write_bar(0, 0, written);
            assert_eq!((panicked.take(), loaded.take()), expected, "{written:?}");
        }
        device.write_bar(0, 1, &[3]);
        device.write_bar(1, 0, &[3]);
        assert_eq!((panicked.take(), loaded.take()), (0, 0));
    }

    #[test]
    fn survives_any_access() {
        hostile(&BarRegion::new(device().0, 0), BAR_SIZE);
    }

    #[test]
    fn state_survives() {
        let (before, ..) = device();
        before.write_config(0x10, &[0, 0, 0, 0xe0]);
        before.write_config(4, &[2, 0]);
        let (after, ..) = device();
        after.restore(&before.save()).unwrap();
        assert_eq!(after.bars(), before.bars());
    }
}
