//! PCI roots (`PNP0A08`, PCI Firmware Specification 3.3 §4.1, §4.5; ACPI 6.5 §6.2) and hotplug of their slots by the
//! registers of [`registers::pci`](super::super::registers::pci).

use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Local, Method, MethodCall,
    Mutex, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Or, Package, PackageBuilder, Path,
    Release, ResourceTemplate, Return, ShiftLeft, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::super::{AddressRange, PCI_SLOTS, PciHost, PciSegment, registers};
use super::{Raw, numbered};

const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
const FOREVER: u16 = 0xffff;

/// What `_OSC` is asked for on a PCI root (PCI Firmware Specification 3.3 §4.5.1).
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// Control that the guest gets: the PCI Express capability structures. Hotplug stays with ACPI.
const OSC_GRANTED: u32 = 1 << 4;
/// `_OSC` status bits (ACPI 6.5 §6.2.12).
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;

/// The roots `\_SB.PCI0`... and, with hotplug, `\_SB.PHPR`.
pub(super) struct Pci<'a>(pub(super) &'a PciHost);

impl Aml for Pci<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        if let Some(address) = self.0.hotplug {
            Hotplug {
                address,
                segments: &self.0.segments,
            }
            .to_aml_bytes(sink);
        }
        for (index, segment) in self.0.segments.iter().enumerate() {
            Root {
                index,
                segment,
                hotplug: self.0.hotplug.is_some(),
            }
            .to_aml_bytes(sink);
        }
    }
}

struct Root<'a> {
    index: usize,
    segment: &'a PciSegment,
    hotplug: bool,
}

fn root_path(index: usize) -> Path {
    Path::new(&format!("\\_SB_.PCI{:X}", index & 0xf))
}

impl Aml for Root<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let segment = self.segment;
        let mut children = Raw::new();
        children.push(&Name::new("_HID".into(), &EISAName::new("PNP0A08")));
        children.push(&Name::new("_CID".into(), &EISAName::new("PNP0A03")));
        children.push(&Name::new("_UID".into(), &(self.index as u64)));
        children.push(&Name::new("_SEG".into(), &segment.id));
        children.push(&Name::new("_BBN".into(), &segment.first_bus));
        push_resources(&mut children, segment);
        push_osc(&mut children);
        if let Some(gsis) = &segment.slot_gsis {
            push_routing(&mut children, gsis);
        }
        if self.hotplug {
            push_slots(&mut children, segment.id);
        }
        Device::new(root_path(self.index), vec![&children]).to_aml_bytes(sink);
    }
}

fn push_resources(out: &mut Raw, segment: &PciSegment) {
    let mut resources: Vec<Box<dyn Aml>> = vec![Box::new(AddressSpace::new_bus_number(
        u16::from(segment.first_bus),
        u16::from(segment.last_bus),
    ))];
    if segment.id == 0 {
        // The configuration ports, and all ports around them for the guest to give to devices.
        resources.push(Box::new(IO::new(0xcf8, 0xcf8, 1, 8)));
        resources.push(Box::new(AddressSpace::new_io(0u16, 0xcf7, None)));
        resources.push(Box::new(AddressSpace::new_io(0xd00u16, 0xffff, None)));
    }
    let memory = AddressSpaceCacheable::NotCacheable;
    if let Some(AddressRange { start, end }) = segment.window32
        && let (Ok(start), Ok(end)) = (u32::try_from(start), u32::try_from(end))
    {
        resources.push(Box::new(AddressSpace::new_memory(
            memory, true, start, end, None,
        )));
    }
    if let Some(AddressRange { start, end }) = segment.window64 {
        resources.push(Box::new(AddressSpace::new_memory(
            memory, true, start, end, None,
        )));
    }
    let template =
        ResourceTemplate::new(resources.iter().map(|resource| resource.as_ref()).collect());
    out.push(&Name::new("_CRS".into(), &template));
}

/// `_OSC(uuid, revision, count, capabilities)`: what the guest may control by itself.
fn push_osc(out: &mut Raw) {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let capabilities = Arg(3);
    let flag = |bit: &u8| {
        let mut raw = Raw::new();
        raw.push(&Or::new(&status, &status, bit));
        raw
    };
    let granted = And::new(&Local(0), &control, &OSC_GRANTED);
    out.push(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWord {
                source: &capabilities,
                offset: 0,
                name: "CDW1",
            },
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                vec![
                    &CreateDWord {
                        source: &capabilities,
                        offset: 8,
                        name: "CDW3",
                    },
                    &granted,
                    &If::new(
                        &NotEqual::new(&Arg(1), &acpi_tables::aml::ONE),
                        vec![&flag(&OSC_UNKNOWN_REVISION)],
                    ),
                    &If::new(
                        &NotEqual::new(&control, &Local(0)),
                        vec![&flag(&OSC_MASKED)],
                    ),
                    &Store::new(&control, &Local(0)),
                ],
            ),
            &Else::new(vec![&flag(&OSC_UNKNOWN_UUID)]),
            &Return::new(&capabilities),
        ],
    ));
}

