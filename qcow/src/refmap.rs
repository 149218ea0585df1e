//! References to host clusters, counted in memory.

use std::collections::{BTreeSet, HashMap};

/// Clusters up to which a flat array is used. Its pages cost memory only where something is counted.
const FLAT: u64 = 1 << 28;

/// A count for each host cluster.
#[derive(Clone, Debug)]
pub(crate) struct RefMap {
    flat: Vec<u32>,
    /// Clusters past the flat array.
    far: HashMap<u64, u32>,
}

impl RefMap {
    /// Counts for about `clusters` clusters, all zero.
    pub fn new(clusters: u64) -> Self {
        let flat = if clusters <= FLAT {
            clusters as usize
        } else {
            0
        };
        RefMap {
            flat: vec![0; flat],
            far: HashMap::new(),
        }
    }

    pub fn get(&self, cluster: u64) -> u64 {
        let flat = usize::try_from(cluster).ok().and_then(|c| self.flat.get(c));
        u64::from(
            flat.or_else(|| self.far.get(&cluster))
                .copied()
                .unwrap_or(0),
        )
    }

    fn slot(&mut self, cluster: u64) -> &mut u32 {
        match usize::try_from(cluster) {
            Ok(c) if c < self.flat.len() => &mut self.flat[c],
            _ => self.far.entry(cluster).or_insert(0),
        }
    }

    pub fn set(&mut self, cluster: u64, count: u64) {
        *self.slot(cluster) = u32::try_from(count).unwrap_or(u32::MAX);
    }

    pub fn add(&mut self, cluster: u64, count: u64) {
        let slot = self.slot(cluster);
        *slot = slot.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub fn sub(&mut self, cluster: u64) {
        let slot = self.slot(cluster);
        *slot = slot.saturating_sub(1);
    }

    /// Indices of the groups of `group` clusters in which anything is counted.
    pub fn groups(&self, group: u64) -> BTreeSet<u64> {
        let mut found: BTreeSet<u64> = self
            .far
            .iter()
            .filter(|(_, n)| **n > 0)
            .map(|(c, _)| c / group)
            .collect();
        for (i, part) in self.flat.chunks(group as usize).enumerate() {
            if part.iter().any(|n| *n > 0) {
                found.insert(i as u64);
            }
        }
        found
    }

    /// The highest count.
    pub fn max(&self) -> u64 {
        u64::from(
            self.flat
                .iter()
                .chain(self.far.values())
                .copied()
                .max()
                .unwrap_or(0),
        )
    }

    /// Clusters that are counted here and not in `other`.
    pub fn without<'a>(&'a self, other: &'a RefMap) -> impl Iterator<Item = u64> + 'a {
        let flat = self
            .flat
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(|(c, _)| c as u64);
        let far = self.far.iter().filter(|(_, n)| **n > 0).map(|(c, _)| *c);
        flat.chain(far).filter(|c| other.get(*c) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_and_far() {
        let mut m = RefMap::new(100);
        m.add(3, 1);
        m.add(3, 1);
        m.add(1 << 40, 1);
        m.sub(50);
        assert_eq!(
            (m.get(3), m.get(1 << 40), m.get(50), m.get(99)),
            (2, 1, 0, 0)
        );
        assert_eq!(
            m.groups(64).into_iter().collect::<Vec<_>>(),
            [0, (1 << 40) / 64]
        );
        assert_eq!(m.max(), 2);
        let mut n = m.clone();
        n.set(3, 0);
        assert_eq!(m.without(&n).collect::<Vec<_>>(), [3]);
    }
}
