//! The PCI bus: where it is, what the guest is told of it, and how virtio devices come onto it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use arch::acpi::{AddressRange, PciHost, PciSegment};
use arch::layout;
use pci::{
    CONFIG_PORT, CONFIG_PORTS, HostBridge, PciBus, PciBusError, PciConfigIo, PciConfigMmio,
    PciDevice, Windows,
};
use vm_device::Bus;

use super::{DeviceError, place};

/// The bus of segment 0, with its host bridge.
pub(super) struct Pci {
    bus: Arc<PciBus>,
    windows: Windows,
}

impl Pci {
    /// An empty bus. 32-bit BARs lie in `memory32`, 64-bit ones in `memory64`.
    pub(super) fn new(
        ports: &Arc<Bus>,
        memory: &Arc<Bus>,
        memory32: RangeInclusive<u64>,
        memory64: Option<RangeInclusive<u64>>,
    ) -> Result<Self, DeviceError> {
        let windows = Windows {
            io: None,
            memory32: Some(memory32),
            memory64,
        };
        let bus = Arc::new(PciBus::new(
            0,
            windows.clone(),
            memory.clone(),
            ports.clone(),
        ));
        let config = Arc::new(PciConfigIo::new(bus.clone()));
        place(
            ports,
            "PCI configuration ports",
            CONFIG_PORT,
            CONFIG_PORTS,
            config,
        )?;
        let config = Arc::new(PciConfigMmio::new(bus.clone()));
        place(
            memory,
            "PCI configuration space",
            layout::MMCONFIG_START,
            layout::MMCONFIG_SIZE,
            config,
        )?;
        let this = Self { bus, windows };
        this.add("host bridge", Some(0), Arc::new(HostBridge::default()))?;
        Ok(this)
    }

    /// The lowest slot without a device.
    pub(super) fn free_slot(&self) -> Option<u8> {
        let taken = self.bus.taken_slots();
        (0..pci::SLOTS).find(|slot| taken & 1 << slot == 0)
    }

    /// Puts a device on the bus and gives its slot.
    pub(super) fn add(
        &self,
        name: &str,
        slot: Option<u8>,
        device: Arc<dyn PciDevice>,
    ) -> Result<u8, DeviceError> {
        self.bus
            .add(slot, device)
            .map_err(|source: PciBusError| DeviceError::Pci {
                name: name.to_owned(),
                source,
            })
    }

    /// What the DSDT says of it.
    pub(super) fn describe(&self) -> PciHost {
        let range = |range: &RangeInclusive<u64>| AddressRange {
            start: *range.start(),
            end: *range.end(),
        };
        PciHost {
            segments: vec![PciSegment {
                id: 0,
                first_bus: 0,
                last_bus: 0,
                mmconfig: layout::MMCONFIG_START,
                window32: self.windows.memory32.as_ref().map(range),
                window64: self.windows.memory64.as_ref().map(range),
                slot_gsis: None,
            }],
            hotplug: None,
        }
    }

    /// Takes every device off the bus, which stops it.
    pub(super) fn clear(&self) {
        for slot in 0..pci::SLOTS {
            // An empty slot is no error here.
            let _ = self.bus.remove(slot);
        }
    }
}
