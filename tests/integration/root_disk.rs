//! Debian on a partitioned disk: our kernel finds the partition, mounts it as `/`, and Debian's init runs a test that writes
//! there (`resources/guest/debian`). Afterwards the host looks at the image, the file system and every file.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;

use crate::support::process::Builder;
use crate::support::report::finish;
use crate::support::{Kvm, Vmm, asset, test_guest};

/// Where `scripts/prepare_guest_assets.sh` puts the only partition, in bytes and with a unit that `dd` knows.
const PARTITION: &str = "1M";

fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; qemu-utils and e2fsprogs have the tools"))
}

/// Runs a program of the host, which is to end with one of these exit codes.
fn run(program: &str, args: &[&str], codes: &[i32]) -> Output {
    let output = output(program, args);
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| codes.contains(&code)),
        "{program} {args:?}: {output:?}"
    );
    output
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with the disk of one test.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn raw(&self) -> PathBuf {
        let path = self.path("disk.raw");
        let debian = asset("debian.raw");
        run("cp", &["--sparse=always", text(&debian), text(&path)], &[0]);
        path
    }

    /// An empty qcow2 image on top of the raw one.
    fn overlay(&self, base: &Path) -> PathBuf {
        let path = self.path("disk.qcow2");
        let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        run(
            "qemu-img",
            &[&args[..], &[text(base), text(&path)]].concat(),
            &[0],
        );
        path
    }

    /// The partition of a raw disk as a file of its own.
    fn partition(&self, disk: &Path) -> PathBuf {
        let path = self.path("partition");
        let from = format!("if={}", text(disk));
        let to = format!("of={}", text(&path));
        let skip = format!("skip={PARTITION}");
        let args = ["bs=1M", "iflag=skip_bytes", "conv=sparse", "status=none"];
        run("dd", &[&args[..], &[&from, &to, &skip]].concat(), &[0]);
        path
    }

    /// The partition of a qcow2 disk, whose data `qemu-img` collects from it and its backing file.
    fn partition_of_overlay(&self, disk: &Path) -> PathBuf {
        let raw = self.path("flat.raw");
        let args = ["convert", "-O", "raw", text(disk), text(&raw)];
        run("qemu-img", &args, &[0]);
        self.partition(&raw)
    }

    /// Every file that the guest's test has written is there, as it was left.
    fn check_files(&self, partition: &Path) {
        let found = self.path("found");
        fs::create_dir(&found).unwrap();
        let command = format!("rdump /var/ch {}", text(&found));
        run("debugfs", &["-R", &command, text(partition)], &[0]);
        check_files(&found.join("ch"));
    }
}

/// Starts Debian on a disk.
fn start(_: Kvm, disk: &str, words: &str) -> Vmm {
    let cmdline = fs::read_to_string(asset("cmdline")).unwrap();
    Vmm::builder()
        .patience(Duration::from_secs(580))
        .option("--kernel", asset("vmlinux"))
        .option(
            "--cmdline",
            format!(
                "{} quiet root=/dev/vda1 rw init=/sbin/init {words}",
                cmdline.trim_end()
            ),
        )
        .option("--memory", "size=256M")
        .option("--serial", "tty")
        .option("--disk", disk)
        .start()
}

/// What the command lines in Cloud Hypervisor's introduction have in common, as they are written there.
fn introduced(kernel: &Path, disk: &Path) -> Builder {
    Vmm::builder()
        .option("--kernel", kernel)
        .option("--disk", format!("path={}", text(disk)))
        .option("--cpus", "boot=4")
        .option("--memory", "size=1024M")
        .option("--net", "tap=,mac=,ip=,mask=")
        .args(["--rng"])
        .own_network()
}

/// Debian does its work and powers off.
fn run_debian(vmm: Vmm) {
    let ended = vmm.wait().expect_clean();
    for line in [
        "CH-ROOT: Debian 12.",
        "CH-ROOT: / is /dev/root ext4 rw",
        "CH-ROOT: synced",
        "CH-ROOT: read-only",
    ] {
        assert!(
            ended.out.lines().any(|l| l.starts_with(line)),
            "no {line:?}"
        );
    }
}

/// The bytes of `put` in `ch-root-disk`: words of xorshift32, little-endian.
fn data(seed: u32, bytes: usize) -> Vec<u8> {
    let mut x = seed;
    let words = std::iter::from_fn(|| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        Some(x.to_le_bytes())
    });
    words.take(bytes / 4).flatten().collect()
}

