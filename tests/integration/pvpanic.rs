//! The guest tells that it panicked.

use crate::support::{Kvm, Vmm, report, test_guest};

#[test]
fn a_panic_is_in_the_log_and_the_guest_goes_on() {
    let Some(_) = Kvm::here() else { return };
    let vmm = Vmm::builder()
        .args(["--pvpanic", "-v"])
        .option("--kernel", test_guest())
        .option("--cmdline", "test=pvpanic,boot")
        .option("--serial", "tty")
        .start();
    let ended = vmm.wait();
    let told = |line: &str| ended.err.lines().filter(|l| l.ends_with(line)).count();
    assert_eq!(told("the guest panicked"), 1, "{}", ended.err);
    assert_eq!(
        told("the guest panicked, and starts its crash kernel"),
        1,
        "{}",
        ended.err
    );
    report::finish(ended, &["pvpanic", "boot"]);
}
