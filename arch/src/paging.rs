//! Page tables that the 64-bit Linux protocol starts with (Intel SDM volume 3, section 4.5): the first GiB mapped
//! to itself in 2 MiB pages, with 4 or 5 levels. The kernel, its zero page and command line lie there; the kernel
//! maps the rest for itself.

use crate::layout::{PAGE_TABLES_END, PD_START, PDPT_START, PML4_START, PML5_START};

/// Bytes mapped from address 0.
pub const MAPPED: u64 = 1 << 30;
/// Bytes of the tables, to be placed at [`PML5_START`].
pub const TABLES_SIZE: usize = (PAGE_TABLES_END - PML5_START) as usize;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

/// The tables' bytes. They serve both depths: 4-level paging starts at the PML4.
pub fn page_tables() -> Vec<u8> {
    let mut bytes = vec![0; TABLES_SIZE];
    let mut put = |at: u64, entry: u64| {
        let offset = (at - PML5_START) as usize;
        if let Some(slot) = bytes.get_mut(offset..offset + 8) {
            slot.copy_from_slice(&entry.to_le_bytes());
        }
    };
    for (table, next) in [
        (PML5_START, PML4_START),
        (PML4_START, PDPT_START),
        (PDPT_START, PD_START),
    ] {
        put(table, next | PRESENT | WRITABLE);
    }
    for index in 0..MAPPED / LARGE_PAGE {
        put(
            PD_START + index * 8,
            (index * LARGE_PAGE) | PRESENT | WRITABLE | LARGE,
        );
    }
    bytes
}

/// Address of the root table, which goes into CR3.
pub fn root(five_level: bool) -> u64 {
    if five_level { PML5_START } else { PML4_START }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the CPU finds for `address`, `None` for a page fault.
    fn walk(tables: &[u8], root: u64, levels: u32, address: u64) -> Option<u64> {
        let mut table = root;
        for level in (0..levels).rev() {
            let index = address >> (12 + 9 * level) & 0x1ff;
            let at = usize::try_from(table - PML5_START + index * 8).unwrap();
            let entry = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
            if entry & 3 != 3 {
                return None;
            }
            if level == 1 && entry & 0x80 != 0 {
                return Some((entry & !0x1f_ffff) | (address & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        Some(table | (address & 0xfff))
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself_and_nothing_else() {
        let tables = page_tables();
        assert_eq!(tables.len(), 0x4000);
        for (root, levels) in [(root(false), 4), (root(true), 5)] {
            for address in [
                0,
                0x1234,
                0x10_0000,
                0x20_0000 - 1,
                0x100_0000,
                (1 << 30) - 1,
            ] {
                assert_eq!(walk(&tables, root, levels, address), Some(address));
            }
            for address in [1 << 30, 4 << 30, 1 << 39, 1 << 47] {
                assert_eq!(walk(&tables, root, levels, address), None);
            }
        }
    }

    #[test]
    fn entries_are_these_bytes() {
        let tables = page_tables();
        assert_eq!(tables[..8], 0xa003u64.to_le_bytes());
        assert_eq!(tables[0x1000..0x1008], 0xb003u64.to_le_bytes());
        assert_eq!(tables[0x2000..0x2008], 0xc003u64.to_le_bytes());
        assert_eq!(tables[0x3000..0x3008], 0x83u64.to_le_bytes());
        assert_eq!(tables[0x3008..0x3010], 0x20_0083u64.to_le_bytes());
        assert_eq!(tables[0x3ff8..], 0x3fe0_0083u64.to_le_bytes());
    }
}
