//! One boot of Linux with every device that there is; `resources/guest/tests/devices.sh` looks at each from user space.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

use crate::linux::Linux;
use crate::support::{Kvm, initramfs};

const MIB: u64 = 1 << 20;
const HOST: &[u8] = b"words of the host\n";
const GUEST: &[u8] = b"words of the guest\n";

/// A file for a disk or persistent memory that begins with the host's words.
fn file(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    let file = File::create_new(&path).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(HOST, 0).unwrap();
    path
}

/// What the guest wrote at `offset`.
fn guests_words(path: &Path, offset: u64) {
    let mut bytes = vec![0; GUEST.len()];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    assert_eq!(bytes, GUEST, "{path:?}");
}

#[test]
fn linux_uses_every_device_at_once() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = initramfs::program("vsock_words", dir);
    let files = dir.join("initramfs");
    initramfs::with_files(&files, &[("tests/vsock_words", &program)]);
    let disk = file(dir, "disk", 4 * MIB);
    let pmem = file(dir, "pmem", 4 * MIB);
    let console = dir.join("console");
    let listener = UnixListener::bind(dir.join("vsock_5000")).unwrap();
    let peer = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut words = [0; 18];
        stream.read_exact(&mut words).unwrap();
        stream.write_all(b"read by the host").unwrap();
        words
    });

    let ended = Linux::new(kvm)
        .initramfs(&files)
        .disk(format!("path={}", disk.display()))
        .net("tap=,mac=2e:89:a8:e4:92:02")
        .memory_option("size=128M,hotplug_method=virtio-mem,hotplug_size=128M")
        .option("--console", format!("file={}", console.display()))
        .option("--rng", "src=/dev/urandom,iommu=on")
        .option(
            "--vsock",
            format!("cid=42,socket={}", dir.join("vsock").display()),
        )
        .option("--balloon", "size=0")
        .option("--pmem", format!("file={}", pmem.display()))
        .switch("--pvpanic")
        .switch("--watchdog")
        .run("devices");

    let lines: Vec<_> = ended
        .out
        .lines()
        .filter_map(|l| l.strip_prefix("DEVICE "))
        .collect();
    println!("{lines:#?}");
    let fine: Vec<_> = lines
        .iter()
        .filter_map(|l| l.split_once(" OK").map(|(name, _)| name))
        .collect();
    assert_eq!(
        fine,
        [
            "pci", "serial", "console", "disk", "net", "rng", "vsock", "balloon", "mem", "pmem",
            "pvpanic", "watchdog", "iommu"
        ]
    );
    for line in [
        "disk OK 8192 sectors",
        "net OK 2e:89:a8:e4:92:02",
        "vsock OK read by the host",
        "pmem OK 8192 sectors",
        "iommu OK virtio_rng",
    ] {
        assert!(lines.contains(&line), "no {line:?}");
    }
    guests_words(&disk, 512);
    guests_words(&pmem, 4096);
    let words = fs::read_to_string(console).unwrap();
    assert_eq!(words.trim_end(), "words for the virtio console");
    assert_eq!(peer.join().unwrap(), GUEST[..18]);
}