/// The directory `/var/ch` as `ch-root-disk` leaves it.
fn check_files(dir: &Path) {
    let mut patched = data(4, 1 << 16);
    patched.splice(9_999..29_999, data(5, 20_000));
    let mut holed = data(7, 1 << 16);
    holed[16_384..49_152].fill(0);
    for (name, wanted) in [
        ("plain", data(1, 1 << 18)),
        ("saved", data(3, 1 << 16)),
        ("patched", patched),
        ("holed", holed),
        ("direct", data(9, 1 << 16)),
    ] {
        let bytes = fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(
            bytes == wanted,
            "{name} differs; it has {} bytes",
            bytes.len()
        );
    }

    check_sparse(&dir.join("sparse"));
    assert_eq!(
        names(dir),
        [
            "direct", "hard", "holed", "patched", "plain", "saved", "soft", "sparse", "sums",
            "tree"
        ]
    );
    let tree = dir.join("tree");
    let mut wanted: Vec<_> = (4..=40).step_by(2).map(|n| n.to_string()).collect();
    wanted.push("deeper".into());
    wanted.sort();
    assert_eq!(names(&tree), wanted);
    let said = |path: PathBuf| fs::read_to_string(path).unwrap();
    for n in (4..=40).step_by(2) {
        assert_eq!(said(tree.join(n.to_string())), format!("small file {n}\n"));
    }
    assert_eq!(said(tree.join("deeper/two")), "small file 2\n");
    assert_eq!(said(dir.join("hard")), "small file 4\n");
    assert_eq!(
        fs::read_link(dir.join("soft")).unwrap(),
        Path::new("tree/6")
    );
}

/// Nothing, and data far behind it, past the end of the disk.
fn check_sparse(path: &Path) {
    let mut file = fs::File::open(path).unwrap();
    let start = 500_000_000;
    assert_eq!(file.metadata().unwrap().len(), start + (1 << 15));
    let mut bytes = vec![1; 1 << 16];
    file.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 0), "data at the start");
    file.seek(SeekFrom::Start(start - (1 << 15))).unwrap();
    file.read_exact(&mut bytes).unwrap();
    let (before, after) = bytes.split_at(1 << 15);
    assert!(before.iter().all(|b| *b == 0), "data before its place");
    assert!(after == data(6, 1 << 15), "what is far behind differs");
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn sha256(path: &Path) -> Vec<u8> {
    run("sha256sum", &[text(path)], &[0]).stdout
}

/// A firmware and a disk. Ours looks for a partition and loads nothing.
#[test]
fn the_introduced_command_line_with_a_firmware() {
    let Some(_) = Kvm::here() else { return };
    let images = Images::new();
    let disk = images.raw();
    let vmm = introduced(test_guest(), &disk)
        .option("--serial", "tty")
        .start();
    let report = finish(vmm.wait(), &["firmware"]);
    // Block, network, entropy.
    assert_eq!(report.values("virtio"), ["2", "1", "4"]);
    assert!(report.value("partition").starts_with("2048 "));
}

/// A kernel and a disk, told with the words of the introduction alone; the console is the virtio one.
#[test]
fn debian_on_a_raw_disk_by_the_introduced_command_line() {
    let Some(_) = Kvm::here() else { return };
    let images = Images::new();
    let disk = images.raw();
    let vmm = introduced(&asset("vmlinux"), &disk)
        .option("--cmdline", "console=hvc0 root=/dev/vda1 rw")
        // Four processors, and none of the words that save a KVM without hardware its work.
        .patience(Duration::from_secs(1400))
        .start();
    run_debian(vmm);
    let partition = images.partition(&disk);
    run("e2fsck", &["-fn", text(&partition)], &[0]);
    images.check_files(&partition);
}

#[test]
fn debian_on_qcow2_with_a_backing_file() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let base = images.raw();
    let before = sha256(&base);
    let disk = images.overlay(&base);
    run_debian(start(
        kvm,
        &format!("path={},backing_files=on", text(&disk)),
        "",
    ));
    run("qemu-img", &["check", "-q", text(&disk)], &[0]);
    assert_eq!(sha256(&base), before, "the backing file changed");
    let partition = images.partition_of_overlay(&disk);
    run("e2fsck", &["-fn", text(&partition)], &[0]);
    images.check_files(&partition);
}

/// The guest has synced and still has its file system mounted when the VMM is killed.
#[test]
fn what_debian_synced_outlives_a_killed_vmm() {
    let Some(kvm) = Kvm::here() else { return };
    let images = Images::new();
    let base = images.raw();
    let disk = images.overlay(&base);
    let options = format!("path={},backing_files=on", text(&disk));
    let mut vmm = start(kvm, &options, "ch.wait");
    vmm.wait_for("CH-ROOT: synced");
    vmm.signal(libc::SIGKILL);
    drop(vmm);
    // 3 is: leaked clusters, and nothing worse.
    run("qemu-img", &["check", "-q", text(&disk)], &[0, 3]);
    let partition = images.partition_of_overlay(&disk);
    // 1 is: the journal was replayed, and what it left open is done.
    run("e2fsck", &["-fp", text(&partition)], &[0, 1]);
    run("e2fsck", &["-fn", text(&partition)], &[0]);
    images.check_files(&partition);
}
