//! How a VMM starts, and what it takes up.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::vmm::{MEMORY_MIB, Vmm};

/// Milliseconds from the start of the process to the first byte that the guest said.
///
/// # Errors
/// When it says nothing.
pub fn first_byte(binary: &Path, guest: &Path) -> Result<f64> {
    let mut vmm = Vmm::start(binary, guest, "test=boot", &[], false)?;
    let time = vmm.first_byte()?;
    vmm.finish()?;
    Ok(time.as_secs_f64() * 1e3)
}

/// KiB of resident memory that are not guest RAM, while a guest is idle.
///
/// # Errors
/// When the guest doesn't get there.
pub fn resident(binary: &Path, guest: &Path) -> Result<f64> {
    let mut vmm = Vmm::start(binary, guest, "test=boot end=halt", &[], false)?;
    vmm.done()?;
    let path = format!("/proc/{}/smaps", vmm.pid());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(beside_ram(&text, MEMORY_MIB * 1024) as f64)
}

/// KiB of the binary.
///
/// # Errors
/// When it is gone, or a script around another program.
pub fn size(binary: &Path) -> Result<f64> {
    let mut start = [0; 2];
    let read = fs::File::open(binary).and_then(|mut file| file.read_exact(&mut start));
    read.with_context(|| format!("reading {}", binary.display()))?;
    ensure!(start != *b"#!", "{} is a script", binary.display());
    let metadata = fs::metadata(binary).with_context(|| binary.display().to_string())?;
    Ok(metadata.len() as f64 / 1024.0)
}

/// Resident KiB of all mappings that are smaller than guest RAM, which is one mapping.
fn beside_ram(smaps: &str, ram: u64) -> u64 {
    let mut size = 0;
    let mut total = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (
            words.next(),
            words.next().and_then(|word| word.parse().ok()),
        );
        match (key, value) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Rss:"), Some(kib)) if size < ram => total += kib,
            _ => {}
        }
    }
    total
}

#[test]
fn guest_ram_is_left_out() {
    let smaps = "\
7f00-7f01 rw-s 0 00:01 7 /memfd:ram (deleted)
Size:             131072 kB
Rss:              100000 kB
7f02-7f03 r-xp 0 00:01 8 /vmm
Size:                100 kB
Rss:                  60 kB
7f04-7f05 rw-p 0 00:00 0 [heap]
Size:                 40 kB
Rss:                   4 kB
";
    assert_eq!(beside_ram(smaps, 131_072), 64);
}
