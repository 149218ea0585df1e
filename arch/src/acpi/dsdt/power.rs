//! Power: the soft-off state (ACPI 6.5 §7.4.2) and the power button (§4.8.3.2).

use acpi_tables::aml::{Device, EISAName, Name, Package, ZERO};
use acpi_tables::{Aml, AmlSink};

use super::super::S5_SLEEP_TYPE;

/// `\_S5`: what goes to the sleep control register to power off.
pub(super) struct SleepState;

impl Aml for SleepState {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let package = Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]);
        Name::new("\\_S5_".into(), &package).to_aml_bytes(sink);
    }
}

/// `\_SB.PWRB`; the event device tells it that it was pressed.
pub(super) struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "\\_SB_.PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &ZERO),
            ],
        )
        .to_aml_bytes(sink);
    }
}
