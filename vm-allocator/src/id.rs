//! Small numbers: interrupt lines, slots, device ids.

use std::collections::BTreeSet;

use crate::AllocatorError;

/// Gives out the numbers from one to another, lowest first.
#[derive(Clone, Debug)]
pub struct IdAllocator {
    first: u32,
    last: u32,
    used: BTreeSet<u32>,
}

impl IdAllocator {
    /// The numbers from `first` to `last`, all free. There are none if `last` is below `first`.
    pub fn new(first: u32, last: u32) -> Self {
        Self {
            first,
            last,
            used: BTreeSet::new(),
        }
    }

    /// The lowest free number.
    ///
    /// # Errors
    /// [`AllocatorError::NoId`].
    pub fn allocate(&mut self) -> Result<u32, AllocatorError> {
        let free = (self.first..=self.last).find(|id| !self.used.contains(id));
        let id = free.ok_or(AllocatorError::NoId {
            first: self.first,
            last: self.last,
        })?;
        self.used.insert(id);
        Ok(id)
    }

    /// Exactly `id`.
    ///
    /// # Errors
    /// [`AllocatorError::IdTaken`] where it is outside or in use.
    pub fn allocate_at(&mut self, id: u32) -> Result<(), AllocatorError> {
        if (self.first..=self.last).contains(&id) && self.used.insert(id) {
            Ok(())
        } else {
            Err(AllocatorError::IdTaken(id))
        }
    }

    /// Takes `id` back.
    ///
    /// # Errors
    /// [`AllocatorError::IdNotAllocated`].
    pub fn free(&mut self, id: u32) -> Result<(), AllocatorError> {
        if self.used.remove(&id) {
            Ok(())
        } else {
            Err(AllocatorError::IdNotAllocated(id))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_once_and_freed_ones_again() {
        let mut ids = IdAllocator::new(3, 5);
        assert_eq!(
            [ids.allocate(), ids.allocate(), ids.allocate()],
            [Ok(3), Ok(4), Ok(5)]
        );
        assert_eq!(
            ids.allocate(),
            Err(AllocatorError::NoId { first: 3, last: 5 })
        );
        ids.free(4).unwrap();
        assert_eq!(ids.free(4), Err(AllocatorError::IdNotAllocated(4)));
        assert_eq!(ids.allocate(), Ok(4));
    }

    #[test]
    fn a_certain_id_only_where_it_is_free() {
        let mut ids = IdAllocator::new(0, 1);
        ids.allocate_at(0).unwrap();
        assert_eq!(ids.allocate_at(0), Err(AllocatorError::IdTaken(0)));
        assert_eq!(ids.allocate_at(2), Err(AllocatorError::IdTaken(2)));
        assert_eq!(ids.allocate(), Ok(1));
        assert!(IdAllocator::new(1, 0).allocate().is_err());
    }
}
