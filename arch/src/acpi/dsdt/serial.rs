//! COM1, a 16550A-compatible port (`PNP0501`).

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, ResourceTemplate, ZERO};
use acpi_tables::{Aml, AmlSink};

use super::super::Serial;

/// `\_SB.COM1`.
pub(super) struct Com1(pub(super) Serial);

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Serial { port, irq } = self.0;
        let ports = IO::new(port, port, 1, 8);
        // Consumer, edge triggered, active high, exclusive.
        let interrupt = Interrupt::new(true, true, false, false, irq.into());
        Device::new(
            "\\_SB_.COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&ports, &interrupt]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}
