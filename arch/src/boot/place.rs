//! Where things fit in guest RAM.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::error::PlaceError;
use super::image::Segment;
use crate::layout::{HIGH_RAM_START, LOW_STRUCTURES};
use crate::memory_map::joined;

const PAGE: u64 = 0x1000;

/// Guest RAM as sorted `(start, end)`, the end exclusive, neighbours joined.
pub(super) struct Ram(Vec<(u64, u64)>);

impl Ram {
    pub(super) fn of<M: GuestMemoryBackend>(memory: &M) -> Self {
        let regions: Vec<_> = memory
            .iter()
            .map(|region| (region.start_addr(), region.len()))
            .collect();
        Self(joined(&regions))
    }

    /// Whether all of `start` up to `end` is RAM.
    pub(super) fn contains(&self, start: u64, end: u64) -> bool {
        self.0.iter().any(|ram| ram.0 <= start && end <= ram.1)
    }

    /// Checks segments, and sorts them by address.
    pub(super) fn check(&self, segments: &mut [Segment]) -> Result<(), PlaceError> {
        segments.sort_unstable_by_key(|segment| segment.address);
        for pair in segments.windows(2) {
            if let [first, second] = pair
                && first.end() > second.address
            {
                return Err(PlaceError::Overlap(first.address, second.address));
            }
        }
        for segment in segments {
            let (start, end) = (segment.address, segment.end());
            if LOW_STRUCTURES
                .iter()
                .any(|taken| start < taken.1 && taken.0 < end)
            {
                return Err(PlaceError::LowStructures { start, end });
            }
            if !self.contains(start, end) {
                return Err(PlaceError::OutsideRam { start, end });
            }
        }
        Ok(())
    }

    /// The highest page-aligned place for `size` bytes above 1 MiB and below `limit`, clear of `taken`
    /// (start and exclusive end).
    pub(super) fn highest(&self, size: u64, limit: u64, taken: (u64, u64)) -> Option<u64> {
        let fit = |start: u64, end: u64| {
            let address = end.checked_sub(size)? & !(PAGE - 1);
            (address >= start).then_some(address)
        };
        self.0.iter().rev().find_map(|&(start, end)| {
            let (start, end) = (start.max(HIGH_RAM_START), end.min(limit));
            if taken.1 <= start || end <= taken.0 {
                return fit(start, end);
            }
            fit(taken.1.max(start), end).or_else(|| fit(start, taken.0.min(end)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ram(ranges: &[(u64, u64)]) -> Ram {
        Ram(ranges.to_vec())
    }

    #[test]
    fn the_highest_place_is_page_aligned_and_clear_of_the_kernel() {
        let small = ram(&[(0, 128 * MIB)]);
        let kernel = (16 * MIB, 40 * MIB);
        assert_eq!(small.highest(1, u64::MAX, kernel), Some(128 * MIB - 0x1000));
        assert_eq!(
            small.highest(0x1001, u64::MAX, kernel),
            Some(128 * MIB - 0x2000)
        );
        assert_eq!(small.highest(88 * MIB, u64::MAX, kernel), Some(40 * MIB));
        // Only below the kernel is there room left, or nowhere.
        let low = (120 * MIB, 127 * MIB + 1);
        assert_eq!(small.highest(MIB, u64::MAX, low), Some(119 * MIB));
        assert_eq!(small.highest(119 * MIB, u64::MAX, low), Some(MIB));
        assert_eq!(small.highest(119 * MIB + 1, u64::MAX, low), None);
        assert_eq!(small.highest(u64::MAX, u64::MAX, low), None);
    }

    #[test]
    fn limits_hold() {
        let big = ram(&[(0, 3 << 30), (4 << 30, 8 << 30)]);
        let kernel = (16 * MIB, 40 * MIB);
        assert_eq!(big.highest(MIB, 3 << 30, kernel), Some((3 << 30) - MIB));
        assert_eq!(big.highest(MIB, 0x7fff_ffff, kernel), Some(0x7fef_f000));
        assert_eq!(big.highest(MIB, 16 * MIB, kernel), Some(15 * MIB));
        assert_eq!(big.highest(MIB, 20 * MIB, kernel), Some(15 * MIB));
        assert_eq!(big.highest(1, MIB, kernel), None);
    }

    #[test]
    fn no_place_is_wrong() {
        let ranges = ram(&[(0, 8 * MIB), (9 * MIB, 12 * MIB)]);
        for taken in (0..13).flat_map(|a| (a..14).map(move |b| (a * MIB + 5, b * MIB + 77))) {
            for size in [1, 0x1000, MIB, 2 * MIB, 3 * MIB, 7 * MIB] {
                for limit in [MIB, 5 * MIB, 10 * MIB + 3, u64::MAX] {
                    let Some(at) = ranges.highest(size, limit, taken) else {
                        continue;
                    };
                    assert!(ranges.contains(at, at + size));
                    assert!(at >= MIB && at + size <= limit && at % 0x1000 == 0);
                    assert!(at + size <= taken.0 || taken.1 <= at, "{at:#x} {taken:x?}");
                }
            }
        }
    }
}
