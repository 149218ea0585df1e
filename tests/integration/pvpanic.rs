//! The guest tells that it panicked.

use std::fs;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::{Kvm, Vmm, asset, report, test_guest};

/// The log of a test.
struct Log(TempDir);

impl Log {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("log")
    }

    /// How many lines end so.
    fn count(&self, end: &str) -> usize {
        let text = fs::read_to_string(self.path()).unwrap();
        println!("{text}");
        text.lines().filter(|line| line.ends_with(end)).count()
    }
}

#[test]
fn a_panic_is_in_the_log_and_the_guest_goes_on() {
    let Some(_) = Kvm::here() else { return };
    let log = Log::new();
    let vmm = Vmm::builder()
        .args(["--pvpanic", "-v"])
        .option("--log-file", log.path())
        .option("--kernel", test_guest())
        .option("--cmdline", "test=pvpanic,boot")
        .option("--serial", "tty")
        .start();
    report::finish(vmm.wait(), &["pvpanic", "boot"]);
    assert_eq!(log.count("the guest panicked"), 1);
    assert_eq!(
        log.count("the guest panicked, and starts its crash kernel"),
        1
    );
}

/// Without a root file system Linux panics; told to reboot then, it does so again and again.
#[test]
fn linux_tells_that_it_panicked() {
    let Some(_) = Kvm::here() else { return };
    let cmdline = fs::read_to_string(asset("cmdline")).expect("the command line");
    let log = Log::new();
    let mut vmm = Vmm::builder()
        .patience(Duration::from_secs(400))
        .args(["--pvpanic", "-v"])
        .option("--log-file", log.path())
        .option("--kernel", asset("vmlinux"))
        .option("--cmdline", cmdline.trim_end())
        .option("--memory", "size=128M")
        .option("--serial", "tty")
        .start();
    // At the second one, the first is told.
    for _ in 0..2 {
        vmm.wait_for("Kernel panic - not syncing");
    }
    vmm.signal(libc::SIGTERM);
    vmm.wait().expect_clean();
    assert!(log.count("the guest panicked") >= 1);
}
