//! The memory device: RAM that is plugged and unplugged, of whatever kind; what it cannot be.

use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Vmm, test_guest};

const MIB: u64 = 1 << 20;
const HOTPLUG: &str = "hotplug_method=virtio-mem,hotplug_size=256M,hotplugged_size=64M";

#[test]
fn memory_comes_and_goes() {
    let Some(kvm) = Kvm::here() else { return };
    // Above 4 GiB there may be RAM already.
    for memory in ["size=128M", "size=128M,shared=on,mergeable=on", "size=5G"] {
        let tests = ["virtio_mem", "virtio_mem_dma", "virtio_mem_hostile"];
        let mut vmm = BareMetal::new(kvm)
            .memory_option(format!("{memory},{HOTPLUG}"))
            .word(&format!(
                "mem_size={} mem_requested={}",
                256 * MIB,
                64 * MIB
            ))
            .builder(&tests)
            .start();
        for _ in 0..2 {
            vmm.wait_for("READY full");
            let full = vmm.resident();
            vmm.send("\n");
            vmm.wait_for("READY unplugged");
            let then = vmm.resident();
            vmm.send("\n");
            assert!(
                full.saturating_sub(then) > 63 * MIB,
                "{full} bytes before, {then} after"
            );
        }
        finish(vmm.wait(), &tests);
    }
}

#[test]
fn the_guest_is_not_told_of_it_as_ram() {
    let Some(kvm) = Kvm::here() else { return };
    let tests = ["boot", "memory", "acpi"];
    let builder = BareMetal::new(kvm)
        .memory_option(format!("size=128M,{HOTPLUG}"))
        .builder(&tests);
    let report = finish(builder.start().wait(), &tests);
    for range in report.values("range") {
        assert!(
            !range.starts_with("0x100000000 "),
            "RAM above 4 GiB: {range}"
        );
    }
}

#[test]
fn memory_that_cannot_be_plugged() {
    let Some(_kvm) = Kvm::here() else { return };
    for (memory, wanted) in [
        ("hotplug_size=1G", "not built yet"),
        ("hotplug_method=acpi,hotplug_size=1G", "not built yet"),
        ("hotplug_method=dimm", "acpi or virtio-mem"),
        (
            "hotplug_method=virtio-mem,hotplug_size=100M",
            "hotplug_size=104857600",
        ),
        (
            "hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=2G",
            "hotplugged_size=2147483648",
        ),
    ] {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option("--memory", memory)
            .start()
            .wait();
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--memory: ") && line.contains(wanted),
            "{line}"
        );
    }
}

#[test]
fn linux_has_more_memory() {
    let Some(kvm) = Kvm::here() else { return };
    let linux = Linux::new(kvm).memory_option(
        "size=128M,hotplug_method=virtio-mem,hotplug_size=256M,hotplugged_size=128M",
    );
    let ended = linux.run("mem");
    assert!(ended.out.contains("virtio_mem virtio"), "{}", ended.out);
}
