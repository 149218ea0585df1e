//! The mappings of one domain: sorted, disjoint, cheap to copy. A copy stays as it is when the original changes, so that what reads
//! one needs no lock.
//!
//! They lie in chunks that copies share. A change copies one chunk and the list of chunks.

use std::sync::Arc;

use vm_memory::Permissions;

/// Most mappings in a chunk: it is split then.
const CHUNK: usize = 64;

/// Addresses of a device and where they lead.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mapping {
    /// First address of the device's.
    pub first: u64,
    /// Last one; not before the first.
    pub last: u64,
    /// Guest-physical address of the first; all of it lies below 2^64.
    pub physical: u64,
    /// What the device may do there.
    pub access: Permissions,
}

/// Part of a range of addresses, translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Piece {
    /// Guest-physical address.
    pub physical: u64,
    /// Bytes, at least 1.
    pub len: u64,
}

/// The range would cut a mapping.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cut;

/// Why a range has no translation: the first address in it that has none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unmapped(pub u64);

/// The mappings of a domain.
#[derive(Clone, Debug, Default)]
pub struct Mappings {
    /// None of them is empty.
    chunks: Arc<Vec<Arc<Vec<Mapping>>>>,
    len: usize,
}

impl Mappings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// In order of address.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// The chunk in which `address` is, or would be, and the first mapping in it that does not end before `address`.
    fn find(&self, address: u64) -> (usize, usize) {
        let ends_before =
            |chunk: &Arc<Vec<Mapping>>| chunk.last().is_none_or(|mapping| mapping.last < address);
        let chunk = self.chunks.partition_point(ends_before);
        let at = self.chunks.get(chunk).map_or(0, |chunk| {
            chunk.partition_point(|mapping| mapping.last < address)
        });
        (chunk, at)
    }

    /// The first mapping that does not end before `address`.
    fn at_or_after(&self, address: u64) -> Option<&Mapping> {
        let (chunk, at) = self.find(address);
        self.chunks.get(chunk)?.get(at)
    }

    /// Adds `mapping`. False if another one has some of its addresses.
    pub fn insert(&mut self, mapping: Mapping) -> bool {
        if mapping.first > mapping.last
            || self
                .at_or_after(mapping.first)
                .is_some_and(|next| next.first <= mapping.last)
        {
            return false;
        }
        let (chunk, at) = self.find(mapping.first);
        let chunks = Arc::make_mut(&mut self.chunks);
        match chunks.get_mut(chunk) {
            Some(chunk) => Arc::make_mut(chunk).insert(at, mapping),
            // It comes after all others.
            None => match chunks.last_mut() {
                Some(last) => Arc::make_mut(last).push(mapping),
                None => chunks.push(Arc::new(vec![mapping])),
            },
        }
        let grown = chunk.min(chunks.len().saturating_sub(1));
        if let Some(full) = chunks.get_mut(grown)
            && full.len() > CHUNK
        {
            let upper = Arc::make_mut(full).split_off(CHUNK / 2);
            chunks.insert(grown + 1, Arc::new(upper));
        }
        self.len += 1;
        true
    }

    /// Removes all mappings in `first..=last`, and tells how many there were.
    ///
    /// # Errors
    /// One of them is in the range only in part. None is removed then.
    pub fn remove(&mut self, first: u64, last: u64) -> Result<usize, Cut> {
        let cuts = |mapping: &Mapping| mapping.first < first || mapping.last > last;
        let at_start = self.at_or_after(first);
        let touched = at_start.is_some_and(|mapping| mapping.first <= last);
        if !touched {
            return Ok(0);
        }
        // Only the first and the last that the range touches can reach out of it.
        let at_end = self.at_or_after(last).filter(|next| next.first <= last);
        if at_start.is_some_and(cuts) || at_end.is_some_and(cuts) {
            return Err(Cut);
        }
        let (start, _) = self.find(first);
        let chunks = Arc::make_mut(&mut self.chunks);
        let mut removed = 0;
        let mut end = start;
        for chunk in chunks.iter_mut().skip(start) {
            if chunk.first().is_none_or(|mapping| mapping.first > last) {
                break;
            }
            end += 1;
            let from = chunk.partition_point(|mapping| mapping.first < first);
            let to = chunk.partition_point(|mapping| mapping.first <= last);
            removed += to - from;
            if to - from == chunk.len() {
                *chunk = Arc::default();
            } else {
                Arc::make_mut(chunk).drain(from..to);
            }
        }
        let empty = |chunk: &Arc<Vec<Mapping>>| chunk.is_empty();
        let kept: Vec<_> = chunks
            .drain(start..end)
            .filter(|chunk| !empty(chunk))
            .collect();
        chunks.splice(start..start, kept);
        self.len -= removed;
        Ok(removed)
    }

    /// The first piece of the `len` bytes at `address`, at least 1.
    ///
    /// # Errors
    /// `address` has no mapping that lets a device do `access`.
    pub fn translate(
        &self,
        address: u64,
        len: u64,
        access: Permissions,
    ) -> Result<Piece, Unmapped> {
        let mapping = self
            .at_or_after(address)
            .filter(|mapping| mapping.first <= address && mapping.access.allow(access))
            .ok_or(Unmapped(address))?;
        Ok(Piece {
            physical: mapping.physical.wrapping_add(address - mapping.first),
            // One less than there are, so that it fits.
            len: (mapping.last - address).min(len.saturating_sub(1)) + 1,
        })
    }

    /// That all of the `len` bytes at `address` have a translation, as `each` says of every piece.
    ///
    /// # Errors
    /// An address that has none.
    pub fn check(
        &self,
        address: u64,
        len: u64,
        access: Permissions,
        mut each: impl FnMut(Piece) -> bool,
    ) -> Result<bool, Unmapped> {
        let (mut address, mut left) = (address, len);
        while left > 0 {
            let piece = self.translate(address, left, access)?;
            if !each(piece) {
                return Ok(false);
            }
            left -= piece.len;
            address = match address.checked_add(piece.len) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(Unmapped(u64::MAX)),
            };
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Pages, each with its own translation.
    #[derive(Default)]
    struct Model {
        /// By first page: last page, physical page, access.
        mappings: BTreeMap<u64, (u64, u64, bool)>,
    }

    impl Model {
        fn overlaps(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
            let all = self.mappings.iter();
            all.map(|(first, (last, ..))| (*first, *last))
                .filter(|(f, l)| *f <= last && *l >= first)
                .collect()
        }

        fn page(&self, page: u64, write: bool) -> Option<u64> {
            let (first, (last, physical, writable)) = self.mappings.range(..=page).next_back()?;
            (page <= *last && (!write || *writable)).then(|| physical + page - first)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Map(u64, u64, u64, bool),
        Unmap(u64, u64),
        Look(u64, u64, bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        let page = 0u64..600;
        prop_oneof![
            4 => (page.clone(), 0u64..4, 0u64..10_000, any::<bool>()).prop_map(|(first, more, physical, write)| Step::Map(first, first + more, physical, write)),
            2 => (page.clone(), 0u64..40).prop_map(|(first, more)| Step::Unmap(first, first + more)),
            2 => (page, 1u64..12, any::<bool>()).prop_map(|(page, pages, write)| Step::Look(page, pages, write)),
        ]
    }

    const fn access(write: bool) -> Permissions {
        if write {
            Permissions::ReadWrite
        } else {
            Permissions::Read
        }
    }

    const fn bytes(first: u64, last: u64) -> (u64, u64) {
        (first << 12, (last << 12) + 0xfff)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn as_a_plain_model(steps in prop::collection::vec(step(), 1..700)) {
            let (mut mappings, mut model) = (Mappings::default(), Model::default());
            for step in steps {
                let before = mappings.clone();
                let saved: Vec<_> = before.iter().copied().collect();
                match step {
                    Step::Map(first, last, physical, write) => {
                        let free = model.overlaps(first, last).is_empty();
                        let (from, to) = bytes(first, last);
                        let mapping = Mapping { first: from, last: to, physical: physical << 12, access: access(write) };
                        prop_assert_eq!(mappings.insert(mapping), free);
                        if free {
                            model.mappings.insert(first, (last, physical, write));
                        }
                    }
                    Step::Unmap(first, last) => {
                        let touched = model.overlaps(first, last);
                        let (from, to) = bytes(first, last);
                        let removed = mappings.remove(from, to);
                        if touched.iter().all(|(f, l)| *f >= first && *l <= last) {
                            prop_assert_eq!(removed, Ok(touched.len()));
                            for (first, _) in touched {
                                model.mappings.remove(&first);
                            }
                        } else {
                            prop_assert_eq!(removed, Err(Cut));
                        }
                    }
                    Step::Look(page, pages, write) => {
                        // Neither end at the border of a page.
                        let (address, len) = ((page << 12) + 5, (pages << 12) - 9);
                        let wanted = if write { Permissions::Write } else { Permissions::Read };
                        let mut at = address;
                        let mut wrong = false;
                        let found = mappings.check(address, len, wanted, |piece| {
                            // Each byte of the piece as the model has it.
                            for offset in (0..piece.len).step_by(512).chain([piece.len - 1]) {
                                let address = at + offset;
                                let physical = model.page(address >> 12, write).map(|page| (page << 12) + (address & 0xfff));
                                wrong |= physical != Some(piece.physical + offset);
                            }
                            at += piece.len;
                            true
                        });
                        prop_assert!(!wrong);
                        let last_page = (address + len - 1) >> 12;
                        match (page..=last_page).find(|page| model.page(*page, write).is_none()) {
                            None => prop_assert_eq!((found, at), (Ok(true), address + len)),
                            Some(hole) => prop_assert_eq!(found, Err(Unmapped((hole << 12).max(address)))),
                        }
                    }
                }
                prop_assert_eq!(mappings.len(), model.mappings.len());
                let now: Vec<_> = mappings.iter().map(|m| (m.first >> 12, (m.last >> 12, m.physical >> 12, m.access == Permissions::ReadWrite))).collect();
                let expected: Vec<_> = model.mappings.iter().map(|(first, rest)| (*first, *rest)).collect();
                prop_assert_eq!(now, expected);
                // A copy does not change with it.
                prop_assert_eq!(before.iter().copied().collect::<Vec<_>>(), saved);
                prop_assert!(mappings.chunks.iter().all(|chunk| (1..=CHUNK).contains(&chunk.len())));
            }
        }
    }

    #[test]
    fn the_ends_of_the_address_space() {
        let mut mappings = Mappings::default();
        let whole = Mapping {
            first: 0,
            last: u64::MAX,
            physical: 0,
            access: Permissions::ReadWrite,
        };
        assert!(mappings.insert(whole));
        let piece = mappings.translate(0, u64::MAX, Permissions::Read).unwrap();
        assert_eq!((piece.physical, piece.len), (0, u64::MAX));
        let last = mappings.translate(u64::MAX, 1, Permissions::Read).unwrap();
        assert_eq!((last.physical, last.len), (u64::MAX, 1));
        assert_eq!(
            mappings.check(u64::MAX - 1, 2, Permissions::Write, |_| true),
            Ok(true)
        );
        // It wraps.
        assert!(
            mappings
                .check(u64::MAX - 1, 3, Permissions::Write, |_| true)
                .is_err()
        );
        assert!(!mappings.insert(Mapping { first: 5, ..whole }));
        assert_eq!(mappings.remove(1, u64::MAX), Err(Cut));
        assert_eq!(mappings.remove(0, u64::MAX), Ok(1));
        assert_eq!(mappings.len(), 0);
    }
}
