//! `iommu=on`: the virtual IOMMU, which is there when a device is to be behind it.

use std::cell::RefCell;

use arch::acpi::Viot;
use thiserror::Error;
use virtio_devices::iommu::{EndpointMemory, Iommu, IommuControl};

use super::{DeviceError, Memory, VirtioHost};
use crate::config::VmConfig;

const OPTION: &str = "iommu=on";

/// Why no device can be behind an IOMMU.
#[derive(Debug, Error)]
#[error("a virtual IOMMU needs PCI, and the devices here are on memory-mapped registers")]
struct NoPci;

/// The IOMMU that is on the bus, and who is behind it.
pub(super) struct Behind {
    control: IommuControl,
    viot: RefCell<Viot>,
}

impl Behind {
    /// What the device in `slot` is to see of `ram`.
    pub(super) fn memory(&self, ram: super::Ram, slot: u8) -> Memory {
        let function = function(slot);
        self.viot.borrow_mut().endpoints.push(function);
        EndpointMemory::translated(ram, self.control.endpoint(function.into()))
    }

    /// What the guest is told of it.
    pub(super) fn describe(&self) -> Viot {
        self.viot.borrow().clone()
    }
}

/// Function 0 of a slot on bus 0, as a number.
fn function(slot: u8) -> u16 {
    u16::from(slot) << 3
}

/// Makes the IOMMU, if a device asks for it: before those that are behind it.
pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<(), DeviceError> {
    if !config.wants_iommu() {
        return Ok(());
    }
    let Some(slot) = host.free_slot() else {
        return Err(DeviceError::option(OPTION)(NoPci));
    };
    let id = "_iommu";
    let iommu = Iommu::new(id).map_err(DeviceError::option(OPTION))?;
    let behind = Behind {
        control: iommu.control(),
        viot: RefCell::new(Viot {
            iommu: function(slot),
            ..Viot::default()
        }),
    };
    host.add(id, Box::new(iommu))?;
    // Set once, here.
    let _ = host.iommu.set(behind);
    Ok(())
}
