//! The bare-metal guest: every boot protocol, vCPU counts and RAM sizes, and all its tests.

use std::fs;

use crate::support::{BareMetal, Kvm, Vmm, images};

/// The guest's tests that need nothing of their own (`test-guest/src/tests/mod.rs`).
const ALL: &[&str] = &[
    "boot",
    "memory",
    "acpi",
    "cpuid",
    "cmos",
    "cmos_advances",
    "ports",
    "pm_timer",
    "ioapic",
    "timer",
    "clock",
    "latency",
    "smp",
    "instructions",
    "syscall",
    "pci",
];
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn boots_by_pvh() {
    let Some(kvm) = Kvm::here() else { return };
    let report = BareMetal::new(kvm).word("hello=world").run(&["boot"]);
    assert_eq!(report.value("protocol"), "pvh");
    assert_eq!(
        report.value("cmdline"),
        "test=boot cpus=1 memory=134217728 hello=world"
    );
}

#[test]
fn boots_by_the_64_bit_linux_protocol() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest");
    fs::write(&path, images::without_note(crate::support::test_guest())).unwrap();
    let report = BareMetal::new(kvm)
        .kernel(&path)
        .run(&["boot", "memory", "acpi"]);
    assert_eq!(report.value("protocol"), "linux64");
}

#[test]
fn boots_a_bzimage() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bzImage");
    fs::write(&path, images::bzimage(crate::support::test_guest())).unwrap();
    let report = BareMetal::new(kvm)
        .kernel(&path)
        .run(&["boot", "memory", "acpi"]);
    assert_eq!(report.value("protocol"), "linux64");
}

/// Size and sum (as the guest counts it) of an initramfs of odd length.
fn initramfs() -> (Vec<u8>, u64) {
    let bytes: Vec<u8> = (0..100_003u32).map(|i| (i * 7 % 251) as u8).collect();
    let sum = bytes
        .iter()
        .fold(0u64, |s, &b| s.wrapping_mul(31).wrapping_add(u64::from(b)));
    (bytes, sum)
}

#[test]
fn initramfs_arrives_whole_by_every_protocol() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (bytes, sum) = initramfs();
    let path = dir.path().join("initramfs");
    fs::write(&path, &bytes).unwrap();
    let elf = crate::support::test_guest();
    let (linux64, bzimage) = (dir.path().join("linux64"), dir.path().join("bzImage"));
    fs::write(&linux64, images::without_note(elf)).unwrap();
    fs::write(&bzimage, images::bzimage(elf)).unwrap();
    for kernel in [elf, &linux64, &bzimage] {
        let report = BareMetal::new(kvm)
            .kernel(kernel)
            .initramfs(&path)
            .word(&format!("initramfs={sum}"))
            .run(&["initramfs", "memory"]);
        assert_eq!(
            report.value("initramfs"),
            format!("{} {sum:#x}", bytes.len())
        );
    }
}

#[test]
fn every_test_on_one_vcpu() {
    let Some(kvm) = Kvm::here() else { return };
    let report = BareMetal::new(kvm).run(ALL);
    assert_eq!(report.number("cpus"), 1);
}

#[test]
fn every_test_on_two_vcpus() {
    let Some(kvm) = Kvm::here() else { return };
    let report = BareMetal::new(kvm).cpus(2).run(ALL);
    assert_eq!(report.number("cpus"), 2);
}

#[test]
fn every_test_on_eight_vcpus() {
    let Some(kvm) = Kvm::here() else { return };
    let report = BareMetal::new(kvm).cpus(8).run(ALL);
    assert_eq!(report.number("processors"), 8);
    assert_eq!(report.number("cpus"), 8);
}

#[test]
fn topology_is_what_the_option_says() {
    let Some(_) = Kvm::here() else { return };
    let vmm = Vmm::builder()
        .option("--kernel", crate::support::test_guest())
        .option("--cmdline", "test=cpuid cpus=4")
        .option("--cpus", "boot=4,topology=2:2:1:1")
        .option("--serial", "tty")
        .start();
    let report = crate::support::report::finish(vmm.wait(), &["cpuid"]);
    // CPUID leaf 0xb: a shift and a count of 2 for threads, of 4 for the package.
    let levels = report.values("leaf_b");
    assert!(
        levels[0].starts_with("0 shift=1 count=2 type=1"),
        "{levels:?}"
    );
    assert!(
        levels[1].starts_with("1 shift=2 count=4 type=2"),
        "{levels:?}"
    );
}

/// RAM of this size is all there, below and above the hole; gives the ranges above 4 GiB.
fn memory(kvm: Kvm, size: u64) -> Vec<(u64, u64)> {
    let report = BareMetal::new(kvm).memory(size).run(&["memory", "cmos"]);
    let mut low = 0;
    let mut high = Vec::new();
    for range in report.values("range") {
        let mut words = range.split(' ');
        let mut number = || {
            let word = words.next().expect("start, size and kind");
            u64::from_str_radix(word.trim_start_matches("0x"), 16).expect("a number")
        };
        let (start, size, kind) = (number(), number(), number());
        if kind != 1 {
            continue;
        }
        if start >= 4 * GIB {
            high.push((start, size));
        } else {
            assert!(start + size <= 3 * GIB, "RAM in the hole: {range}");
            low += size;
        }
    }
    assert!(low.abs_diff(size.min(3 * GIB)) <= MIB, "low RAM: {low:#x}");
    high
}

#[test]
fn as_many_vcpus_as_there_can_be() {
    let Some(kvm) = Kvm::here() else { return };
    BareMetal::new(kvm).cpus(254).run(&["smp", "acpi", "cpuid"]);
}

#[test]
fn memory_of_128_mib() {
    let Some(kvm) = Kvm::here() else { return };
    assert_eq!(memory(kvm, 128 * MIB), []);
}

#[test]
fn memory_of_512_mib() {
    let Some(kvm) = Kvm::here() else { return };
    assert_eq!(memory(kvm, 512 * MIB), []);
}

#[test]
fn memory_of_3_gib_ends_at_the_hole() {
    let Some(kvm) = Kvm::here() else { return };
    assert_eq!(memory(kvm, 3 * GIB), []);
}

#[test]
fn memory_of_4_gib_goes_around_the_hole() {
    let Some(kvm) = Kvm::here() else { return };
    assert_eq!(memory(kvm, 4 * GIB), [(4 * GIB, GIB)]);
}

#[test]
fn memory_of_6_gib_goes_around_the_hole() {
    let Some(kvm) = Kvm::here() else { return };
    assert_eq!(memory(kvm, 6 * GIB), [(4 * GIB, 3 * GIB)]);
}

#[test]
fn shared_and_mergeable_memory_is_memory() {
    let Some(_) = Kvm::here() else { return };
    for kind in ["shared=on", "mergeable=on", "shared=on,mergeable=on"] {
        let vmm = Vmm::builder()
            .option("--kernel", crate::support::test_guest())
            .option("--cmdline", format!("test=memory memory={}", 5 * GIB))
            .option("--memory", format!("size=5G,{kind}"))
            .option("--serial", "tty")
            .start();
        crate::support::report::finish(vmm.wait(), &["memory"]);
    }
}
