//! Payloads good and bad, from hand-built images.

mod bad;
mod good;
mod images;
mod random;

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{BootError, Loaded, Payload, load};
use crate::layout::ram_regions;

type Memory = GuestMemoryMmap<()>;

fn memory(size: u64) -> Memory {
    let ranges: Vec<_> = ram_regions(size)
        .into_iter()
        .map(|(start, len)| (start, len as usize))
        .collect();
    Memory::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn boot(
    memory: &Memory,
    kernel: &[u8],
    initramfs: Option<&[u8]>,
    cmdline: &str,
) -> Result<Loaded, BootError> {
    let mut kernel = file(kernel);
    let mut initramfs = initramfs.map(file);
    load(
        memory,
        Payload {
            kernel: &mut kernel,
            kernel_name: Path::new("/images/kernel"),
            initramfs: initramfs.as_mut().map(|f| (f, Path::new("/images/initrd"))),
            cmdline,
        },
    )
}

/// The error and its causes, as a person sees them.
fn line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}

fn bytes(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn word(memory: &Memory, at: u64) -> u64 {
    u64::from_le_bytes(bytes(memory, at, 8).try_into().unwrap())
}

fn is_zero(memory: &Memory) -> bool {
    memory.iter().all(|region| {
        let region = vm_memory::GuestMemoryRegion::start_addr(region).0;
        (0..128).all(|mib| {
            let at = region + (mib << 20);
            !memory.address_in_range(GuestAddress(at))
                || bytes(memory, at, 1 << 20).iter().all(|b| *b == 0)
        })
    })
}
