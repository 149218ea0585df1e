//! Persistent memory: what the guest writes is in the file, or is not where it should not be; files that cannot be used.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Vmm, test_guest};

const MIB: u64 = 1 << 20;
const TESTS: &[&str] = &["virtio_pmem", "virtio_pmem_dma"];

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        File::create_new(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn names(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The 8 bytes at `at`.
fn word(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_le_bytes(bytes)
}

/// What the guest's test writes at `at` of device number `nth`.
fn written(nth: u64, at: u64) -> u64 {
    0x5eed_0000 + nth * 0x1_0000 + at
}

#[test]
fn what_the_guest_writes_is_in_the_files() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let paths = [place.file("a", 6 * MIB), place.file("b", 6 * MIB)];
    let builder = BareMetal::new(kvm)
        .word(&format!("pmem=2 pmem_size={}", 6 * MIB))
        .builder(TESTS)
        .args([
            "--pmem",
            &format!("file={}", text(&paths[0])),
            &format!("file={},mergeable=on,id=second", text(&paths[1])),
        ]);
    finish(builder.start().wait(), TESTS);
    let last = 6 * MIB - 4096;
    for (nth, path) in (0..).zip(&paths) {
        assert_eq!(word(path, 0), written(nth, 0));
        let middle = 4096 * ((6 * MIB / 4096 - 1) / 2);
        assert_eq!(word(path, middle), written(nth, middle));
        assert_eq!(fs::metadata(path).unwrap().len(), 6 * MIB);
    }
    assert_eq!(word(&paths[0], last + 4088), written(0, last + 4088));
    // Where the other test's request and its answer, OK, were.
    assert_eq!(word(&paths[1], last + 4088), 0);
}

#[test]
fn discarded_writes_leave_the_file_as_it_is() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let path = place.file("file", 4 * MIB);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&0x1234u64.to_le_bytes(), 0).unwrap();
    let builder = BareMetal::new(kvm)
        .word("pmem_before=0x1234")
        .builder(TESTS)
        .option("--pmem", format!("file={},discard_writes=on", text(&path)));
    finish(builder.start().wait(), TESTS);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[..8], 0x1234u64.to_le_bytes());
    assert!(bytes[8..].iter().all(|byte| *byte == 0));
}

#[test]
fn files_are_made_with_a_name_or_without() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let path = place.path("made");
    let pmem = format!("file={},size=2M", text(&path));
    let builder = BareMetal::new(kvm).builder(TESTS).option("--pmem", pmem);
    finish(builder.start().wait(), TESTS);
    assert_eq!(fs::metadata(&path).unwrap().len(), 2 * MIB);
    assert_eq!(word(&path, 0), written(0, 0));

    let pmem = format!("file={},size=128M", text(place.0.path()));
    let builder = BareMetal::new(kvm)
        .word(&format!("pmem_size={}", 128 * MIB))
        .builder(TESTS)
        .option("--pmem", pmem);
    finish(builder.start().wait(), TESTS);
    assert_eq!(place.names(), [path]);
}

#[test]
fn files_that_cannot_be_used() {
    let Some(_kvm) = Kvm::here() else { return };
    let place = Place::new();
    let odd = place.file("odd", 3 * MIB);
    let file = format!("file={}", text(&odd));
    let directory = format!("file={}", text(place.0.path()));
    let new = format!("file={}", text(&place.path("new")));
    for (pmem, wanted) in [
        (file.as_str(), "no multiple of 2M"),
        (&format!("{file},size=5M"), "size=5242880"),
        (
            &format!("{file},size=4M,discard_writes=on"),
            "does not grow",
        ),
        (&directory, "size is needed"),
        (&new, "size is needed"),
        ("file=/dev/null", "neither a file"),
        ("size=2M", "file is missing"),
    ] {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option("--pmem", pmem)
            .start()
            .wait();
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--pmem: ") && line.contains(wanted),
            "{line}"
        );
    }
    // What was made or grew is as before where something else stops the VM.
    let grown = format!("{file},size=4M");
    for pmem in [format!("{new},size=2M"), grown] {
        let ended = Vmm::builder()
            .option("--kernel", "/no/such")
            .option("--pmem", pmem)
            .start()
            .wait();
        assert!(ended.expect_refusal().starts_with("--kernel: "));
    }
    assert_eq!(place.names(), std::slice::from_ref(&odd));
    assert_eq!(fs::metadata(odd).unwrap().len(), 3 * MIB);
}

#[test]
fn linux_has_a_file_system_on_it() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let path = place.file("pmem", 16 * MIB);
    let tool = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).arg(&path).output();
        let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(output.status.success(), "{program}: {output:?}");
        output.stdout
    };
    tool("mkfs.ext4", &["-q", "-F", "-b", "4096"]);
    let ended = Linux::new(kvm)
        .option("--pmem", format!("file={}", text(&path)))
        .run("pmem");
    let sum = ended
        .out
        .lines()
        .find_map(|line| line.strip_prefix("CH-PMEM: sum "))
        .expect("the sum of what the guest wrote");
    tool("e2fsck", &["-f", "-n"]);
    let data = Command::new("debugfs")
        .args(["-R", "cat /data"])
        .arg(&path)
        .output()
        .unwrap()
        .stdout;
    let copy = place.path("copy");
    fs::write(&copy, data).unwrap();
    let host = Command::new("sha256sum").arg(&copy).output().unwrap();
    let host = String::from_utf8(host.stdout).unwrap();
    assert_eq!(host.split(' ').next(), sum.split(' ').next());
}
