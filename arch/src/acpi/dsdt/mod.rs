//! DSDT (ACPI 6.5 §5.2.11.1, §20): one fragment of AML a device, each in a file of its own.

mod cpus;
mod ged;
mod memory;
mod pci;
mod power;
mod reserved;
mod serial;
mod virtio_mmio;

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// From revision 2 on, AML integers have 64 bits.
const REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;

/// The whole table. `config` has been validated.
pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut fragments: Vec<Box<dyn Aml + '_>> = vec![
        Box::new(power::SleepState),
        Box::new(reserved::Reserved(config)),
        Box::new(cpus::Cpus {
            cpus: &config.cpus,
            hotplug: config.cpu_hotplug,
        }),
    ];
    if let Some(serial) = config.serial {
        fragments.push(Box::new(serial::Com1(serial)));
    }
    for (number, place) in (0..).zip(config.virtio_mmio.iter().copied()) {
        fragments.push(Box::new(virtio_mmio::VirtioDevice { number, place }));
    }
    if let Some(memory) = config.memory_hotplug {
        fragments.push(Box::new(memory::Memory(memory)));
    }
    if let Some(pci) = &config.pci {
        fragments.push(Box::new(pci::Pci(pci)));
    }
    if let Some(ged) = config.ged {
        fragments.push(Box::new(power::PowerButton));
        fragments.push(Box::new(ged::EventDevice {
            ged,
            cpus: config.cpu_hotplug.is_some(),
            memory: config.memory_hotplug.is_some(),
            pci: config.pci.as_ref().is_some_and(|pci| pci.hotplug.is_some()),
        }));
    }

    let mut aml = Vec::new();
    for fragment in &fragments {
        fragment.to_aml_bytes(&mut aml);
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

/// AML that has been written already: what a loop made, for a place that takes one object.
struct Raw(Vec<u8>);

impl Raw {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn push(&mut self, object: &dyn Aml) {
        object.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A name of one letter and a number below 4096 in hexadecimal.
fn numbered(letter: char, number: u32) -> String {
    format!("{letter}{:03X}", number & 0xfff)
}
