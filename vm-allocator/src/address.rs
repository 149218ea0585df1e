//! Ranges of addresses out of one window.

use std::collections::BTreeMap;

use crate::AllocatorError;

/// Gives out ranges of a window, lowest first.
#[derive(Clone, Debug)]
pub struct AddressAllocator {
    base: u64,
    /// Last address of the window.
    last: u64,
    /// First and last address of each range in use.
    used: BTreeMap<u64, u64>,
}

/// Last address of `size` bytes from `base`.
fn last_of(base: u64, size: u64) -> Result<u64, AllocatorError> {
    size.checked_sub(1)
        .and_then(|more| base.checked_add(more))
        .ok_or(AllocatorError::Range { base, size })
}

impl AddressAllocator {
    /// A window of `size` bytes from `base`, all free.
    ///
    /// # Errors
    /// A window of no bytes, or one that wraps.
    pub fn new(base: u64, size: u64) -> Result<Self, AllocatorError> {
        Ok(Self {
            base,
            last: last_of(base, size)?,
            used: BTreeMap::new(),
        })
    }

    /// The lowest free `size` bytes at a multiple of `alignment`.
    ///
    /// # Errors
    /// No such range is free, or the numbers make none.
    pub fn allocate(&mut self, size: u64, alignment: u64) -> Result<u64, AllocatorError> {
        self.check(size, alignment)?;
        let full = AllocatorError::Full { size, alignment };
        let mut from = self.base;
        for (&start, &last) in &self.used {
            if let Some(place) = fit(from, start.checked_sub(1), size, alignment) {
                return self.take(place, size);
            }
            from = last.checked_add(1).ok_or(full)?;
        }
        let place = fit(from, Some(self.last), size, alignment).ok_or(full)?;
        self.take(place, size)
    }

    /// The highest free `size` bytes at a multiple of `alignment`.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_high(&mut self, size: u64, alignment: u64) -> Result<u64, AllocatorError> {
        self.check(size, alignment)?;
        let full = AllocatorError::Full { size, alignment };
        let mut to = Some(self.last);
        for (&start, &last) in self.used.iter().rev() {
            let from = last.checked_add(1);
            if let (Some(from), Some(to)) = (from, to)
                && let Some(place) = fit_high(from, to, size, alignment)
            {
                return self.take(place, size);
            }
            to = start.checked_sub(1);
        }
        let place = to
            .and_then(|to| fit_high(self.base, to, size, alignment))
            .ok_or(full)?;
        self.take(place, size)
    }

    /// Exactly the `size` bytes from `base`.
    ///
    /// # Errors
    /// They are outside of the window or in use, or the numbers make no range.
    pub fn allocate_at(&mut self, base: u64, size: u64) -> Result<(), AllocatorError> {
        let last = last_of(base, size)?;
        let free = base >= self.base
            && last <= self.last
            && self
                .used
                .range(..=last)
                .next_back()
                .is_none_or(|(_, &other_last)| other_last < base);
        if !free {
            return Err(AllocatorError::Taken { base, size });
        }
        self.used.insert(base, last);
        Ok(())
    }

    /// Takes the range back that was given out at `base`.
    ///
    /// # Errors
    /// There was none.
    pub fn free(&mut self, base: u64) -> Result<(), AllocatorError> {
        self.used
            .remove(&base)
            .map(drop)
            .ok_or(AllocatorError::NotAllocated(base))
    }

    /// Bytes that are in use.
    pub fn used(&self) -> u64 {
        self.used
            .iter()
            .map(|(start, last)| (last - start).saturating_add(1))
            .fold(0, u64::saturating_add)
    }

    fn check(&self, size: u64, alignment: u64) -> Result<(), AllocatorError> {
        last_of(0, size)?;
        if alignment.is_power_of_two() {
            Ok(())
        } else {
            Err(AllocatorError::Alignment(alignment))
        }
    }

    fn take(&mut self, base: u64, size: u64) -> Result<u64, AllocatorError> {
        self.allocate_at(base, size)?;
        Ok(base)
    }
}

/// The lowest place in `from..=to`.
fn fit(from: u64, to: Option<u64>, size: u64, alignment: u64) -> Option<u64> {
    let place = from.checked_next_multiple_of(alignment)?;
    (last_of(place, size).ok()? <= to?).then_some(place)
}

