//! Who has which addresses above RAM: first memory that is not RAM from the start, then the PCI bus with its 64-bit BARs.

use std::ops::RangeInclusive;

use arch::layout;

/// The border between both lies at a multiple of this.
const GRANULE: u64 = 1 << 30;

/// What lies above RAM, first and last address each.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HighWindows {
    /// For memory that the guest finds beside its RAM.
    pub memory: Option<RangeInclusive<u64>>,
    /// For 64-bit BARs.
    pub pci: Option<RangeInclusive<u64>>,
}

impl HighWindows {
    /// For `ram_size` bytes of RAM, and physical addresses of `address_bits` bits. Memory gets the lower half of what is left, for
    /// kernels that reach less than the processor.
    pub fn new(ram_size: u64, address_bits: u8) -> Self {
        let ram_end = layout::ram_regions(ram_size)
            .last()
            .map_or(0, |(start, size)| start.0.saturating_add(*size));
        let start = ram_end
            .max(layout::RAM_64BIT_START)
            .checked_next_multiple_of(GRANULE)
            .unwrap_or(u64::MAX);
        let end = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
        let granules = end.saturating_sub(start) / GRANULE;
        let border = start.saturating_add(granules / 2 * GRANULE);
        let window = |start, end: u64| (start < end).then(|| start..=end - 1);
        Self {
            memory: window(start, border),
            pci: window(border, end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn half_of_what_is_above_ram_is_for_memory() {
        let windows = HighWindows::new(128 << 20, 36);
        assert_eq!(windows.memory, Some(4 * GIB..=34 * GIB - 1));
        assert_eq!(windows.pci, Some(34 * GIB..=64 * GIB - 1));
        let windows = HighWindows::new((6 << 30) + 4096, 36);
        assert_eq!(windows.memory, Some(8 * GIB..=36 * GIB - 1));
    }

    #[test]
    fn where_little_is_left_pci_gets_it() {
        let windows = HighWindows::new(62 << 30, 36);
        assert_eq!(windows.memory, None);
        assert_eq!(windows.pci, Some(63 * GIB..=64 * GIB - 1));
        let none = HighWindows {
            memory: None,
            pci: None,
        };
        assert_eq!(HighWindows::new(64 << 30, 36), none);
        assert_eq!(HighWindows::new(u64::MAX, 36), none);
    }
}
