//! Ranges of addresses, first fit from either end.

use std::collections::BTreeMap;

use crate::AllocatorError;

/// Gives out ranges of one window of addresses.
#[derive(Clone, Debug)]
pub struct AddressAllocator {
    first: u64,
    last: u64,
    /// Last address of each range that is taken, by its first.
    taken: BTreeMap<u64, u64>,
}

impl AddressAllocator {
    /// A window of `size` bytes from `base` on, all of it free. An error is [`AllocatorError::Range`].
    pub fn new(base: u64, size: u64) -> Result<Self, AllocatorError> {
        let last = last(base, size).ok_or(AllocatorError::Range { base, size })?;
        Ok(Self {
            first: base,
            last,
            taken: BTreeMap::new(),
        })
    }

    /// The lowest `size` free bytes at a multiple of `alignment`, a power of two: their first address.
    pub fn allocate(&mut self, size: u64, alignment: u64) -> Result<u64, AllocatorError> {
        let found = self.check(size, alignment)?.lowest(size, alignment);
        self.take(found, size, alignment)
    }

    /// As [`allocate`](Self::allocate), from the top of the window down.
    pub fn allocate_from_top(&mut self, size: u64, alignment: u64) -> Result<u64, AllocatorError> {
        let found = self.check(size, alignment)?.highest(size, alignment);
        self.take(found, size, alignment)
    }

    /// The `size` bytes from `base` on, and no others.
    pub fn allocate_at(&mut self, base: u64, size: u64) -> Result<(), AllocatorError> {
        let end = last(base, size).ok_or(AllocatorError::Range { base, size })?;
        if base < self.first || end > self.last {
            return Err(AllocatorError::Outside {
                base,
                size,
                first: self.first,
                last: self.last,
            });
        }
        // Of the ranges that start at or before the end, only the nearest can reach the base.
        if let Some((&other, _)) = self
            .taken
            .range(..=end)
            .next_back()
            .filter(|(_, last)| **last >= base)
        {
            return Err(AllocatorError::Taken { base, size, other });
        }
        self.taken.insert(base, end);
        Ok(())
    }

    /// Takes back the whole range that was given out at `base`, and says how many bytes it had.
    pub fn free(&mut self, base: u64) -> Result<u64, AllocatorError> {
        let last = self
            .taken
            .remove(&base)
            .ok_or(AllocatorError::NotGivenOut(base))?;
        // A range of all 2^64 addresses cannot be given out: its size is no u64.
        Ok(last - base + 1)
    }

    /// First address of the window.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Last address of the window.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// First and last address of each range that is taken, in order.
    pub fn taken(&self) -> impl Iterator<Item = (u64, u64)> {
        self.taken.iter().map(|(&first, &last)| (first, last))
    }

    fn check(&self, size: u64, alignment: u64) -> Result<&Self, AllocatorError> {
        if size == 0 {
            return Err(AllocatorError::Range {
                base: self.first,
                size,
            });
        }
        if !alignment.is_power_of_two() {
            return Err(AllocatorError::Alignment(alignment));
        }
        Ok(self)
    }

    fn lowest(&self, size: u64, alignment: u64) -> Option<u64> {
        let mut from = Some(self.first);
        for (&taken, &end) in &self.taken {
            // After the last address there is no gap.
            let Some(before) = taken.checked_sub(1) else {
                from = end.checked_add(1);
                continue;
            };
            if let Some(fit) = from.and_then(|from| low_fit(from, before, size, alignment)) {
                return Some(fit);
            }
            from = end.checked_add(1);
        }
        low_fit(from?, self.last, size, alignment)
    }

    fn highest(&self, size: u64, alignment: u64) -> Option<u64> {
        let mut to = Some(self.last);
        for (&taken, &end) in self.taken.iter().rev() {
            if let (Some(to), Some(from)) = (to, end.checked_add(1))
                && let Some(fit) = high_fit(from, to, size, alignment)
            {
                return Some(fit);
            }
            to = taken.checked_sub(1);
        }
        high_fit(self.first, to?, size, alignment)
    }

