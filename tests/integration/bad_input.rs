//! Payloads that are none, and options that cannot be: one line that names the value, exit code 1, nothing left behind.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::{Ended, Kvm, Vmm, images, test_guest};

/// A directory in which the VMM runs and is to leave nothing.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn names(&self) -> Vec<PathBuf> {
        let mut names: Vec<PathBuf> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        names.sort();
        names
    }

    /// Starts the VMM with these options and a serial file; it refuses with a line that has all of `wanted`.
    fn refuses(&self, options: &[(&str, &str)], wanted: &[&str]) {
        let before = self.names();
        let mut builder = Vmm::builder()
            .directory(self.dir.path())
            .args(["--serial", "file=serial"]);
        for (name, value) in options {
            builder = builder.option(name, *value);
        }
        let ended = builder.start().wait();
        check(&ended, wanted);
        assert_eq!(self.names(), before, "files left behind");
    }

    fn refuses_kernel(&self, name: &str, bytes: &[u8], wanted: &[&str]) {
        let path = self.file(name, bytes);
        let mut all = vec![name];
        all.extend(wanted);
        self.refuses(&[("--kernel", path.to_str().unwrap())], &all);
    }
}

fn check(ended: &Ended, wanted: &[&str]) {
    assert_eq!(ended.out, "");
    let line = ended.expect_refusal();
    for part in wanted {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
    // A message does not repeat what its cause says.
    let parts: Vec<&str> = line.split(": ").collect();
    for (i, part) in parts.iter().enumerate() {
        assert!(!parts[..i].contains(part), "{part:?} is said twice: {line}");
    }
}

#[test]
fn kernels_that_do_not_open() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    place.refuses(&[("--kernel", "missing")], &["missing", "No such file"]);
    let dir = place.dir.path().to_str().unwrap();
    place.refuses(&[("--kernel", dir)], &[dir]);
    let kernel = test_guest().to_str().unwrap();
    place.refuses(
        &[("--kernel", kernel), ("--initramfs", "absent")],
        &["absent", "No such file"],
    );
}

#[test]
fn files_that_are_no_kernel() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    place.refuses_kernel("empty", b"", &["neither an ELF image nor a bzImage"]);
    place.refuses_kernel(
        "text",
        b"#!/bin/sh\necho hello\n",
        &["neither an ELF image"],
    );
    place.refuses_kernel("zeros", &[0; 65536], &["neither an ELF image"]);
    let mut image = images::small_elf();
    image[4] = 1;
    place.refuses_kernel("elf32", &image, &["not a 64-bit ELF image"]);
    let mut image = images::small_elf();
    image[5] = 2;
    place.refuses_kernel("big-endian", &image, &["little-endian"]);
    let mut image = images::small_elf();
    image[18] = 183;
    place.refuses_kernel("aarch64", &image, &["another machine", "183"]);
}

#[test]
fn truncated_kernels() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let image = images::small_elf();
    place.refuses_kernel("in-the-header", &image[..40], &["truncated"]);
    place.refuses_kernel("in-the-program-headers", &image[..80], &["truncated"]);
    place.refuses_kernel("in-the-segment", &image[..6000], &["truncated"]);
    let guest = fs::read(test_guest()).unwrap();
    place.refuses_kernel(
        "a-tenth-of-a-guest",
        &guest[..guest.len() / 10],
        &["truncated"],
    );
    let image = images::bzimage(test_guest());
    place.refuses_kernel("bzimage-in-the-header", &image[..0x240], &["truncated"]);
    place.refuses_kernel("bzimage-in-the-setup", &image[..800], &["truncated"]);
    place.refuses_kernel(
        "bzimage-in-the-kernel",
        &image[..image.len() / 2],
        &["truncated"],
    );
}

#[test]
fn segments_that_do_not_fit() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    place.refuses_kernel("overlap", &images::overlapping_elf(), &["overlap"]);
    for (name, address, size) in [
        ("beyond-the-end", 1 << 30, 4096),
        ("across-the-end", 511 << 20, 2 << 20),
        ("in-the-hole", 0xd000_0000, 4096),
        ("far-away", u64::MAX - 4095, 4096),
        ("all-there-is", 1 << 20, u64::MAX - (1 << 20)),
        ("on-the-tables", 0, 4096),
    ] {
        place.refuses_kernel(name, &images::elf_at(address, size), &[]);
    }
}

#[test]
fn kernels_without_a_way_in() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let mut image = images::small_elf();
    image[24..32].fill(0);
    place.refuses_kernel("entry-zero", &image, &["entry"]);
    image[24..32].copy_from_slice(&0x80_0000_u64.to_le_bytes());
    place.refuses_kernel("entry-elsewhere", &image, &["entry"]);
    place.refuses_kernel(
        "no-segments",
        &images::elf(0x10_0000, &[], 8192),
        &["no segment"],
    );
}

