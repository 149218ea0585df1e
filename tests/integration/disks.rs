//! Disks: the guest's own tests on raw and qcow2 images, what the host finds in them afterwards, and images that cannot be used.
//! `qemu-img` and `e2fsck` are the judges.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Vmm, test_guest};

const MIB: u64 = 1 << 20;
/// Bytes of the disks of these tests.
const SIZE: u64 = 16 * MIB;
const TESTS: &[&str] = &[
    "virtio_transport",
    "virtio_strict",
    "virtio_blk",
    "virtio_blk_reset",
    "virtio_blk_hostile",
];

/// Runs a program of the host, which is to succeed.
fn run(program: &str, args: &[&str]) -> Output {
    let output = output(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output
}

fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| {
            panic!(
                "{program}: {e}; packages qemu-utils and e2fsprogs have the tools of these tests"
            )
        })
}

/// A directory for images.
pub struct Images(TempDir);

impl Images {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn raw(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::File::create_new(&path).unwrap().set_len(SIZE).unwrap();
        path
    }

    /// `options` are those of `qemu-img create`.
    fn qcow2(&self, name: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        let size = SIZE.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(options);
        args.push(text(&path));
        if !options.contains(&"-b") {
            args.push(&size);
        }
        run("qemu-img", &args);
        path
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn check(path: &Path) {
    run("qemu-img", &["check", "-q", text(path)]);
}

/// Runs tests of the bare-metal guest on one disk.
fn guest(kvm: Kvm, disk: &str, words: &str, tests: &[&str]) {
    let builder = BareMetal::new(kvm)
        .word(&format!("blk_sectors={} {words}", SIZE / 512))
        .builder(tests)
        .option("--disk", disk);
    finish(builder.start().wait(), tests);
}

#[test]
fn raw_disk() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.raw("disk");
    guest(kvm, &format!("path={}", text(&path)), "", TESTS);
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
}

#[test]
fn raw_disk_past_the_page_cache_with_four_queues() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.raw("disk");
    let disk = format!(
        "path={},direct=on,num_queues=4,queue_size=64,image_type=raw,serial=a-serial-number-4711",
        text(&path)
    );
    let builder = BareMetal::new(kvm)
        .word("blk_queues=4")
        .builder(TESTS)
        .option("--disk", disk);
    let report = finish(builder.start().wait(), TESTS);
    assert_eq!(report.values("blk_id")[0], "a-serial-number-4711");
}

#[test]
fn qcow2_disk_is_sound_after_all_tests() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    for (direct, cluster) in [("off", "4k"), ("on", "512")] {
        let clusters = format!("cluster_size={cluster}");
        let path = images.qcow2(direct, &["-o", &clusters]);
        let disk = format!("path={},num_queues=2,direct={direct}", text(&path));
        guest(kvm, &disk, "", TESTS);
        check(&path);
    }
}

/// Bytes of a file that the host has in its page cache.
fn cached(path: &Path) -> u64 {
    let args = ["--bytes", "--noheadings", "--output", "RES", text(path)];
    let output = run("fincore", &args);
    String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn qcow2_disk_past_the_page_cache() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.qcow2("disk", &[]);
    let drop_pages = format!("of={}", text(&path));
    let drop_pages = [&drop_pages, "oflag=nocache", "conv=notrunc,fdatasync"];
    run(
        "dd",
        &[&drop_pages[..], &["count=0", "status=none"]].concat(),
    );
    assert_eq!(cached(&path), 0);
    // Told what it is, nobody looks at it first.
    let disk = |direct| format!("path={},image_type=qcow2,direct={direct}", text(&path));
    let all = &["virtio_blk_fill", "virtio_blk_verify"];
    guest(kvm, &disk("on"), "blk_seed=7", all);
    assert_eq!(cached(&path), 0);
    check(&path);
    // The data is there, and without the option it comes through the page cache.
    guest(kvm, &disk("off"), "blk_seed=7", &all[1..]);
    assert!(cached(&path) > SIZE / 2);
}

#[test]
fn what_one_guest_writes_another_reads() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let qcow2 = images.qcow2("disk.qcow2", &[]);
    let seed = "blk_seed=77";
    guest(
        kvm,
        &format!("path={}", text(&qcow2)),
        seed,
        &["virtio_blk_fill"],
    );
    check(&qcow2);
    let raw = images.path("disk.raw");
    run(
        "qemu-img",
        &["convert", "-O", "raw", text(&qcow2), text(&raw)],
    );
    let verify = &["virtio_blk_verify"];
    guest(kvm, &format!("path={}", text(&raw)), seed, verify);
    guest(
        kvm,
        &format!("path={},readonly=on", text(&qcow2)),
        seed,
        verify,
    );
}