    fn take(
        &mut self,
        found: Option<u64>,
        size: u64,
        alignment: u64,
    ) -> Result<u64, AllocatorError> {
        let base = found.ok_or(AllocatorError::NoAddress {
            size,
            alignment,
            first: self.first,
            last: self.last,
        })?;
        self.allocate_at(base, size)?;
        Ok(base)
    }
}

/// Last address of `size` bytes from `base` on.
fn last(base: u64, size: u64) -> Option<u64> {
    base.checked_add(size.checked_sub(1)?)
}

/// The lowest place in the gap from `from` to `to`, both within it.
fn low_fit(from: u64, to: u64, size: u64, alignment: u64) -> Option<u64> {
    let base = from.checked_next_multiple_of(alignment)?;
    (last(base, size)? <= to).then_some(base)
}

/// The highest place in the gap from `from` to `to`, both within it.
fn high_fit(from: u64, to: u64, size: u64, alignment: u64) -> Option<u64> {
    let base = to.checked_sub(size.checked_sub(1)?)? & !(alignment - 1);
    (base >= from).then_some(base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gives_the_lowest_and_the_highest_that_fit() {
        let mut window = AddressAllocator::new(0x1800, 0x4800).unwrap();
        assert_eq!(window.allocate(0x1000, 0x1000), Ok(0x2000));
        assert_eq!(window.allocate(0x800, 0x800), Ok(0x1800), "the gap before");
        assert_eq!(window.allocate_from_top(0x10, 0x1000), Ok(0x5000));
        assert_eq!(window.allocate_from_top(0x10, 0x10), Ok(0x5ff0));
        assert_eq!(window.allocate(0x2000, 1), Ok(0x3000));
        let full = AllocatorError::NoAddress {
            size: 0x1000,
            alignment: 1,
            first: 0x1800,
            last: 0x5fff,
        };
        assert_eq!(window.allocate(0x1000, 1), Err(full));
        assert_eq!(window.allocate_from_top(0x1000, 1), Err(full));
        assert_eq!(window.free(0x3000), Ok(0x2000));
        assert_eq!(window.allocate_from_top(0x1000, 1), Ok(0x4000));
    }

    #[test]
    fn a_wanted_place_is_given_only_when_all_of_it_is_free() {
        let mut window = AddressAllocator::new(0x1000, 0x1000).unwrap();
        window.allocate_at(0x1400, 0x100).unwrap();
        for (base, size) in [
            (0x13ff, 2),
            (0x1400, 1),
            (0x14ff, 1),
            (0x1450, 0x10),
            (0x1000, 0x1000),
        ] {
            let taken = AllocatorError::Taken {
                base,
                size,
                other: 0x1400,
            };
            assert_eq!(window.allocate_at(base, size), Err(taken));
        }
        window.allocate_at(0x1500, 0xb00).unwrap();
        window.allocate_at(0x13ff, 1).unwrap();
        for (base, size) in [(0xfff, 1), (0x2000, 1), (0x1fff, 2)] {
            let outside = AllocatorError::Outside {
                base,
                size,
                first: 0x1000,
                last: 0x1fff,
            };
            assert_eq!(window.allocate_at(base, size), Err(outside));
        }
        let wraps = AllocatorError::Range {
            base: 0x1800,
            size: u64::MAX,
        };
        assert_eq!(window.allocate_at(0x1800, u64::MAX), Err(wraps));
    }

    #[test]
    fn only_what_was_given_out_is_taken_back() {
        let mut window = AddressAllocator::new(0, 0x100).unwrap();
        window.allocate_at(0x10, 0x10).unwrap();
        assert_eq!(window.free(0x11), Err(AllocatorError::NotGivenOut(0x11)));
        assert_eq!(window.free(0x10), Ok(0x10));
        assert_eq!(window.free(0x10), Err(AllocatorError::NotGivenOut(0x10)));
    }

    #[test]
    fn nonsense_is_refused() {
        let empty = AllocatorError::Range { base: 5, size: 0 };
        assert_eq!(AddressAllocator::new(5, 0).unwrap_err(), empty);
        assert!(AddressAllocator::new(u64::MAX, 2).is_err());
        let mut window = AddressAllocator::new(5, 5).unwrap();
        assert_eq!(window.allocate(0, 1), Err(empty));
        assert_eq!(window.allocate_from_top(0, 1), Err(empty));
        assert_eq!(window.allocate(1, 3), Err(AllocatorError::Alignment(3)));
        assert_eq!(window.allocate(1, 0), Err(AllocatorError::Alignment(0)));
    }

    #[test]
    fn both_ends_of_the_address_space_can_be_given() {
        let mut window = AddressAllocator::new(0, u64::MAX).unwrap();
        assert_eq!(window.allocate(1, 1), Ok(0));
        assert_eq!(window.allocate(1, 1), Ok(1));
        let mut window = AddressAllocator::new(u64::MAX - 15, 16).unwrap();
        assert_eq!(window.allocate_from_top(1, 1), Ok(u64::MAX));
        assert_eq!(window.allocate(15, 1), Ok(u64::MAX - 15));
        assert!(window.allocate(1, 1).is_err());
        assert!(window.allocate_from_top(1, 1).is_err());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Low(u64, u32),
        High(u64, u32),
        At(u64, u64),
        Free(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1..0x80u64, 0..8u32).prop_map(|(size, shift)| Step::Low(size, shift)),
            (1..0x80u64, 0..8u32).prop_map(|(size, shift)| Step::High(size, shift)),
            (0..0x500u64, 1..0x80u64).prop_map(|(base, size)| Step::At(base, size)),
            any::<usize>().prop_map(Step::Free),
        ]
    }

    proptest! {
        /// Held against a list with one place a byte.
        #[test]
        fn never_overlaps_gives_back_and_misses_no_gap(
            base in prop_oneof![Just(0u64), Just(0x33), Just(u64::MAX - 0x3ff)],
            steps in prop::collection::vec(step(), 0..60),
        ) {
            const SIZE: usize = 0x400;
            let mut window = AddressAllocator::new(base, SIZE as u64).unwrap();
            let mut bytes = [false; SIZE];
            let mut given: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                // Every place where `size` bytes would fit, from low to high.
                let places = |size: u64, alignment: u64| -> Vec<u64> {
                    (0..SIZE)
                        .filter(|at| (base + *at as u64).is_multiple_of(alignment))
                        .filter(|at| bytes.get(*at..*at + size as usize).is_some_and(|b| b.iter().all(|t| !t)))
                        .map(|at| base + at as u64)
                        .collect()
                };
                let (got, size) = match step {
                    Step::Low(size, shift) => {
                        let got = window.allocate(size, 1 << shift).ok();
                        prop_assert_eq!(got, places(size, 1 << shift).first().copied());
                        (got, size)
                    }
                    Step::High(size, shift) => {
                        let got = window.allocate_from_top(size, 1 << shift).ok();
                        prop_assert_eq!(got, places(size, 1 << shift).last().copied());
                        (got, size)
                    }
                    Step::At(offset, size) => {
                        let at = base.saturating_add(offset);
                        let got = window.allocate_at(at, size).ok().map(|()| at);
                        prop_assert_eq!(got.is_some(), places(size, 1).contains(&at));
                        (got, size)
                    }
                    Step::Free(which) if given.is_empty() => {
                        prop_assert!(window.free(base.saturating_add(which as u64)).is_err());
                        (None, 0)
                    }
                    Step::Free(which) => {
                        let (at, size) = given.swap_remove(which % given.len());
                        prop_assert_eq!(window.free(at), Ok(size));
                        bytes[(at - base) as usize..][..size as usize].fill(false);
                        (None, 0)
                    }
                };
                if let Some(at) = got {
                    bytes[(at - base) as usize..][..size as usize].fill(true);
                    given.push((at, size));
                }
                let mut expected: Vec<_> = given.iter().map(|(at, size)| (*at, at + (size - 1))).collect();
                expected.sort_unstable();
                prop_assert_eq!(window.taken().collect::<Vec<_>>(), expected);
            }
        }
    }
}