#[test]
fn bzimages_that_cannot_start() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let mut image = images::bzimage(test_guest());
    image[0x236] = 0;
    place.refuses_kernel("no-64-bit-entry", &image, &["64-bit"]);
    let mut image = images::bzimage(test_guest());
    image[0x230..0x234].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    place.refuses_kernel("misaligned", &image, &["0x100000", "0x200000"]);
    let mut image = images::bzimage(test_guest());
    image[0x206..0x208].copy_from_slice(&0x0105_u16.to_le_bytes());
    place.refuses_kernel("protocol-1.5", &image, &["1.05"]);
}

#[test]
fn payloads_bigger_than_memory() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let big = place.path("big");
    // A sparse file: nothing of it is ever read.
    fs::File::create(&big).unwrap().set_len(256 << 20).unwrap();
    place.refuses(
        &[
            ("--kernel", test_guest().to_str().unwrap()),
            ("--initramfs", big.to_str().unwrap()),
            ("--memory", "size=128M"),
        ],
        &["big", "268435456"],
    );
}

#[test]
fn an_empty_initramfs() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let nothing = place.file("nothing", b"");
    place.refuses(
        &[
            ("--kernel", test_guest().to_str().unwrap()),
            ("--initramfs", nothing.to_str().unwrap()),
        ],
        &["nothing", "empty"],
    );
}

#[test]
fn command_lines_that_are_too_long() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let long = "x".repeat(70_000);
    let kernel = test_guest().to_str().unwrap();
    let options = [("--kernel", kernel), ("--cmdline", long.as_str())];
    place.refuses(&options, &["command line", "70000"]);
    let options = [("--kernel", kernel), ("--cmdline", "name=köln")];
    place.refuses(&options, &["command line", "ö"]);
}

#[test]
fn a_serial_file_that_does_not_open() {
    let Some(_) = Kvm::here() else { return };
    let ended = Vmm::builder()
        .option("--kernel", test_guest())
        .args(["--serial", "file=/nonexistent/serial"])
        .start()
        .wait();
    check(&ended, &["/nonexistent/serial", "No such file"]);
}

#[test]
fn an_existing_serial_file_is_not_emptied_by_a_refusal() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let serial = place.file("serial", b"of the last run");
    place.refuses(&[("--kernel", "missing")], &["missing"]);
    assert_eq!(fs::read(&serial).unwrap(), b"of the last run");
}

/// These are refused before anything of the host is touched, so they need no `/dev/kvm`.
#[test]
fn options_that_cannot_be() {
    let place = Place::new();
    let kernel = place.file("kernel", &images::small_elf());
    let kernel = kernel.to_str().unwrap();
    for (option, value, wanted) in [
        ("--cpus", "boot=0", "boot"),
        ("--cpus", "boot=255", "boot"),
        ("--cpus", "boot=x", "x"),
        ("--cpus", "cores=2", "cores"),
        ("--cpus", "boot=4,max=2", "max=2"),
        ("--cpus", "boot=4,topology=1:1:1:1", "topology=1:1:1:1"),
        ("--memory", "size=0", "size"),
        ("--memory", "size=lots", "lots"),
        ("--memory", "size=65T", "size"),
        ("--memory", "size=16777217", "16777217"),
        ("--memory", "shared=perhaps", "perhaps"),
        ("--memory", "sise=1G", "sise"),
        ("--net", "user,tap=t0", "tap=t0"),
        ("--net", "user,fd=[3]", "fd=[3]"),
        ("--net", "user,ip=10.0.2.2", "ip=10.0.2.2"),
        ("--net", "user,host_mac=02:00:00:00:00:01", "host_mac=02:00"),
        ("--net", "user,num_queues=4", "num_queues=4"),
        ("--net", "user,mtu=68", "mtu=68"),
        ("--net", "user,network=10.0.2.0/30", "10.0.2.0/30"),
        ("--net", "user,hostfwd=2222-:22", "2222-:22"),
        ("--net", "user,hostfwd=[tcp::1-:2,sctp::1-:2]", "sctp"),
        ("--net", "user,hostfwd=tcp::1-10.0.2.99:2", "10.0.2.99"),
        ("--net", "user,dns=here", "dns=here"),
        ("--net", "hostfwd=tcp::1-:2", "hostfwd=tcp::1-:2"),
        ("--serial", "ttyy", "ttyy"),
        ("--serial", "file=", "file="),
    ] {
        let ended = Vmm::builder()
            .directory(place.dir.path())
            .option("--kernel", kernel)
            .option(option, value)
            .start()
            .wait();
        check(&ended, &[option, wanted]);
    }
    assert_eq!(place.names(), [Path::new(kernel)]);
}
