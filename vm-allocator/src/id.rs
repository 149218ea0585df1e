//! Numbers: ids, device slots, interrupt lines. The lowest free one first.

use std::collections::BTreeSet;

use crate::AllocatorError;

/// Gives out interrupt lines (GSIs) as [`IdAllocator`] gives out ids.
pub type IrqAllocator = IdAllocator;

/// Gives out the numbers from a first to a last one.
#[derive(Clone, Debug)]
pub struct IdAllocator {
    first: u32,
    last: u32,
    taken: BTreeSet<u32>,
}

impl IdAllocator {
    /// The numbers from `first` to `last`, both included, all of them free; none where `last` is lower.
    #[must_use]
    pub fn new(first: u32, last: u32) -> Self {
        Self {
            first,
            last,
            taken: BTreeSet::new(),
        }
    }

    /// The lowest free number.
    pub fn allocate(&mut self) -> Result<u32, AllocatorError> {
        // The first number that is not where it would be if none before it were free.
        let free = (self.first..=self.last)
            .zip(self.taken.iter().map(Some).chain(std::iter::repeat(None)))
            .find_map(|(wanted, taken)| (taken != Some(&wanted)).then_some(wanted))
            .ok_or(AllocatorError::NoId {
                first: self.first,
                last: self.last,
            })?;
        self.taken.insert(free);
        Ok(free)
    }

    /// `id`, and no other.
    pub fn allocate_at(&mut self, id: u32) -> Result<(), AllocatorError> {
        if !(self.first..=self.last).contains(&id) {
            return Err(AllocatorError::IdOutside {
                id,
                first: self.first,
                last: self.last,
            });
        }
        if self.taken.insert(id) {
            Ok(())
        } else {
            Err(AllocatorError::IdTaken(id))
        }
    }

    /// Takes `id` back.
    pub fn free(&mut self, id: u32) -> Result<(), AllocatorError> {
        if self.taken.remove(&id) {
            Ok(())
        } else {
            Err(AllocatorError::IdNotGivenOut(id))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_out_with_a_sentence() {
        let mut lines = IrqAllocator::new(5, 6);
        assert_eq!(lines.allocate(), Ok(5));
        assert_eq!(lines.allocate(), Ok(6));
        let none = lines.allocate().unwrap_err();
        assert_eq!(none.to_string(), "all numbers from 5 to 6 are taken");
        lines.free(5).unwrap();
        assert_eq!(lines.free(5), Err(AllocatorError::IdNotGivenOut(5)));
        assert_eq!(lines.allocate(), Ok(5));
        assert!(IdAllocator::new(1, 0).allocate().is_err());
    }

    #[test]
    fn a_wanted_number_is_given_when_it_is_free_and_within() {
        let mut ids = IdAllocator::new(u32::MAX - 1, u32::MAX);
        ids.allocate_at(u32::MAX).unwrap();
        assert_eq!(
            ids.allocate_at(u32::MAX),
            Err(AllocatorError::IdTaken(u32::MAX))
        );
        assert!(matches!(
            ids.allocate_at(0),
            Err(AllocatorError::IdOutside { id: 0, .. })
        ));
        assert_eq!(ids.allocate(), Ok(u32::MAX - 1));
        assert!(ids.allocate().is_err());
    }

    proptest! {
        /// `None` allocates, `Some(id)` wants that id if it is free and frees it otherwise.
        #[test]
        fn is_a_set(first in 0..4u32, steps in prop::collection::vec(prop::option::of(0..24u32), 0..100)) {
            const LAST: u32 = 20;
            let mut ids = IdAllocator::new(first, LAST);
            let mut model = BTreeSet::new();
            for step in steps {
                match step {
                    None => {
                        let lowest = (first..=LAST).find(|id| !model.contains(id));
                        prop_assert_eq!(ids.allocate().ok(), lowest);
                        model.extend(lowest);
                    }
                    Some(id) if model.remove(&id) => {
                        prop_assert!(ids.allocate_at(id).is_err());
                        prop_assert_eq!(ids.free(id), Ok(()));
                    }
                    Some(id) => {
                        prop_assert!(ids.free(id).is_err());
                        let within = (first..=LAST).contains(&id);
                        prop_assert_eq!(ids.allocate_at(id).is_ok(), within);
                        if within {
                            model.insert(id);
                        }
                    }
                }
            }
        }
    }
}
