//! Memory slots (`PNP0C80`, ACPI 6.5 §9.11) and their hotplug by the registers of
//! [`registers::memory`](super::super::registers::memory).

use acpi_tables::aml::{
    Acquire, Add, AddressSpace, AddressSpaceCacheable, Arg, CreateQWordField, Device, EISAName,
    Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, LessThan, Local,
    Method, MethodCall, Mutex, Name, Notify, ONE, OpRegion, OpRegionSpace, Path, Release,
    ResourceTemplate, Return, Store, Subtract, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::super::{MemoryHotplug, registers};
use super::{Raw, numbered};

const PRESENT: u8 = 0xf;
const DEVICE_CHECK: u8 = 1;
const FOREVER: u16 = 0xffff;

/// Byte offsets in a QWord address space descriptor (§6.4.3.5.1).
const MINIMUM: u8 = 14;
const MAXIMUM: u8 = 22;
const LENGTH: u8 = 38;

/// `\_SB.MHPC` with one device a slot.
pub(super) struct Memory(pub(super) MemoryHotplug);

impl Aml for Memory {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let MemoryHotplug { address, slots } = self.0;
        let mut children = Raw::new();
        children.push(&Name::new("_HID".into(), &EISAName::new("PNP0A06")));
        children.push(&Name::new("_UID".into(), &"Memory hotplug"));
        push_registers(&mut children, address);
        push_status(&mut children);
        push_resources(&mut children);
        for slot in 0..slots {
            push_slot(&mut children, slot);
        }
        push_scan(&mut children, slots);
        Device::new("\\_SB_.MHPC".into(), vec![&children]).to_aml_bytes(sink);
    }
}

/// Field names: `MSEL` selector; `MSEN` enabled, `MSIN` inserting; `MSBA` address, `MSLN` length.
fn push_registers(out: &mut Raw, address: u64) {
    out.push(&OpRegion::new(
        "MREG".into(),
        OpRegionSpace::SystemMemory,
        &address,
        &registers::memory::SIZE,
    ));
    let field = |access, entries| {
        Field::new(
            "MREG".into(),
            access,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            entries,
        )
    };
    out.push(&field(
        FieldAccessType::DWord,
        vec![
            FieldEntry::Named(*b"MSEL", 32),
            FieldEntry::Reserved(32),
            FieldEntry::Named(*b"MSBA", 64),
            FieldEntry::Named(*b"MSLN", 64),
        ],
    ));
    out.push(&field(
        FieldAccessType::Byte,
        vec![
            FieldEntry::Reserved(32),
            FieldEntry::Named(*b"MSEN", 1),
            FieldEntry::Named(*b"MSIN", 1),
            FieldEntry::Reserved(6),
        ],
    ));
    out.push(&Mutex::new("MLCK".into(), 0));
}

/// `MSTA(slot)`: the slot's status.
fn push_status(out: &mut Raw) {
    out.push(&Method::new(
        "MSTA".into(),
        1,
        true,
        vec![
            &Acquire::new("MLCK".into(), FOREVER),
            &Store::new(&Path::new("MSEL"), &Arg(0)),
            &Store::new(&Local(0), &ZERO),
            &If::new(
                &Equal::new(&Path::new("MSEN"), &ONE),
                vec![&Store::new(&Local(0), &PRESENT)],
            ),
            &Release::new("MLCK".into()),
            &Return::new(&Local(0)),
        ],
    ));
}

/// `MCRS(slot)`: the addresses of the slot's memory, patched into a template.
fn push_resources(out: &mut Raw) {
    let template =
        AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0u64, 0u64, None);
    let name = Path::new("MR64");
    let (minimum, maximum, length) = (Path::new("MIN_"), Path::new("MAX_"), Path::new("LEN_"));
    let end = Add::new(&Local(0), &minimum, &length);
    out.push(&Method::new(
        "MCRS".into(),
        1,
        true,
        vec![
            &Acquire::new("MLCK".into(), FOREVER),
            &Store::new(&Path::new("MSEL"), &Arg(0)),
            &Name::new("MR64".into(), &ResourceTemplate::new(vec![&template])),
            &CreateQWordField::new(&minimum, &name, &MINIMUM),
            &CreateQWordField::new(&maximum, &name, &MAXIMUM),
            &CreateQWordField::new(&length, &name, &LENGTH),
            &Store::new(&minimum, &Path::new("MSBA")),
            &Store::new(&length, &Path::new("MSLN")),
            &end,
            &Subtract::new(&maximum, &Local(0), &ONE),
            &Release::new("MLCK".into()),
            &Return::new(&name),
        ],
    ));
}

fn push_slot(out: &mut Raw, slot: u32) {
    let status = MethodCall::new("MSTA".into(), vec![&slot]);
    let resources = MethodCall::new("MCRS".into(), vec![&slot]);
    out.push(&Device::new(
        Path::new(&numbered('M', slot)),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
            &Name::new("_UID".into(), &slot),
            &Method::new("_STA".into(), 0, false, vec![&Return::new(&status)]),
            &Method::new("_CRS".into(), 0, false, vec![&Return::new(&resources)]),
        ],
    ));
}

/// `MTFY(slot, notification)` and `MSCN()`, which looks for slots that were filled.
fn push_scan(out: &mut Raw, slots: u32) {
    let mut branches = Raw::new();
    for slot in 0..slots {
        let device = Path::new(&numbered('M', slot));
        branches.push(&If::new(
            &Equal::new(&Arg(0), &slot),
            vec![&Notify::new(&device, &Arg(1))],
        ));
    }
    out.push(&Method::new("MTFY".into(), 2, true, vec![&branches]));

    let inserting = Path::new("MSIN");
    let notify = MethodCall::new("MTFY".into(), vec![&Local(0), &DEVICE_CHECK]);
    out.push(&Method::new(
        "MSCN".into(),
        0,
        true,
        vec![
            &Acquire::new("MLCK".into(), FOREVER),
            &Store::new(&Local(0), &ZERO),
            &While::new(
                &LessThan::new(&Local(0), &slots),
                vec![
                    &Store::new(&Path::new("MSEL"), &Local(0)),
                    &If::new(
                        &Equal::new(&inserting, &ONE),
                        vec![&notify, &Store::new(&inserting, &ONE)],
                    ),
                    &Add::new(&Local(0), &Local(0), &ONE),
                ],
            ),
            &Release::new("MLCK".into()),
        ],
    ));
}
