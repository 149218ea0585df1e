//! What several tests share: QEMU's tools as an oracle, random numbers, a storage that records.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output};

use qcow::Image;

fn run(tool: &str, args: &[&str]) -> Output {
    match Command::new(tool).args(args).output() {
        Ok(output) => output,
        Err(e) => panic!(
            "{tool} does not start ({e}): these tests need QEMU's image tools, package qemu-utils"
        ),
    }
}

/// Runs `qemu-img`, which must succeed; its standard output.
pub fn qemu_img(args: &[&str]) -> String {
    // LUKS needs the CPU time that a short calculation takes, and gives up where the clock has not moved meanwhile.
    let no_clock = |out: &Output| {
        String::from_utf8_lossy(&out.stderr).contains("Unable to get accurate CPU usage")
    };
    let out = (0..50)
        .map(|_| run("qemu-img", args))
        .find(|out| !no_clock(out))
        .expect("qemu-img never saw its own CPU time move");
    assert!(
        out.status.success(),
        "qemu-img {args:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// Runs commands of `qemu-io` on an image; each must succeed.
pub fn qemu_io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(path.to_str().unwrap());
    let out = run("qemu-io", &args);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(
        out.status.success() && !text.contains("failed") && !text.contains("rror"),
        "qemu-io {commands:?}: {text}"
    );
}

/// What `qemu-img check` finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Clean,
    Leaks,
    Broken(String),
}

pub fn qemu_check(path: &Path) -> Verdict {
    let out = run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    match out.status.code() {
        Some(0) => Verdict::Clean,
        Some(3) => Verdict::Leaks,
        _ => Verdict::Broken(format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        )),
    }
}

/// The image's disk as QEMU reads it.
pub fn qemu_read(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("as-read");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// Numbers that are the same on each run (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// A range of at most `longest` bytes within `size`, often aligned to something.
    pub fn range(&mut self, size: u64, longest: u64) -> (u64, u64) {
        let align = [1, 512, 4096, 65536][self.below(4) as usize];
        let offset = self.below(size) / align * align;
        let length = (self.below(longest) + 1)
            .next_multiple_of(align)
            .min(size - offset);
        (offset, length)
    }

    /// Bytes that compress to about half, none of them a run of zeros.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(n + 8);
        while out.len() < n {
            let x = self.next();
            out.extend_from_slice(&(x | 0x0101_0101_0101_0101).to_le_bytes());
            if x & 1 == 0 {
                out.extend_from_slice(&[(x >> 8) as u8 | 1; 16]);
            }
        }
        out.truncate(n);
        out
    }
}

/// Panics with the first difference only.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths differ");
    if let Some(i) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {i:#x} is {:#x}, not {:#x}",
            ours[i], theirs[i]
        );
    }
}

/// Discards a range of the disk, and of `model`.
pub fn discard(image: &Image, model: &mut [u8], (offset, length): (u64, u64)) {
    image.discard(offset, length).unwrap();
    model[offset as usize..(offset + length) as usize].fill(0);
}

/// Writes zeroes to a range of the disk, and of `model`.
pub fn write_zeroes(image: &Image, model: &mut [u8], (offset, length): (u64, u64)) {
    image.write_zeroes(offset, length).unwrap();
    model[offset as usize..(offset + length) as usize].fill(0);
}

/// Writes random bytes to a range of the disk, and of `model`.
pub fn write(image: &Image, model: &mut [u8], (offset, length): (u64, u64), random: &mut Random) {
    let bytes = random.bytes(length as usize);
    image.write_at(&bytes, offset).unwrap();
    model[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
}
