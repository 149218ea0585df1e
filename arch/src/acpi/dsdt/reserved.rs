//! Motherboard resources (`PNP0C02`): addresses the guest must not give to anything, that is the configuration
//! space of PCI (PCI Firmware Specification 3.3 §4.1.2) and the hotplug registers.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Memory32Fixed, Name, ResourceTemplate,
    ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::super::{AcpiConfig, AddressRange};

/// `\_SB.MBRD`; nothing at all where there is nothing to reserve.
pub(super) struct Reserved<'a>(pub(super) &'a AcpiConfig);

impl Aml for Reserved<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let segments = self.0.pci.iter().flat_map(|pci| &pci.segments);
        let resources: Vec<Box<dyn Aml>> = segments
            .map(|segment| segment.mmconfig_range())
            .chain(self.0.register_blocks())
            // Validation has refused the configurations that give an error here.
            .filter_map(Result::ok)
            .map(fixed_memory)
            .collect();
        if resources.is_empty() {
            return;
        }
        let resources =
            ResourceTemplate::new(resources.iter().map(|resource| resource.as_ref()).collect());
        Device::new(
            "\\_SB_.MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn fixed_memory(range: AddressRange) -> Box<dyn Aml> {
    let AddressRange { start, end } = range;
    match (u32::try_from(start), u32::try_from(end)) {
        (Ok(start), Ok(end)) => Box::new(Memory32Fixed::new(true, start, end - start + 1)),
        _ => Box::new(AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            start,
            end,
            None,
        )),
    }
}
