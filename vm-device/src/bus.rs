//! A bus: which device answers at which address.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

use crate::BusDevice;

/// What can go wrong in arranging devices on a bus.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum BusError {
    /// A range of no bytes, or one that wraps.
    #[error("{size:#x} bytes at {base:#x} are no range")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Another device is there.
    #[error("{size:#x} bytes at {base:#x} overlap a device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
        /// First address of the device that is there.
        other: u64,
    },
    /// No device starts there.
    #[error("no device starts at {0:#x}")]
    Absent(u64),
}

struct Entry {
    /// Last address of the range.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// A port or memory bus. Devices come and go while vCPUs use it.
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use vm_device::{Bus, BusDeviceMut};
///
/// struct Latch(u8);
/// impl BusDeviceMut for Latch {
///     fn read(&mut self, _offset: u64, data: &mut [u8]) { data.fill(self.0) }
///     fn write(&mut self, _offset: u64, data: &[u8]) { self.0 = data[0] }
/// }
///
/// let bus = Bus::default();
/// bus.insert(0x80, 1, Arc::new(Mutex::new(Latch(0))))?;
/// assert!(bus.write(0x80, &[7]));
/// let mut byte = [0];
/// assert!(bus.read(0x80, &mut byte));
/// assert_eq!(byte, [7]);
/// assert!(!bus.read(0x81, &mut byte));
/// # Ok::<(), vm_device::BusError>(())
/// ```
#[derive(Default)]
pub struct Bus {
    devices: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// Puts `device` at `base`, `size` bytes long.
    ///
    /// # Errors
    /// A range that is empty, wraps, or overlaps another device's.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = size
            .checked_sub(1)
            .and_then(|more| base.checked_add(more))
            .ok_or(BusError::Range { base, size })?;
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, entry)) = devices.range(..=last).next_back()
            && entry.last >= base
        {
            return Err(BusError::Overlap { base, size, other });
        }
        devices.insert(base, Entry { last, device });
        Ok(())
    }

    /// Takes away the device that starts at `base`.
    ///
    /// # Errors
    /// [`BusError::Absent`].
    pub fn remove(&self, base: u64) -> Result<Arc<dyn BusDevice>, BusError> {
        self.devices
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .map(|entry| entry.device)
            .ok_or(BusError::Absent(base))
    }

    /// The device whose range holds all of `address..address + len`, and the offset in it. The lock
    /// is not held while the device works: it may rearrange the bus.
    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = devices.range(..=address).next_back()?;
        (entry.last >= last).then(|| (address - base, entry.device.clone()))
    }

    /// Lets the device at `address` fill `data`. False, and `data` untouched, where there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Gives `data` to the device at `address`. False where there is none.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BusDeviceMut;
    use std::sync::Mutex;

    /// Answers with the offset of the access.
    struct Offsets;

    impl BusDeviceMut for Offsets {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, _: u64, _: &[u8]) {}
    }

    fn device() -> Arc<dyn BusDevice> {
        Arc::new(Mutex::new(Offsets))
    }

    #[test]
    fn overlaps_are_refused_on_every_side() {
        let bus = Bus::default();
        bus.insert(0x100, 0x10, device()).unwrap();
        for (base, size) in [
            (0x100, 0x10),
            (0xff, 2),
            (0x10f, 1),
            (0x108, 1),
            (0, 0x1000),
        ] {
            let error = bus.insert(base, size, device()).unwrap_err();
            assert_eq!(
                error,
                BusError::Overlap {
                    base,
                    size,
                    other: 0x100
                }
            );
        }
        bus.insert(0xff, 1, device()).unwrap();
        bus.insert(0x110, 1, device()).unwrap();
    }

    #[test]
    fn ranges_that_are_none() {
        let bus = Bus::default();
        assert!(matches!(
            bus.insert(5, 0, device()),
            Err(BusError::Range { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, device()),
            Err(BusError::Range { .. })
        ));
        bus.insert(u64::MAX, 1, device()).unwrap();
    }

    #[test]
    fn an_access_must_lie_inside_of_one_device() {
        let bus = Bus::default();
        bus.insert(0x100, 4, device()).unwrap();
        bus.insert(0x104, 4, device()).unwrap();
        let mut data = [0xee; 4];
        assert!(!bus.read(0x102, &mut data));
        assert_eq!(data, [0xee; 4]);
        assert!(bus.read(0x104, &mut data));
        assert_eq!(data, [0; 4]);
        assert!(!bus.read(u64::MAX, &mut data));
        assert!(!bus.read(0x100, &mut []));
        assert!(!bus.write(0x108, &[1]));
    }

    #[test]
    fn removed_devices_answer_no_more() {
        let bus = Bus::default();
        bus.insert(0x10, 1, device()).unwrap();
        assert!(bus.remove(0x11).is_err());
        bus.remove(0x10).unwrap();
        assert!(!bus.read(0x10, &mut [0]));
        bus.insert(0x10, 2, device()).unwrap();
    }
}
