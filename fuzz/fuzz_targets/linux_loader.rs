//! Kernel and initramfs files that are anything but that, and command lines, loaded for a guest of 4 MiB.
//!
//! Holds to: `arch::boot::load` gives an error or a machine that can start: an entry and an initramfs in RAM, the initramfs and the
//! command line there byte for byte, and room for the boot data. No panic, bounded time.
//!
//! The input is the lengths of initramfs and command line (two bytes each, little-endian), the kernel, and those two.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::LazyLock;

use arch::boot::{Payload, load};
use arch::layout::HIGH_RAM_START;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of RAM.
const RAM: u64 = 4 << 20;

static MEMORY: LazyLock<GuestMemoryMmap> = LazyLock::new(|| {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("4 MiB of memory")
});
static FILES: LazyLock<[File; 2]> =
    LazyLock::new(|| [(); 2].map(|()| tempfile::tempfile().expect("a temporary file")));

/// A handle on a file that holds `bytes`.
fn filled(file: &File, bytes: &[u8]) -> File {
    file.set_len(0).expect("emptying the file");
    file.write_all_at(bytes, 0).expect("writing the file");
    file.try_clone().expect("another handle")
}

fn memory(at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    MEMORY
        .read_slice(&mut bytes, GuestAddress(at))
        .expect("what was loaded is in RAM");
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((lengths, rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let [a, b, c, d] = *lengths;
    let cut = |bytes: &[u8], len| {
        bytes
            .len()
            .saturating_sub(usize::from(u16::from_le_bytes(len)))
    };
    let (rest, cmdline) = rest.split_at(cut(rest, [c, d]));
    let (kernel, initramfs) = rest.split_at(cut(rest, [a, b]));
    let Ok(cmdline) = std::str::from_utf8(cmdline) else {
        return;
    };

    let [kernel_file, initramfs_file] = &*FILES;
    let mut kernel_file = filled(kernel_file, kernel);
    let mut initramfs_file = filled(initramfs_file, initramfs);
    let loaded = load(
        &*MEMORY,
        Payload {
            kernel: &mut kernel_file,
            kernel_name: Path::new("kernel"),
            initramfs: (!initramfs.is_empty())
                .then_some((&mut initramfs_file, Path::new("initramfs"))),
            cmdline,
        },
    );
    let Ok(loaded) = loaded else {
        return;
    };
    assert!(loaded.entry < RAM, "entry {:#x}", loaded.entry);
    assert_eq!(loaded.initramfs.is_some(), !initramfs.is_empty());
    if let Some((at, len)) = loaded.initramfs {
        assert!(at >= HIGH_RAM_START, "initramfs at {at:#x}");
        assert_eq!(len, initramfs.len() as u64);
        assert!(
            memory(at, initramfs.len()) == initramfs,
            "the initramfs was overwritten"
        );
    }
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    assert!(
        memory(loaded.cmdline_address, line.len()) == line,
        "the command line was overwritten"
    );
    loaded
        .write_boot_data(&*MEMORY, Some(0xa_0000))
        .expect("there is room for the boot data");
    assert!(
        memory(loaded.cmdline_address, line.len()) == line,
        "boot data overwrote the command line"
    );
});
