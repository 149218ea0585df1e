//! CPUs (`ACPI0007`, ACPI 6.5 §8.4) in a container (`ACPI0010`), and their hotplug by the registers of
//! [`registers::cpu`](super::super::registers::cpu).

use acpi_tables::aml::{
    Acquire, Add, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, If, LessThan, Local, Method, MethodCall, Mutex, Name, Notify,
    ONE, OpRegion, OpRegionSpace, Path, Release, Return, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::super::madt::present_local_apic;
use super::super::{Cpu, registers};
use super::{Raw, numbered};

/// `_STA`: present, enabled, shown, functioning (§6.3.7).
const PRESENT: u8 = 0xf;
/// Notification: look at the device again (§5.6.6).
const DEVICE_CHECK: u8 = 1;
/// Notification: the device shall go.
const EJECT_REQUEST: u8 = 3;
const FOREVER: u16 = 0xffff;

/// `\_SB.CPUS` with one device a CPU.
pub(super) struct Cpus<'a> {
    pub(super) cpus: &'a [Cpu],
    /// Address of the hotplug registers.
    pub(super) hotplug: Option<u64>,
}

impl Aml for Cpus<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut children = Raw::new();
        children.push(&Name::new("_HID".into(), &"ACPI0010"));
        children.push(&Name::new("_CID".into(), &EISAName::new("PNP0A05")));
        if let Some(address) = self.hotplug {
            push_registers(&mut children, address);
            push_methods(&mut children, self.cpus.len() as u64);
        }
        for (uid, cpu) in (0u32..).zip(self.cpus) {
            match self.hotplug {
                Some(_) => push_pluggable_cpu(&mut children, uid, cpu),
                None => push_fixed_cpu(&mut children, uid, cpu),
            }
        }
        if self.hotplug.is_some() {
            push_notifier(&mut children, self.cpus);
        }
        Device::new("\\_SB_.CPUS".into(), vec![&children]).to_aml_bytes(sink);
    }
}

/// Field names: `CSEL` selector; `CPEN` enabled, `CPIN` inserting, `CPRM` removing, `CPEJ` eject.
fn push_registers(out: &mut Raw, address: u64) {
    out.push(&OpRegion::new(
        "CREG".into(),
        OpRegionSpace::SystemMemory,
        &address,
        &registers::cpu::SIZE,
    ));
    out.push(&Field::new(
        "CREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"CSEL", 32)],
    ));
    out.push(&Field::new(
        "CREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        // A write of one flag must not clear another.
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Reserved(32),
            FieldEntry::Named(*b"CPEN", 1),
            FieldEntry::Named(*b"CPIN", 1),
            FieldEntry::Named(*b"CPRM", 1),
            FieldEntry::Named(*b"CPEJ", 1),
            FieldEntry::Reserved(4),
        ],
    ));
    out.push(&Mutex::new("CLCK".into(), 0));
}

/// `CSTA(cpu)` gives a CPU's status, `CEJ0(cpu)` lets it go, `CSCN()` looks for what the VMM wants.
fn push_methods(out: &mut Raw, count: u64) {
    let (selector, enabled, eject) = (Path::new("CSEL"), Path::new("CPEN"), Path::new("CPEJ"));
    let lock = || Acquire::new("CLCK".into(), FOREVER);
    let unlock = || Release::new("CLCK".into());

    out.push(&Method::new(
        "CSTA".into(),
        1,
        true,
        vec![
            &lock(),
            &Store::new(&selector, &Arg(0)),
            &Store::new(&Local(0), &ZERO),
            &If::new(
                &Equal::new(&enabled, &ONE),
                vec![&Store::new(&Local(0), &PRESENT)],
            ),
            &unlock(),
            &Return::new(&Local(0)),
        ],
    ));
    out.push(&Method::new(
        "CEJ0".into(),
        1,
        true,
        vec![
            &lock(),
            &Store::new(&selector, &Arg(0)),
            &Store::new(&eject, &ONE),
            &unlock(),
        ],
    ));

    let mut look = Raw::new();
    for (flag, notification) in [("CPIN", DEVICE_CHECK), ("CPRM", EJECT_REQUEST)] {
        let flag = Path::new(flag);
        look.push(&If::new(
            &Equal::new(&flag, &ONE),
            vec![
                &MethodCall::new("CTFY".into(), vec![&Local(0), &notification]),
                &Store::new(&flag, &ONE),
            ],
        ));
    }
    out.push(&Method::new(
        "CSCN".into(),
        0,
        true,
        vec![
            &lock(),
            &Store::new(&Local(0), &ZERO),
            &While::new(
                &LessThan::new(&Local(0), &count),
                vec![
                    &Store::new(&selector, &Local(0)),
                    &look,
                    &Add::new(&Local(0), &Local(0), &ONE),
                ],
            ),
            &unlock(),
        ],
    ));
}

fn push_fixed_cpu(out: &mut Raw, uid: u32, cpu: &Cpu) {
    let status = if cpu.enabled { PRESENT } else { 0 };
    out.push(&Device::new(
        Path::new(&numbered('C', uid)),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &uid),
            &Name::new("_STA".into(), &status),
            &Name::new(
                "_MAT".into(),
                &BufferData::new(present_local_apic(uid, cpu)),
            ),
        ],
    ));
}

fn push_pluggable_cpu(out: &mut Raw, uid: u32, cpu: &Cpu) {
    let status = MethodCall::new("CSTA".into(), vec![&uid]);
    let mut children = Raw::new();
    children.push(&Name::new("_HID".into(), &"ACPI0007"));
    children.push(&Name::new("_UID".into(), &uid));
    children.push(&Method::new(
        "_STA".into(),
        0,
        false,
        vec![&Return::new(&status)],
    ));
    // The guest reads it only while `_STA` says that the CPU is there, so it can say "enabled" at all times.
    children.push(&Name::new(
        "_MAT".into(),
        &BufferData::new(present_local_apic(uid, cpu)),
    ));
    // The boot CPU cannot go.
    if uid != 0 {
        children.push(&Method::new(
            "_EJ0".into(),
            1,
            false,
            vec![&MethodCall::new("CEJ0".into(), vec![&uid])],
        ));
    }
    out.push(&Device::new(
        Path::new(&numbered('C', uid)),
        vec![&children],
    ));
}

/// `CTFY(cpu, notification)`: names are static in AML, so it compares its way to the right one.
fn push_notifier(out: &mut Raw, cpus: &[Cpu]) {
    let mut branches = Raw::new();
    for (uid, _) in (0u32..).zip(cpus) {
        let device = Path::new(&numbered('C', uid));
        branches.push(&If::new(
            &Equal::new(&Arg(0), &uid),
            vec![&Notify::new(&device, &Arg(1))],
        ));
    }
    out.push(&Method::new("CTFY".into(), 2, true, vec![&branches]));
}
