//! Disks that another process serves: `qemu-storage-daemon`, by vhost-user. The guest's own tests on them, and back ends that are not
//! there, go away or cannot.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disks::{Images, check_file_system, file_system, text};
use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Ended, Kvm, Report, Vmm, pause_to_the_end, test_guest};

/// Of the disks that [`Images`] makes.
const SECTORS: u64 = (16 << 20) / 512;
const TESTS: &[&str] = &[
    "virtio_transport",
    "virtio_strict",
    "virtio_blk",
    "virtio_blk_reset",
];

/// The process that serves a raw image.
struct Daemon {
    directory: tempfile::TempDir,
    image: PathBuf,
    options: String,
}

impl Daemon {
    /// `options` are more of those of the export.
    fn new(image: &Path, options: &str) -> Self {
        let daemon = Self {
            directory: tempfile::tempdir().unwrap(),
            image: image.to_owned(),
            options: options.to_owned(),
        };
        daemon.start();
        daemon
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns when it listens.
    fn start(&self) {
        let file = |name: &str| text(&self.file(name)).to_owned();
        let output = Command::new("qemu-storage-daemon")
            .args(["--daemonize", "--pidfile", &file("pid")])
            .args([
                "--blockdev",
                &format!(
                    "driver=file,node-name=d,discard=unmap,filename={}",
                    text(&self.image)
                ),
                "--export",
                &format!(
                    "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},{}",
                    file("socket"),
                    self.options
                ),
            ])
            .output()
            .unwrap_or_else(|e| {
                panic!("qemu-storage-daemon: {e}; package qemu-system-common has it")
            });
        assert!(output.status.success(), "{output:?}");
    }

    fn disk(&self, keys: &str) -> String {
        format!("vhost_user=on,socket={}{keys}", text(&self.file("socket")))
    }

    fn signal(&self, signal: &str) -> bool {
        let pid = fs::read_to_string(self.file("pid")).unwrap();
        let killed = Command::new("kill").args([signal, pid.trim()]).output();
        killed.unwrap().status.success()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal("-KILL");
    }
}

fn bare_metal(kvm: Kvm) -> BareMetal {
    BareMetal::new(kvm)
        .memory_option("size=128M,shared=on")
        .word(&format!("blk_sectors={SECTORS}"))
}

fn guest(kvm: Kvm, disk: &str, words: &str, tests: &[&str]) -> Report {
    let builder = bare_metal(kvm).word(words).builder(tests);
    finish(builder.option("--disk", disk).start().wait(), tests)
}

/// A VM that ended as it should, with that many complaints, all of them of a back end that was lost.
fn expect_losses(ended: &Ended, wanted: impl Fn(usize) -> bool) {
    assert_eq!(ended.status.code(), Some(0), "{}", ended.err);
    let of_back_ends = |line: &str| line.contains("the vhost-user back end at");
    assert!(ended.err.lines().all(of_back_ends), "{}", ended.err);
    assert!(wanted(ended.err.lines().count()), "{}", ended.err);
}

#[test]
fn all_tests_of_a_disk_with_two_queues() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let daemon = Daemon::new(&images.raw("disk"), "writable=on,num-queues=2");
    let disk = daemon.disk(",num_queues=2,queue_size=64");
    let report = guest(kvm, &disk, "blk_queues=2", TESTS);
    // Not one of ours.
    assert_eq!(report.values("blk_id")[0], "vhost_user_blk");
    // The same back end serves one VM after another, and queues that are fewer than it has. More RAM can come.
    let more = "size=128M,shared=on,hotplug_method=virtio-mem,hotplug_size=128M";
    let builder = bare_metal(kvm).memory_option(more).builder(TESTS);
    let vmm = builder.option("--disk", daemon.disk("")).start();
    finish(vmm.wait(), TESTS);
}

#[test]
fn what_a_guest_writes_is_in_the_image() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.raw("disk");
    let daemon = Daemon::new(&path, "writable=on");
    let disk = daemon.disk("");
    let both = &["virtio_blk_fill", "virtio_blk_verify"];
    guest(kvm, &disk, "blk_seed=31", both);
    drop(daemon);
    // Without the other process.
    let disk = format!("path={},readonly=on", text(&path));
    guest(kvm, &disk, "blk_seed=31", &["virtio_blk_verify"]);
}

