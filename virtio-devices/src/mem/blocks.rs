//! Which blocks of the device's memory are plugged: runs of them, so that much memory takes little room.

use std::collections::BTreeMap;

/// Sets of blocks, as runs that neither overlap nor touch.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Blocks {
    /// Blocks of each run, by its first.
    runs: BTreeMap<u64, u64>,
    count: u64,
}

/// What a range of blocks is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fill {
    All,
    None,
    Some,
}

impl Blocks {
    /// How many are in it.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// First block and count of each run, in order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        self.runs.iter().map(|(first, count)| (*first, *count))
    }

    /// How many of the `count` blocks from `first` on are in it.
    pub fn fill(&self, first: u64, count: u64) -> Fill {
        let end = first + count;
        // The run that starts before, or at, the end of the range; only the first of them can reach into it from before.
        let before = self.runs.range(..first).next_back();
        let within = self.runs.range(first..end);
        let found: u64 = before
            .into_iter()
            .chain(within)
            .map(|(run, len)| (run + len).min(end).saturating_sub((*run).max(first)))
            .sum();
        match found {
            0 => Fill::None,
            _ if found == count => Fill::All,
            _ => Fill::Some,
        }
    }

    /// Adds `count` blocks from `first` on, of which none is in it.
    pub fn insert(&mut self, first: u64, count: u64) {
        let (mut start, mut end) = (first, first + count);
        if let Some((&run, &len)) = self.runs.range(..first).next_back()
            && run + len == first
        {
            self.runs.remove(&run);
            start = run;
        }
        if let Some(len) = self.runs.remove(&end) {
            end += len;
        }
        self.runs.insert(start, end - start);
        self.count += count;
    }

    /// Takes `count` blocks from `first` on away, all of which are in it: in one run, as runs do not touch.
    pub fn remove(&mut self, first: u64, count: u64) {
        let Some((&run, &len)) = self.runs.range(..=first).next_back() else {
            return;
        };
        let end = first + count;
        self.runs.remove(&run);
        if run < first {
            self.runs.insert(run, first - run);
        }
        if end < run + len {
            self.runs.insert(end, run + len - end);
        }
        self.count -= count;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// As a set of bits does.
        #[test]
        fn blocks_are_a_set(steps in proptest::collection::vec((0u64..40, 1u64..12), 1..60)) {
            let mut blocks = Blocks::default();
            let mut bits = [false; 64];
            for (first, count) in steps {
                let range = first as usize..(first + count) as usize;
                let set = bits[range.clone()].iter().filter(|bit| **bit).count() as u64;
                let fill = match set {
                    0 => Fill::None,
                    _ if set == count => Fill::All,
                    _ => Fill::Some,
                };
                prop_assert_eq!(blocks.fill(first, count), fill);
                match fill {
                    Fill::None => {
                        blocks.insert(first, count);
                        bits[range].fill(true);
                    }
                    Fill::All => {
                        blocks.remove(first, count);
                        bits[range].fill(false);
                    }
                    Fill::Some => {}
                }
                prop_assert_eq!(blocks.count(), bits.iter().filter(|bit| **bit).count() as u64);
                let mut last = None;
                for (run, len) in blocks.runs() {
                    prop_assert!(len > 0 && last.is_none_or(|last| last < run));
                    last = Some(run + len);
                    prop_assert!(bits[run as usize..(run + len) as usize].iter().all(|bit| *bit));
                }
            }
        }
    }
}
