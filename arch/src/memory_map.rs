//! What the guest is told about its address space, as E820 ranges (ACPI 6.4, section 15): the zero page and PVH
//! start info carry the same list.
//!
//! ```
//! use arch::layout::ram_regions;
//! use arch::memory_map::{Kind, memory_map};
//!
//! let map = memory_map(&ram_regions(1 << 30));
//! assert_eq!(map[0].kind, Kind::Ram);
//! assert_eq!(map[0].size, 0x9fc00);
//! ```

use vm_memory::GuestAddress;

use crate::layout::{EBDA_START, HIGH_RAM_START, MMCONFIG_SIZE, MMCONFIG_START};

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
}

/// The map for these RAM regions (start, length in bytes; any order, neighbours are joined), sorted and without
/// overlap: firmware tables below 1 MiB and PCI configuration space are reserved.
pub fn memory_map(regions: &[(GuestAddress, u64)]) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        entry(EBDA_START, HIGH_RAM_START, Kind::Reserved),
        entry(
            MMCONFIG_START,
            MMCONFIG_START + MMCONFIG_SIZE,
            Kind::Reserved,
        ),
    ];
    for (start, end) in joined(regions) {
        // What is left of the region below, between and above the reserved ranges.
        let free = [
            (0, EBDA_START),
            (HIGH_RAM_START, MMCONFIG_START),
            (MMCONFIG_START + MMCONFIG_SIZE, u64::MAX),
        ];
        for (low, high) in free {
            let (low, high) = (start.max(low), end.min(high));
            if low < high {
                map.push(entry(low, high, Kind::Ram));
            }
        }
    }
    map.sort_unstable_by_key(|entry| entry.start);
    map
}

fn entry(start: u64, end: u64, kind: Kind) -> MemoryMapEntry {
    MemoryMapEntry {
        start,
        size: end - start,
        kind,
    }
}

/// Regions as sorted `(start, end)` with neighbours and overlaps joined; the end is exclusive.
pub(crate) fn joined(regions: &[(GuestAddress, u64)]) -> Vec<(u64, u64)> {
    let mut sorted: Vec<(u64, u64)> = regions
        .iter()
        .map(|(start, len)| (start.0, start.0.saturating_add(*len)))
        .filter(|(start, end)| start < end)
        .collect();
    sorted.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, end) in sorted {
        match joined.last_mut() {
            Some(last) if last.1 >= start => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ram_regions;

    fn ranges(regions: &[(GuestAddress, u64)]) -> Vec<(u64, u64, u32)> {
        memory_map(regions)
            .iter()
            .map(|e| (e.start, e.size, e.kind as u32))
            .collect()
    }

    #[test]
    fn small_guest() {
        assert_eq!(
            ranges(&ram_regions(128 << 20)),
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (0x10_0000, 127 << 20, 1),
                (0xe800_0000, 0x1000_0000, 2)
            ]
        );
    }

    #[test]
    fn guest_with_ram_above_the_hole() {
        let map = ranges(&ram_regions(6 << 30));
        assert_eq!(
            map[2..],
            [
                (0x10_0000, (3 << 30) - (1 << 20), 1),
                (0xe800_0000, 0x1000_0000, 2),
                (4 << 30, 3 << 30, 1)
            ]
        );
        let ram: u64 = map.iter().filter(|r| r.2 == 1).map(|r| r.1).sum();
        assert_eq!((6 << 30) - ram, 0x6_0400);
    }

    #[test]
    fn neighbours_are_joined_in_any_order() {
        let pieces = [
            (GuestAddress(64 << 20), 64 << 20),
            (GuestAddress(0), 64 << 20),
            (GuestAddress(1 << 40), 0),
        ];
        assert_eq!(ranges(&pieces), ranges(&ram_regions(128 << 20)));
    }

    #[test]
    fn no_region_makes_an_entry_overlap() {
        for regions in [
            vec![],
            vec![(GuestAddress(0), 0x1000)],
            vec![(GuestAddress(0), 0xa_0000)],
            vec![(GuestAddress(0), u64::MAX)],
            vec![(GuestAddress(u64::MAX - 5), u64::MAX)],
        ] {
            let map = memory_map(&regions);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].size <= pair[1].start, "{map:x?}");
            }
            assert!(map.iter().all(|entry| entry.size > 0));
        }
    }
}
