//! PVH start info, module list and memory map (Xen `public/arch-x86/hvm/start_info.h`, version 1).

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use crate::layout::{PVH_MEMMAP_START, PVH_MODLIST_START};
use crate::memory_map::MemoryMapEntry;

/// Bytes of a memory map entry.
pub const MEMORY_MAP_ENTRY_SIZE: usize = size_of::<hvm_memmap_table_entry>();

/// Version with a memory map.
const VERSION: u32 = 1;

/// What the three structures are made from.
#[derive(Clone, Copy, Debug)]
pub struct PvhInfo<'a> {
    /// Guest-physical address of the NUL-terminated command line.
    pub cmdline: u64,
    /// Guest-physical address and size in bytes of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    /// Guest-physical address of the RSDP.
    pub rsdp: Option<u64>,
    /// The memory map.
    pub memory_map: &'a [MemoryMapEntry],
}

/// The start info, to be placed at [`crate::layout::PVH_INFO_START`].
pub fn start_info(info: &PvhInfo<'_>) -> Vec<u8> {
    hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        flags: 0,
        nr_modules: info.initramfs.is_some().into(),
        modlist_paddr: info.initramfs.map_or(0, |_| PVH_MODLIST_START),
        cmdline_paddr: info.cmdline,
        rsdp_paddr: info.rsdp.unwrap_or(0),
        memmap_paddr: PVH_MEMMAP_START,
        // A map of `PVH_MEMMAP_SIZE` bytes has far fewer.
        memmap_entries: info.memory_map.len() as u32,
        reserved: 0,
    }
    .as_slice()
    .to_vec()
}

/// The module list, to be placed at [`PVH_MODLIST_START`]: the initramfs, or nothing.
pub fn modules(info: &PvhInfo<'_>) -> Vec<u8> {
    info.initramfs.map_or_else(Vec::new, |(paddr, size)| {
        hvm_modlist_entry {
            paddr,
            size,
            ..hvm_modlist_entry::default()
        }
        .as_slice()
        .to_vec()
    })
}

/// The memory map, to be placed at [`PVH_MEMMAP_START`].
pub fn memory_map(info: &PvhInfo<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in info.memory_map {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        };
        bytes.extend_from_slice(entry.as_slice());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::Kind;

    fn le(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    const MAP: [MemoryMapEntry; 2] = [
        MemoryMapEntry {
            start: 0,
            size: 0x9_fc00,
            kind: Kind::Ram,
        },
        MemoryMapEntry {
            start: 0xe800_0000,
            size: 0x1000_0000,
            kind: Kind::Reserved,
        },
    ];

    #[test]
    fn all_fields() {
        let info = PvhInfo {
            cmdline: 0x2_0000,
            initramfs: Some((0x700_0000, 0x1234)),
            rsdp: Some(0xa_0000),
            memory_map: &MAP,
        };
        assert_eq!(
            start_info(&info),
            le(&[
                0x1_336e_c578,
                0x1_0000_0000,
                0x6040,
                0x2_0000,
                0xa_0000,
                0x7000,
                2
            ])
        );
        assert_eq!(modules(&info), le(&[0x700_0000, 0x1234, 0, 0]));
        assert_eq!(
            memory_map(&info),
            le(&[0, 0x9_fc00, 1, 0xe800_0000, 0x1000_0000, 2])
        );
    }

    #[test]
    fn what_is_absent_is_zero() {
        let info = PvhInfo {
            cmdline: 0x2_0000,
            initramfs: None,
            rsdp: None,
            memory_map: &[],
        };
        assert_eq!(
            start_info(&info),
            le(&[0x1_336e_c578, 0, 0, 0x2_0000, 0, 0x7000, 0])
        );
        assert_eq!(modules(&info), []);
        assert_eq!(memory_map(&info), []);
    }
}