#[test]
fn a_read_only_disk_keeps_every_byte() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    for path in [images.raw("raw"), images.qcow2("qcow2", &[])] {
        let before = fs::read(&path).unwrap();
        let disk = format!("path={},readonly=on", text(&path));
        guest(kvm, &disk, "blk_ro=1", &["virtio_blk"]);
        assert!(fs::read(&path).unwrap() == before, "{path:?} changed");
    }
}

#[test]
fn a_backing_file_is_followed_on_request_and_never_written() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let base = images.qcow2("base", &[]);
    guest(
        kvm,
        &format!("path={}", text(&base)),
        "blk_seed=1",
        &["virtio_blk_fill"],
    );
    let before = fs::read(&base).unwrap();
    let top = images.qcow2("top", &["-b", text(&base), "-F", "qcow2"]);

    let ended = Vmm::builder()
        .option("--kernel", test_guest())
        .option("--disk", format!("path={}", text(&top)))
        .start()
        .wait();
    let line = ended.expect_refusal();
    assert!(
        line.contains("backing file") && line.contains("not allowed"),
        "{line}"
    );

    let disk = format!("path={},backing_files=on", text(&top));
    guest(kvm, &disk, "blk_seed=1", &["virtio_blk_verify"]);
    guest(kvm, &disk, "", &["virtio_blk"]);
    check(&top);
    assert!(
        fs::read(&base).unwrap() == before,
        "the backing file changed"
    );
}

#[test]
fn a_killed_vmm_leaves_a_qcow2_that_lost_nothing_but_room() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.qcow2("disk", &["-o", "cluster_size=4k"]);
    let fill = &["virtio_blk_fill"];
    let vmm = BareMetal::new(kvm)
        .builder(fill)
        .option("--disk", format!("path={}", text(&path)))
        .start();
    // In the middle: half of the disk is allocated.
    while fs::metadata(&path).unwrap().len() < SIZE / 2 {
        std::thread::yield_now();
    }
    vmm.signal(libc::SIGKILL);
    drop(vmm);
    // 3 is: leaked clusters, and nothing worse.
    let code = output("qemu-img", &["check", "-q", text(&path)])
        .status
        .code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}");
    // The next VM opens it, writes all of it, and reads it back.
    let disk = format!("path={}", text(&path));
    guest(
        kvm,
        &disk,
        "blk_seed=5",
        &["virtio_blk_fill", "virtio_blk_verify"],
    );
}

#[test]
fn one_image_serves_one_writer() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    for path in [images.raw("raw"), images.qcow2("qcow2", &[])] {
        let disk = format!("path={}", text(&path));
        let mut first = BareMetal::new(kvm)
            .builder(&["echo"])
            .option("--disk", &disk)
            .start();
        first.wait_for("READY");
        for keys in ["readonly=on", "lock_granularity=full"] {
            let second = Vmm::builder()
                .option("--kernel", test_guest())
                .option("--disk", format!("{disk},{keys}"))
                .start()
                .wait();
            let line = second.expect_refusal();
            assert!(
                line.contains("lock") && line.contains(text(&path)),
                "{line}"
            );
        }
    }
}

#[test]
fn disks_that_cannot_be() {
    let Some(_kvm) = Kvm::here() else { return };
    let images = Images::new();
    let dir = images.path("directory");
    fs::create_dir(&dir).unwrap();
    let torn = images.path("torn");
    fs::write(&torn, b"QFI\xfb and no more").unwrap();
    let refused = |disk: String, wanted: &str| {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option("--disk", &disk)
            .start()
            .wait();
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--disk") && line.contains(wanted),
            "{line}"
        );
    };
    refused(
        format!("path={}", text(&images.path("absent"))),
        "No such file",
    );
    refused(format!("path={}", text(&dir)), "directory");
    refused(format!("path={}", text(&torn)), "torn");
    refused("path=/dev/null".into(), "neither a file nor a block device");
    refused("path=x,queue_size=7".into(), "queue_size=7");
    refused("path=x,socket=/s".into(), "path and socket exclude");
    refused(
        "path=x,rate_limit_group=none".into(),
        "rate_limit_group=none is wrong; --rate-limit-group gives no such id",
    );
    refused(
        "path=x,ops_size=1".into(),
        "needs both ops_size and ops_refill_time",
    );
    refused(
        "path=x,queue_affinity=[7@[0]]".into(),
        "there is no queue 7",
    );
    let disk = format!(
        "path={},queue_affinity=[0@[1023]]",
        text(&images.raw("raw"))
    );
    refused(disk, "to CPUs [1023] of the host");
}

