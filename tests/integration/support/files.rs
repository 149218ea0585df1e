//! Where the binary, the guests and `/dev/kvm` are.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Proof that guests can run here; whoever starts one asks for it.
#[derive(Clone, Copy)]
pub struct Kvm(());

impl Kvm {
    /// Fails without `/dev/kvm`, unless `CH_TESTS_WITHOUT_KVM=1` asks for the test to be skipped.
    pub fn here() -> Option<Self> {
        let open = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        match open {
            Ok(_) => Some(Self(())),
            Err(e) if env::var_os("CH_TESTS_WITHOUT_KVM").is_some_and(|v| v == "1") => {
                println!("skipped: /dev/kvm: {e}");
                None
            }
            Err(e) => {
                panic!(
                    "this test starts a guest, and /dev/kvm does not open: {e} (CH_TESTS_WITHOUT_KVM=1 skips it)"
                )
            }
        }
    }
}

/// The VMM: `CH_BINARY`, or the one that cargo built for these tests.
pub fn binary() -> PathBuf {
    env::var_os("CH_BINARY").map_or_else(
        || env!("CARGO_BIN_EXE_cloud-hypervisor").into(),
        PathBuf::from,
    )
}

/// The VMM with the feature `mmio`: `CH_BINARY_MMIO`, or built on demand, beside the other one's target directory so that it does
/// not take its place.
pub fn binary_mmio() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        env::var_os("CH_BINARY_MMIO").map_or_else(
            || {
                let args = ["--bin", "cloud-hypervisor", "--features", "mmio"];
                let target = target().join("mmio");
                build(&target, &args);
                target.join("ci/cloud-hypervisor")
            },
            PathBuf::from,
        )
    })
}

/// The bare-metal guest's ELF file: `CH_TEST_GUEST`, or built on demand beside the VMM.
pub fn test_guest() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = env::var_os("CH_TEST_GUEST").map_or_else(build_test_guest, PathBuf::from);
        assert!(
            path.is_file(),
            "no bare-metal guest at {}: cargo build --profile ci -p test-guest",
            path.display()
        );
        path
    })
}

fn build_test_guest() -> PathBuf {
    build(target(), &["-p", "test-guest"]);
    target().join("ci/test-guest")
}

/// Where cargo built these tests.
fn target() -> &'static Path {
    // target/PROFILE/cloud-hypervisor
    Path::new(env!("CARGO_BIN_EXE_cloud-hypervisor"))
        .ancestors()
        .nth(2)
        .expect("a target directory")
}

/// Has cargo build what `args` say.
fn build(target: &Path, args: &[&str]) {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--profile", "ci"])
        .args(args)
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("starting cargo");
    assert!(status.success(), "cargo build {args:?} failed");
}

/// A Linux guest's file in `CH_GUEST_ASSETS`, or in the repository's `guest-assets`.
pub fn asset(name: &str) -> PathBuf {
    let dir = env::var_os("CH_GUEST_ASSETS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-assets"),
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(
        path.is_file(),
        "{} is missing: run ./scripts/prepare_guest_assets.sh",
        path.display()
    );
    path
}
