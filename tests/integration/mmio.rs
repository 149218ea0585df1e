//! Virtio devices on memory-mapped registers: a VMM that is built with the feature `mmio`, with the bare-metal guest and with Linux.

use std::fs;

use crate::disks::{Images, check_file_system, file_system, text};
use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, binary_mmio};

#[test]
fn the_bare_metal_guest_finds_and_uses_them() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let raw = images.raw("raw");
    let tests = ["virtio_mmio_rng", "virtio_mmio_blk", "virtio_mmio_rng"];
    let vmm = BareMetal::new(kvm)
        .builder(&tests)
        .program(binary_mmio())
        .option("--disk", format!("path={}", text(&raw)))
        .start();
    let report = finish(vmm.wait(), &tests);
    let bytes = fs::read(&raw).unwrap();
    assert_eq!(
        report.number("virtio_mmio_sectors") * 512,
        bytes.len() as u64
    );
    // What the guest wrote: two sectors at either end.
    let (start, end) = (&bytes[..1024], &bytes[bytes.len() - 1024..]);
    assert!(start.iter().all(|byte| *byte == 0x3c));
    assert!(end.iter().all(|byte| *byte == 0x5a));
    assert!(
        bytes[1024..bytes.len() - 1024]
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn more_devices_than_pins_are_refused() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let mut builder = BareMetal::new(kvm).builder(&[]).program(binary_mmio());
    for disk in 0..15 {
        let raw = images.raw(&format!("raw{disk}"));
        builder = builder.option("--disk", format!("path={}", text(&raw)));
    }
    let ended = builder.start().wait();
    let refusal = ended.expect_refusal();
    assert!(
        refusal.contains("finding a place for the virtio device"),
        "{refusal}"
    );
}

#[test]
fn linux_reads_and_writes_a_file_system() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let raw = file_system(&images);
    Linux::new(kvm)
        .program(binary_mmio())
        .disk(format!("path={}", text(&raw)))
        .run("disk");
    check_file_system(&images, &raw);
}
