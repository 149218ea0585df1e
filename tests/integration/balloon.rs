//! The balloon: the VMM's memory shrinks by what the guest gives up, of whatever kind its RAM is; sizes that cannot be.

use crate::linux::Linux;
use crate::support::process::Builder;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Vmm, test_guest};

const MIB: u64 = 1 << 20;
/// Bytes that the guest's tests give up and take back.
const MOVED: u64 = 64 * MIB;

/// Runs `tests` of the guest, which say `READY full` and then `READY after`: in between the VMM's memory shrinks.
fn shrinks(builder: Builder, tests: &[&str], after: &str, times: u32) {
    let mut vmm = builder.start();
    for _ in 0..times {
        vmm.wait_for("READY full");
        let full = vmm.resident();
        vmm.send("\n");
        vmm.wait_for(&format!("READY {after}"));
        let then = vmm.resident();
        vmm.send("\n");
        assert!(full >= MOVED, "{full} bytes, with {MOVED} written");
        assert!(
            full.saturating_sub(then) > MOVED - MIB,
            "{full} bytes before, {then} after"
        );
    }
    finish(vmm.wait(), tests);
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let Some(kvm) = Kvm::here() else { return };
    for memory in ["size=128M", "size=128M,shared=on"] {
        let tests = ["virtio_balloon"];
        let builder = BareMetal::new(kvm)
            .memory_option(memory)
            .word(&format!("balloon={}", 8 * MIB))
            .builder(&tests)
            .option("--balloon", "size=8M");
        shrinks(builder, &tests, "inflated", 1);
    }
}

#[test]
fn free_pages_are_the_hosts_until_they_are_used() {
    let Some(kvm) = Kvm::here() else { return };
    let tests = ["virtio_balloon_reporting"];
    let builder = BareMetal::new(kvm)
        .builder(&tests)
        .option("--balloon", "free_page_reporting=on,deflate_on_oom=on");
    shrinks(builder, &tests, "reported", 2);
}

#[test]
fn pages_that_are_no_ram_are_refused() {
    let Some(kvm) = Kvm::here() else { return };
    let tests = ["virtio_balloon_hostile"];
    // The option of old.
    let builder = BareMetal::new(kvm)
        .memory_option("size=128M,balloon=on")
        .builder(&tests);
    finish(builder.start().wait(), &tests);
}

#[test]
fn balloons_that_cannot_be() {
    let Some(_kvm) = Kvm::here() else { return };
    for (balloon, wanted) in [
        ("size=129M", "size=135266304"),
        ("size=5000", "size=5000"),
        ("size=much", "size=much"),
        ("pages=3", "pages"),
    ] {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option("--memory", "size=128M")
            .option("--balloon", balloon)
            .start()
            .wait();
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--balloon: ") && line.contains(wanted),
            "{line}"
        );
    }
}

#[test]
fn linux_gives_up_what_is_asked_for() {
    let Some(kvm) = Kvm::here() else { return };
    let ended = Linux::new(kvm)
        .option("--balloon", "size=24M")
        .run("balloon");
    // What the kernel had at its start, and what it has with 24 MiB in the balloon, in KiB.
    let numbers = ended
        .out
        .lines()
        .find_map(|line| line.strip_prefix("CH-BALLOON: "))
        .expect("what the guest found");
    let numbers: Vec<u64> = numbers.split(' ').map(|n| n.parse().unwrap()).collect();
    let [before, after] = numbers[..] else {
        panic!("{numbers:?}");
    };
    // The kernel gives itself its own initialisation code back.
    let taken = before.saturating_sub(after);
    assert!((16 << 10..=24 << 10).contains(&taken), "{before} {after}");
}