/// `CreateDWordField (source, offset, name)`.
struct CreateDWord<'a> {
    source: &'a dyn Aml,
    offset: u8,
    name: &'static str,
}

impl Aml for CreateDWord<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        acpi_tables::aml::CreateDWordField::new(&Path::new(self.name), self.source, &self.offset)
            .to_aml_bytes(sink);
    }
}

/// `_PRT` (ACPI 6.5 §6.2.13): INTA# of each slot.
fn push_routing(out: &mut Raw, gsis: &[u32; PCI_SLOTS]) {
    const ANY_FUNCTION: u32 = 0xffff;
    let mut table = PackageBuilder::new();
    for (slot, gsi) in (0u32..).zip(gsis) {
        table.add_element(&Package::new(vec![
            &((slot << 16) | ANY_FUNCTION),
            &ZERO,
            &ZERO,
            gsi,
        ]));
    }
    out.push(&Name::new("_PRT".into(), &table));
}

/// Slots 1 to 31 (slot 0 is the host bridge), and `DVNT(mask, notification)` to tell those in a mask.
fn push_slots(out: &mut Raw, segment: u16) {
    let mut branches = Raw::new();
    for slot in 1..PCI_SLOTS as u32 {
        let name = numbered('S', slot);
        let eject = MethodCall::new("\\_SB_.PHPR.PCEJ".into(), vec![&slot, &segment]);
        out.push(&Device::new(
            Path::new(&name),
            vec![
                &Name::new("_SUN".into(), &slot),
                &Name::new("_ADR".into(), &(slot << 16)),
                &Method::new("_EJ0".into(), 1, false, vec![&eject]),
            ],
        ));
        let device = Path::new(&name);
        let bit = 1u32 << slot;
        let chosen = And::new(&ZERO, &Arg(0), &bit);
        branches.push(&If::new(&chosen, vec![&Notify::new(&device, &Arg(1))]));
    }
    out.push(&Method::new("DVNT".into(), 2, true, vec![&branches]));
}

/// `\_SB.PHPR`: the hotplug registers, `PCEJ(slot, segment)` and `PSCN()`.
struct Hotplug<'a> {
    address: u64,
    segments: &'a [PciSegment],
}

impl Aml for Hotplug<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (selector, inserted, removing, eject) = (
            Path::new("PSEG"),
            Path::new("PINS"),
            Path::new("PREM"),
            Path::new("PEJC"),
        );
        let lock = || Acquire::new("PLCK".into(), FOREVER);
        let unlock = || Release::new("PLCK".into());

        let mut scan = Raw::new();
        for (index, segment) in self.segments.iter().enumerate() {
            scan.push(&Store::new(&selector, &segment.id));
            // Reading clears, so each mask is read once.
            scan.push(&Store::new(&Local(0), &inserted));
            scan.push(&Store::new(&Local(1), &removing));
            for (mask, notification) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
                let notify = format!("\\_SB_.PCI{:X}.DVNT", index & 0xf);
                scan.push(&MethodCall::new(
                    Path::new(&notify),
                    vec![&mask, &notification],
                ));
            }
        }
        let names =
            [*b"PSEG", *b"PINS", *b"PREM", *b"PEJC"].map(|name| FieldEntry::Named(name, 32));
        Device::new(
            "\\_SB_.PHPR".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A06")),
                &Name::new("_UID".into(), &"PCI hotplug"),
                &OpRegion::new(
                    "PREG".into(),
                    OpRegionSpace::SystemMemory,
                    &self.address,
                    &registers::pci::SIZE,
                ),
                &Field::new(
                    "PREG".into(),
                    FieldAccessType::DWord,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    names.to_vec(),
                ),
                &Mutex::new("PLCK".into(), 0),
                &Method::new(
                    "PCEJ".into(),
                    2,
                    true,
                    vec![
                        &lock(),
                        &Store::new(&selector, &Arg(1)),
                        &ShiftLeft::new(&Local(0), &acpi_tables::aml::ONE, &Arg(0)),
                        &Store::new(&eject, &Local(0)),
                        &unlock(),
                    ],
                ),
                &Method::new("PSCN".into(), 0, true, vec![&lock(), &scan, &unlock()]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
