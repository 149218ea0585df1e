//! The generic event device (`ACPI0013`, ACPI 6.5 §5.6.9): one interrupt, one register that says what happened.

use acpi_tables::aml::{
    And, Arg, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Interrupt, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path,
    ResourceTemplate, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::super::{Ged, registers};
use super::Raw;

/// Notification value of a pressed power button.
const BUTTON_PRESSED: u8 = 0x80;

/// `\_SB.GEC0`, with the scan methods it can call.
pub(super) struct EventDevice {
    pub(super) ged: Ged,
    pub(super) cpus: bool,
    pub(super) memory: bool,
    pub(super) pci: bool,
}

impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut handlers = Raw::new();
        let scans = [
            (self.cpus, registers::ged::CPU, "\\_SB_.CPUS.CSCN"),
            (self.memory, registers::ged::MEMORY, "\\_SB_.MHPC.MSCN"),
            (self.pci, registers::ged::PCI, "\\_SB_.PHPR.PSCN"),
        ];
        for (_, bit, method) in scans.into_iter().filter(|(present, _, _)| *present) {
            handlers.push(&on_event(bit, &MethodCall::new(method.into(), vec![])));
        }
        let button = Path::new("\\_SB_.PWRB");
        handlers.push(&on_event(
            registers::ged::POWER_BUTTON,
            &Notify::new(&button, &BUTTON_PRESSED),
        ));

        // Consumer, edge triggered, active high, exclusive.
        let interrupt = Interrupt::new(true, true, false, false, self.ged.gsi);
        let data = Path::new("GDAT");
        let read_events = Store::new(&Local(0), &data);
        // One interrupt is all there is, so Arg0 can only be its number.
        let is_ours = Equal::new(&Arg(0), &self.ged.gsi);
        let ours = If::new(&is_ours, vec![&read_events, &handlers]);
        Device::new(
            "\\_SB_.GEC0".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                &OpRegion::new(
                    "GREG".into(),
                    OpRegionSpace::SystemMemory,
                    &self.ged.address,
                    &registers::ged::SIZE,
                ),
                &Field::new(
                    "GREG".into(),
                    FieldAccessType::Byte,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![FieldEntry::Named(*b"GDAT", 8)],
                ),
                &Method::new("_EVT".into(), 1, true, vec![&ours]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// `If (Local0 & bit) { action }`, as bytes, for its parts live no longer than this call.
fn on_event(bit: u8, action: &dyn Aml) -> Raw {
    let mut raw = Raw::new();
    raw.push(&If::new(&And::new(&ZERO, &Local(0), &bit), vec![action]));
    raw
}