#[test]
fn linux_reads_and_writes_a_file_system() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let raw = file_system(&images);
    let daemon = Daemon::new(&raw, "writable=on,num-queues=2");
    Linux::new(kvm)
        .cpus(2)
        .memory_option("size=128M,shared=on")
        .disk(daemon.disk(",num_queues=2"))
        .run("disk");
    drop(daemon);
    check_file_system(&images, &raw);
}

#[test]
fn a_read_only_export_keeps_every_byte() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.raw("disk");
    fs::write(&path, vec![0x5a; 16 << 20]).unwrap();
    let daemon = Daemon::new(&path, "writable=off");
    for keys in ["", ",readonly=on"] {
        guest(kvm, &daemon.disk(keys), "blk_ro=1", &["virtio_blk"]);
    }
    drop(daemon);
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0x5a));
}

#[test]
fn pauses_lose_nothing() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let daemon = Daemon::new(&images.raw("disk"), "writable=on,num-queues=2");
    let api = daemon.file("api");
    let tests = &["virtio_blk_fill", "virtio_blk_verify"];
    let mut vmm = bare_metal(kvm)
        .builder(tests)
        .option("--disk", daemon.disk(",num_queues=2"))
        .option("--api-socket", &api)
        .start();
    vmm.wait_for("BEGIN");
    let pauses = pause_to_the_end(&api);
    finish(vmm.wait(), tests);
    assert!(pauses > 3, "{pauses}");
}

#[test]
fn rings_that_make_no_sense_are_the_guests_loss() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let daemon = Daemon::new(&images.raw("disk"), "writable=on");
    // This back end closes its connection over a bad request, or says nothing of it, which is not what the test wants.
    let ended = bare_metal(kvm)
        .builder(&["virtio_blk_hostile"])
        .option("--disk", daemon.disk(""))
        .start()
        .wait();
    expect_losses(&ended, |count| count > 0);
    // Both are well.
    guest(kvm, &daemon.disk(""), "", TESTS);
}

#[test]
fn a_back_end_is_killed_and_comes_back() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.raw("disk");
    let daemon = Daemon::new(&path, "writable=on");
    let mut vmm = bare_metal(kvm)
        .builder(&["virtio_blk_fill", "echo", "virtio_blk"])
        .option("--disk", daemon.disk(""))
        .start();
    vmm.wait_for("BEGIN virtio_blk_fill");
    // In the middle.
    let written = || fs::File::open(&path).unwrap().metadata().unwrap();
    while std::os::unix::fs::MetadataExt::blocks(&written()) < SECTORS / 8 {
        std::thread::yield_now();
    }
    assert!(daemon.signal("-KILL"));
    vmm.wait_for("FAIL virtio_blk_fill");
    vmm.wait_for("READY");
    daemon.start();
    vmm.send("quit\r");
    vmm.wait_for("OK virtio_blk");
    let ended = vmm.wait();
    expect_losses(&ended, |count| count == 1);
    assert!(ended.err.trim_end().ends_with("is gone"), "{}", ended.err);
}

#[test]
fn back_ends_that_cannot_be() {
    let Some(_kvm) = Kvm::here() else { return };
    let images = Images::new();
    let daemon = Daemon::new(&images.raw("disk"), "writable=on,num-queues=2");
    let refused = |memory: &str, disk: &str, wanted: &str| {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option("--memory", memory)
            .option("--disk", disk)
            .start()
            .wait();
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--disk: ") && line.contains(wanted),
            "{line}"
        );
    };
    let shared = "size=64M,shared=on";
    let disk = daemon.disk("");
    refused("size=64M", &disk, "--memory shared=on is that");
    for (keys, wanted) in [
        (",path=/x", "path and socket exclude each other"),
        (",iommu=on", "iommu and vhost_user=on exclude each other"),
        (",direct=on", "direct and vhost_user=on exclude each other"),
        (",ops_size=1,ops_refill_time=1", "limits and vhost_user=on"),
        (",num_queues=3", "serves 2 queues, and num_queues is 3"),
        (",readonly=on", "can be written, and readonly=on"),
    ] {
        refused(shared, &daemon.disk(keys), wanted);
    }
    refused(shared, "socket=/x", "socket needs vhost_user=on");
    refused(shared, "vhost_user=on", "socket is missing");

    let socket = daemon.file("other");
    let disk = format!("vhost_user=on,socket={}", text(&socket));
    refused(shared, &disk, "No such file");
    let listener = UnixListener::bind(&socket).unwrap();
    let hangs_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
    refused(shared, &disk, "does not say what it can do");
    hangs_up.join().unwrap();
    // Its listener is gone, and the file is not.
    refused(shared, &disk, "Connection refused");
}
