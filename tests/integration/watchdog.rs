//! The watchdog: a guest that gives no sign any more starts anew.

use crate::support::{BareMetal, Kvm};

#[test]
fn signs_of_life_come_back_and_a_reset_of_the_device_ends_it() {
    let Some(kvm) = Kvm::here() else { return };
    let tests = ["virtio_watchdog", "boot"];
    let vmm = BareMetal::new(kvm)
        .builder(&tests)
        .args(["--watchdog"])
        .start();
    crate::support::report::finish(vmm.wait(), &tests);
}

#[test]
fn a_silent_guest_starts_anew() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = BareMetal::new(kvm)
        .builder(&["virtio_watchdog_silence"])
        .args(["--watchdog"])
        .start();
    for _ in 0..2 {
        vmm.wait_for("HELLO test-guest");
        vmm.wait_for("VALUE watchdog silent");
    }
    vmm.signal(libc::SIGTERM);
    vmm.wait().expect_clean();
}