#[test]
fn disks_of_a_group_share_its_limit() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let (raw, qcow2) = (images.raw("raw"), images.qcow2("qcow2", &[]));
    let begin = Instant::now();
    let ended = BareMetal::new(kvm)
        .word(&format!("blk_sectors={}", SIZE / 512))
        .builder(&["virtio_blk"])
        .option(
            "--rate-limit-group",
            "id=slow,ops_size=1000,ops_refill_time=1000",
        )
        .option(
            "--disk",
            format!("path={},rate_limit_group=slow", text(&raw)),
        )
        .option(
            "--disk",
            format!("path={},rate_limit_group=slow,sparse=off", text(&qcow2)),
        )
        .start()
        .wait();
    finish(ended, &["virtio_blk"]);
    // The guest makes more than six thousand requests, of which a thousand are free.
    assert!(begin.elapsed().as_secs() >= 5, "{:?}", begin.elapsed());
    check(&qcow2);
}

#[test]
fn the_thread_of_a_queue_is_bound_to_its_cpus() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let path = images.raw("disk");
    // The second request waits for an hour, and the VM with it.
    let disk = format!(
        "path={},id=d,num_queues=2,queue_affinity=[0@[0]],ops_size=1,ops_refill_time=3600000",
        text(&path)
    );
    let mut vmm = BareMetal::new(kvm)
        .word(&format!("blk_sectors={} blk_queues=2", SIZE / 512))
        .builder(&["virtio_blk"])
        .option("--disk", disk)
        .start();
    let tasks = PathBuf::from(format!("/proc/{}/task", vmm.pid()));
    // CPUs of the thread with this name; threads come and go meanwhile.
    let cpus = |name: &str| {
        fs::read_dir(&tasks).ok()?.flatten().find_map(|task| {
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let field = |key| {
                let line = status.lines().find_map(|l| l.strip_prefix(key))?;
                Some(line.trim().to_owned())
            };
            (field("Name:")? == name).then(|| field("Cpus_allowed_list:"))?
        })
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while cpus("d_q0").as_deref() != Some("0") {
        assert!(Instant::now() < deadline, "d_q0 is on {:?}", cpus("d_q0"));
        std::thread::yield_now();
    }
    vmm.signal(libc::SIGTERM);
    assert!(vmm.wait_exit().success());
}

/// An ext4 file system as the host makes it, with a file and its sum.
pub fn file_system(images: &Images) -> PathBuf {
    let content = images.path("content");
    fs::create_dir(&content).unwrap();
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i / 255 * 7 + i) as u8).collect();
    fs::write(content.join("from-host"), bytes).unwrap();
    let sum = Command::new("sha256sum")
        .arg("from-host")
        .current_dir(&content)
        .output()
        .unwrap();
    fs::write(content.join("from-host.sum"), sum.stdout).unwrap();
    let path = images.raw("file-system");
    run("mkfs.ext4", &["-q", "-d", text(&content), text(&path)]);
    path
}

/// The guest mounted it, read the host's file, wrote one: now the host looks.
pub fn check_file_system(images: &Images, raw: &Path) {
    run("e2fsck", &["-fn", text(raw)]);
    let found = images.path("found");
    fs::create_dir(&found).unwrap();
    for name in ["from-guest", "from-guest.sum"] {
        let command = format!("dump {name} {}", text(&found.join(name)));
        run("debugfs", &["-R", &command, text(raw)]);
    }
    let sums = Command::new("sha256sum")
        .args(["--check", "--strict", "from-guest.sum"])
        .current_dir(&found)
        .output()
        .unwrap();
    assert!(sums.status.success(), "{sums:?}");
}

#[test]
fn linux_reads_and_writes_a_file_system_on_a_raw_disk() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let raw = file_system(&images);
    Linux::new(kvm)
        .disk(format!("path={}", text(&raw)))
        .run("disk");
    check_file_system(&images, &raw);
}

#[test]
fn linux_reads_and_writes_a_file_system_on_qcow2_with_a_backing_file() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let base = file_system(&images);
    let before = fs::read(&base).unwrap();
    let top = images.qcow2("top", &["-b", text(&base), "-F", "raw"]);
    Linux::new(kvm)
        .disk(format!("path={},backing_files=on", text(&top)))
        .run("disk");
    check(&top);
    assert!(
        fs::read(&base).unwrap() == before,
        "the backing file changed"
    );
    let raw = images.path("raw");
    run(
        "qemu-img",
        &["convert", "-O", "raw", text(&top), text(&raw)],
    );
    check_file_system(&images, &raw);
}