/// The highest place in `from..=to`.
fn fit_high(from: u64, to: u64, size: u64, alignment: u64) -> Option<u64> {
    let place = to.checked_sub(size - 1)? & !(alignment - 1);
    (place >= from).then_some(place)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lowest_and_highest_first() {
        let mut window = AddressAllocator::new(0x1000, 0x1000).unwrap();
        assert_eq!(window.allocate(0x10, 1), Ok(0x1000));
        assert_eq!(window.allocate(0x100, 0x100), Ok(0x1100));
        assert_eq!(window.allocate(0x20, 0x10), Ok(0x1010), "the gap");
        assert_eq!(window.allocate_high(0x100, 0x100), Ok(0x1f00));
        assert_eq!(window.allocate_high(1, 1), Ok(0x1eff));
        assert_eq!(window.allocate_high(0x200, 0x200), Ok(0x1c00));
        window.free(0x1f00).unwrap();
        assert_eq!(window.allocate_high(0x80, 0x80), Ok(0x1f80));
    }

    #[test]
    fn the_top_of_the_address_space_can_be_given_out() {
        let mut window = AddressAllocator::new(u64::MAX - 0xfff, 0x1000).unwrap();
        assert_eq!(window.allocate_high(0x1000, 0x1000), Ok(u64::MAX - 0xfff));
        let full = AllocatorError::Full {
            size: 1,
            alignment: 1,
        };
        assert_eq!(window.allocate(1, 1), Err(full));
        assert_eq!(window.allocate_high(1, 1), Err(full));
    }

    #[test]
    fn wrong_numbers_are_refused() {
        assert!(AddressAllocator::new(0, 0).is_err());
        assert!(AddressAllocator::new(2, u64::MAX).is_err());
        let mut window = AddressAllocator::new(0x1000, 0x1000).unwrap();
        assert_eq!(window.allocate(1, 3), Err(AllocatorError::Alignment(3)));
        assert_eq!(window.allocate(1, 0), Err(AllocatorError::Alignment(0)));
        assert!(window.allocate(0, 1).is_err());
        assert!(window.allocate(u64::MAX, 1 << 63).is_err());
        assert!(window.allocate_high(u64::MAX, 1).is_err());
        assert!(window.allocate_at(0xfff, 2).is_err());
        assert!(window.allocate_at(0x1fff, 2).is_err());
        assert_eq!(
            window.free(0x1000),
            Err(AllocatorError::NotAllocated(0x1000))
        );
        assert_eq!(window.used(), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Low(u64, u32),
        High(u64, u32),
        At(u64, u64),
        Free(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        let size = 1..400u64;
        prop_oneof![
            (size.clone(), 0..8u32).prop_map(|(s, a)| Step::Low(s, a)),
            (size.clone(), 0..8u32).prop_map(|(s, a)| Step::High(s, a)),
            (0x700..0x1900u64, size).prop_map(|(b, s)| Step::At(b, s)),
            any::<prop::sample::Index>().prop_map(Step::Free),
        ]
    }

    proptest! {
        /// Ranges never overlap, keep to the window and their alignment, and what is free can be
        /// had: the model is a map of bytes.
        #[test]
        fn ranges_never_overlap(steps in prop::collection::vec(step(), 0..80)) {
            let mut window = AddressAllocator::new(0x800, 0x1000).unwrap();
            let mut bytes = vec![false; 0x1000];
            let mut given: Vec<(u64, u64)> = Vec::new();
            let free = |bytes: &[bool], base: u64, size: u64| {
                (0x800..=0x1800 - size).contains(&base)
                    && bytes[(base - 0x800) as usize..][..size as usize].iter().all(|b| !b)
            };
            for step in steps {
                let result = match step {
                    Step::Free(index) => {
                        if !given.is_empty() {
                            let (base, size) = given.swap_remove(index.index(given.len()));
                            window.free(base).unwrap();
                            bytes[(base - 0x800) as usize..][..size as usize].fill(false);
                        }
                        continue;
                    }
                    Step::At(base, size) => {
                        let possible = free(&bytes, base, size);
                        let result = window.allocate_at(base, size);
                        prop_assert_eq!(result.is_ok(), possible);
                        result.ok().map(|()| (base, size))
                    }
                    Step::Low(size, shift) | Step::High(size, shift) => {
                        let mut places = (0x800..0x1800u64)
                            .filter(|base| base % (1 << shift) == 0 && free(&bytes, *base, size));
                        let (expected, got) = match step {
                            Step::Low(..) => (places.next(), window.allocate(size, 1 << shift)),
                            _ => (places.next_back(), window.allocate_high(size, 1 << shift)),
                        };
                        prop_assert_eq!(got.ok(), expected);
                        expected.map(|base| (base, size))
                    }
                };
                if let Some((base, size)) = result {
                    bytes[(base - 0x800) as usize..][..size as usize].fill(true);
                    given.push((base, size));
                }
                let used = bytes.iter().filter(|b| **b).count() as u64;
                prop_assert_eq!(window.used(), used);
            }
        }
    }
}
