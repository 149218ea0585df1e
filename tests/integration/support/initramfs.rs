//! The Linux guests' initramfs with further files, and programs that run in it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::asset;

/// Writes to `to` the initramfs of the Linux guests followed by an archive with `files`, each executable by its path without the first `/`.
/// The kernel unpacks both. The directories must be there.
pub fn with_files(to: &Path, files: &[(&str, &[u8])]) {
    let mut all = fs::read(asset("initramfs.cpio")).expect("the initramfs");
    align(&mut all);
    for (inode, (name, contents)) in (1..).zip(files) {
        entry(&mut all, inode, 0o100_755, name, contents);
    }
    entry(&mut all, 0, 0, "TRAILER!!!", &[]);
    fs::write(to, all).expect("writing the initramfs");
}

/// An entry of the kernel's format (Linux, driver-api/early-userspace/buffer-format).
fn entry(archive: &mut Vec<u8>, inode: u32, mode: u32, name: &str, contents: &[u8]) {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a small file");
    let name = [name.as_bytes(), b"\0"].concat();
    // Inode, mode, owner, group, links, time, size, four device numbers, bytes of the name, checksum.
    let size = len(contents);
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(&name), 0];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08X}").bytes());
    }
    archive.extend(name);
    align(archive);
    archive.extend(contents);
    align(archive);
}

fn align(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Builds the program in `tests/integration/guest/NAME.rs`, which needs nothing at all where it runs.
pub fn program(name: &str, dir: &Path) -> Vec<u8> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/integration/guest")
        .join(name)
        .with_extension("rs");
    let compiler = env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from);
    let out = dir.join(name);
    let status = Command::new(compiler)
        .args(["--edition", "2024", "-O"])
        .args(["-C", "target-feature=+crt-static", "-C", "panic=abort"])
        .args(["-C", "strip=symbols", "-o"])
        .arg(&out)
        .arg(&source)
        .status()
        .expect("starting the compiler");
    assert!(status.success(), "building {} failed", source.display());
    fs::read(out).expect("the program")
}
