//! A virtio device on memory-mapped registers (`LNRO0005`): a page and an interrupt, by which Linux's `virtio_mmio` driver finds it.

use acpi_tables::aml::{Device, Interrupt, Memory32Fixed, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};

use super::super::VirtioMmio;
use super::numbered;

/// Bytes of a device's registers (virtio 1.2 §4.2.2).
const SIZE: u32 = 0x1000;

/// `\_SB.Vnnn`.
pub(super) struct VirtioDevice {
    pub(super) number: u32,
    pub(super) place: VirtioMmio,
}

impl Aml for VirtioDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let VirtioMmio { address, gsi } = self.place;
        let registers = Memory32Fixed::new(true, address, SIZE);
        // Consumer, edge triggered, active high, exclusive.
        let interrupt = Interrupt::new(true, true, false, false, gsi);
        let path = format!("\\_SB_.{}", numbered('V', self.number));
        Device::new(
            path.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &self.number),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&registers, &interrupt]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}
