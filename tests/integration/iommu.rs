//! Devices behind the virtual IOMMU.

use std::fs;

use crate::disks::{Images, check_file_system, file_system};
use crate::linux::Linux;
use crate::support::{BareMetal, Kvm, Vmm, report, test_guest};

/// A disk of 1 MiB.
fn disk(dir: &tempfile::TempDir) -> String {
    let path = dir.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    format!("path={},iommu=on", path.display())
}

#[test]
fn a_disk_sees_what_is_mapped_and_no_more() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tests = ["virtio_iommu", "pci", "acpi"];
    let vmm = BareMetal::new(kvm)
        .builder(&tests)
        .option("--disk", disk(&dir))
        .start();
    let report = report::finish(vmm.wait(), &tests);
    // Slot 1 is the IOMMU's.
    assert_eq!(report.number("iommu_endpoint"), 2 << 3);
    let image = fs::read(dir.path().join("disk")).unwrap();
    let written = &image[4096..4096 + 8192];
    assert!(written[..0xe00].iter().all(|byte| *byte == 0x14));
    assert!(written[0xe00..0x1e00].iter().all(|byte| *byte == 0x10));
    assert!(written[0x1e00..].iter().all(|byte| *byte == 0x12));
}

/// A driver that knows nothing of the IOMMU, such as that of firmware, finds its devices as they are.
#[test]
fn without_a_driver_for_it_nothing_is_translated() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tests = ["virtio_iommu_bypass"];
    let vmm = BareMetal::new(kvm)
        .builder(&tests)
        .option("--disk", disk(&dir))
        .option("--rng", "iommu=on")
        .start();
    report::finish(vmm.wait(), &tests);
}

#[test]
fn the_serial_port_cannot_be_behind_it() {
    let ended = Vmm::builder()
        .option("--kernel", test_guest())
        .option("--serial", "null,iommu=on")
        .start()
        .wait();
    let line = ended.expect_refusal();
    assert!(line.starts_with("--serial: iommu=on is wrong"), "{line}");
}

#[test]
fn linux_reads_and_writes_a_file_system_behind_it() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let raw = file_system(&images);
    let ended = Linux::new(kvm)
        .disk(format!("path={},iommu=on,num_queues=2", raw.display()))
        .run("disk");
    check_file_system(&images, &raw);
    // It found the IOMMU, and put the disk behind it.
    assert!(ended.out.contains("virtio_iommu virtio0:"), "no IOMMU");
    let group = "0000:00:02.0: Adding to iommu group";
    assert!(ended.out.contains(group), "no group");
}
