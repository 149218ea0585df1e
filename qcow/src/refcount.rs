//! Reference counts of host clusters, two levels, any width (qcow2 "Host cluster management").
//!
//! A count that is too high leaks a cluster, one that is too low loses data. So any state of a block may reach the disk
//! at any time, as long as decrements are made only after what referenced the cluster is gone from the disk;
//! `writeback.rs` sees to that.

use std::collections::BTreeSet;

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::storage::Storage;

/// Refcount number `index` of a block.
pub(crate) fn get(block: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let bit = index * bits;
            let byte = block.get(bit / 8).copied().unwrap_or(0);
            u64::from(byte >> (bit % 8)) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1usize << (order - 3);
            let entry = block
                .get(index * bytes..(index + 1) * bytes)
                .unwrap_or_default();
            entry.iter().fold(0, |n, b| n << 8 | u64::from(*b))
        }
    }
}

/// Sets refcount number `index` within `bytes`, the range of the block that [`range`] gives.
fn put(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    match order {
        0..=2 => {
            let bits = 1u32 << order;
            let shift = (index as u32 * bits) % 8;
            let mask = ((1u32 << bits) - 1) as u8;
            bytes[0] = bytes[0] & !(mask << shift) | ((value as u8 & mask) << shift);
        }
        _ => {
            let n = bytes.len();
            bytes.copy_from_slice(&value.to_be_bytes()[8 - n..]);
        }
    }
}

/// Bytes of a block that hold refcount number `index`.
fn range(order: u32, index: u64) -> std::ops::Range<usize> {
    let index = index as usize;
    match order {
        0..=2 => {
            let byte = (index << order) / 8;
            byte..byte + 1
        }
        _ => {
            let bytes = 1usize << (order - 3);
            index * bytes..(index + 1) * bytes
        }
    }
}

/// Sets a refcount in a block held as plain bytes.
pub(crate) fn set(block: &mut [u8], order: u32, index: u64, value: u64) {
    put(&mut block[range(order, index)], order, index, value);
}

/// The refcount table, and the blocks in use.
#[derive(Debug)]
pub(crate) struct Refcounts {
    pub layout: Layout,
    /// Offsets of the blocks, zero where there is none.
    pub table: Vec<u64>,
    /// Entries of the table that differ from the disk's.
    pub dirty_entries: BTreeSet<usize>,
    pub blocks: Cache,
    /// No cluster before this one is free.
    pub hint: u64,
}

impl Refcounts {
    /// Reads the table. Entries are checked when they are used.
    pub fn read(
        storage: &dyn Storage,
        layout: Layout,
        offset: u64,
        clusters: u32,
        cache: usize,
    ) -> Result<Self> {
        let length = u64::from(clusters) << layout.cluster_bits;
        let table = read_words(storage, offset, length / 8)?;
        Ok(Refcounts {
            layout,
            table,
            dirty_entries: BTreeSet::new(),
            blocks: Cache::new(cache, layout.cluster_size() as usize),
            hint: 0,
        })
    }

    /// Offset of the block with the count of `cluster`, if there is one.
    pub fn block_of(&self, cluster: u64) -> Result<Option<u64>> {
        let index = usize::try_from(cluster / self.layout.block_entries()).unwrap_or(usize::MAX);
        match self.table.get(index).copied() {
            None | Some(0) => Ok(None),
            Some(offset) if self.layout.aligned(offset) && offset < 1 << 63 => Ok(Some(offset)),
            Some(offset) => Err(Error::malformed(
                "refcount table",
                format!("entry {index} is {offset:#x}, not a cluster's offset"),
            )),
        }
    }

    pub fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64> {
        match self.block_of(cluster)? {
            None => Ok(0),
            Some(offset) => {
                self.make_room(storage, offset)?;
                let block = self.blocks.get(storage, offset)?;
                Ok(get(
                    block.bytes(),
                    self.layout.refcount_order,
                    cluster % self.layout.block_entries(),
                ))
            }
        }
    }

    /// Sets the count of a cluster that has a block.
    pub fn set(&mut self, storage: &dyn Storage, cluster: u64, value: u64) -> Result<()> {
        if value > self.layout.max_refcount() {
            return Err(Error::Limit(format!(
                "a refcount of {value} does not fit in {} bits",
                self.layout.refcount_bits()
            )));
        }
        let Some(offset) = self.block_of(cluster)? else {
            return Err(Error::Corrupt(format!(
                "cluster {cluster:#x} is in use but has no refcount block"
            )));
        };
        self.make_room(storage, offset)?;
        let (order, index) = (
            self.layout.refcount_order,
            cluster % self.layout.block_entries(),
        );
        self.blocks.change(storage, offset, |t| {
            put(t.edit(range(order, index)), order, index, value);
        })?;
        if value == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(())
    }

    /// First free cluster from `from` on within its block, and how many up to `want` follow it. `None`: the block is full.
    pub fn free_run(
        &mut self,
        storage: &dyn Storage,
        from: u64,
        want: u64,
    ) -> Result<Option<(u64, u64)>> {
        let entries = self.layout.block_entries();
        let Some(offset) = self.block_of(from)? else {
            return Ok(None);
        };
        self.make_room(storage, offset)?;
        let order = self.layout.refcount_order;
        let block = self.blocks.get(storage, offset)?.bytes();
        let first = (from % entries..entries).find(|i| get(block, order, *i) == 0);
        Ok(first.map(|first| {
            let end = (first..entries.min(first.saturating_add(want)))
                .take_while(|i| get(block, order, *i) == 0)
                .count();
            (from - from % entries + first, end as u64)
        }))
    }

    /// Blocks may be written at any time, so a cache full of dirty ones is emptied by writing them.
    fn make_room(&mut self, storage: &dyn Storage, offset: u64) -> Result<()> {
        if self.blocks.dirty() >= self.blocks.limit() && !self.blocks.contains(offset) {
            self.blocks.write_back(storage)?;
        }
        Ok(())
    }
}

/// Reads `count` big-endian words.
pub(crate) fn read_words(storage: &dyn Storage, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0u8; count as usize * 8];
    storage
        .read_at(&mut bytes, offset)
        .map_err(Error::io("reading", "image file", offset))?;
    Ok(bytes
        .chunks_exact(8)
        .map(|b| crate::header::be64(b, 0))
        .collect())
}

/// Big-endian bytes of `words`, padded with zeros to `length` bytes.
pub(crate) fn word_bytes(words: &[u64], length: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    bytes.resize(length as usize, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0u8; 512];
            let n = 4096 >> order;
            for i in 0..n {
                set(&mut block, order, i, (i * 7) & max);
            }
            for i in (0..n).step_by(3) {
                set(&mut block, order, i, max);
            }
            for i in 0..n {
                let expected = if i % 3 == 0 { max } else { (i * 7) & max };
                assert_eq!(get(&block, order, i), expected, "order {order}, index {i}");
            }
        }
    }

    #[test]
    fn the_first_of_narrow_counts_is_in_the_lowest_bits() {
        let mut block = vec![0u8; 512];
        set(&mut block, 0, 0, 1);
        set(&mut block, 0, 9, 1);
        assert_eq!(block[..2], [1, 2]);
        let mut block = vec![0u8; 512];
        set(&mut block, 4, 1, 0x102);
        assert_eq!(block[..4], [0, 0, 1, 2]);
    }
}
