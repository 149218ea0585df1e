//! Allocation of host clusters, and growth of the refcount structures with it.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::layout::MAX_OFFSET;
use crate::meta::Meta;
use crate::refcount::{self, word_bytes};

/// Contiguous host clusters that now have a refcount of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub offset: u64,
    pub count: u64,
    /// They lie where the file had not reached before, and read as zeros.
    pub fresh: bool,
}

impl Meta {
    /// Allocates 1 to `want` contiguous clusters.
    pub fn alloc(&mut self, want: u64) -> Result<Run> {
        let storage = Arc::clone(&self.storage);
        let entries = self.layout.block_entries();
        loop {
            let from = self.refs.hint;
            let index = from / entries;
            if index >= self.refs.table.len() as u64 {
                self.grow_table(index + 1)?;
            }
            if self.refs.block_of(from)?.is_none() {
                self.add_block(index)?;
            }
            match self.refs.free_run(storage.as_ref(), from, want)? {
                None => self.refs.hint = (index + 1) * entries,
                Some((start, count)) => {
                    let run = self.take(start, count)?;
                    self.refs.hint = start + count;
                    return Ok(run);
                }
            }
        }
    }

    /// Allocates exactly `count` contiguous clusters.
    pub fn alloc_exact(&mut self, count: u64) -> Result<u64> {
        if count == 1 {
            return Ok(self.alloc(1)?.offset);
        }
        let start = match self.find_run(count)? {
            Some(start) => start,
            None => return Ok(self.alloc_at_end(count, true)? << self.layout.cluster_bits),
        };
        Ok(self.take(start, count)?.offset)
    }

    /// `count` contiguous free clusters, all counted by one block that exists.
    fn find_run(&mut self, count: u64) -> Result<Option<u64>> {
        let storage = Arc::clone(&self.storage);
        let entries = self.layout.block_entries();
        let mut from = self.refs.hint;
        while from / entries < self.refs.table.len() as u64 {
            match self.refs.free_run(storage.as_ref(), from, count)? {
                Some((start, found)) if found == count => return Ok(Some(start)),
                Some((start, found)) => from = start + found,
                None => from = (from / entries + 1) * entries,
            }
        }
        Ok(None)
    }

    /// Sets the refcount of free clusters to one, and makes the file long enough for them.
    fn take(&mut self, start: u64, count: u64) -> Result<Run> {
        let storage = Arc::clone(&self.storage);
        let offset = start << self.layout.cluster_bits;
        let fresh = self.claim(start, count)?;
        for cluster in start..start + count {
            self.refs.set(storage.as_ref(), cluster, 1)?;
        }
        Ok(Run {
            offset,
            count,
            fresh,
        })
    }

    /// Checks that clusters are free to take, and makes the file long enough. Whether they are past its old end.
    fn claim(&mut self, start: u64, count: u64) -> Result<bool> {
        let bits = self.layout.cluster_bits;
        let end = start
            .checked_add(count)
            .filter(|e| *e <= MAX_OFFSET >> bits);
        let Some(end) = end else {
            return Err(Error::Limit("host clusters must lie below 64 PiB".into()));
        };
        for cluster in start..end {
            if self.is_metadata(cluster << bits) {
                return Err(self.corrupt(format!(
                    "cluster {cluster:#x} holds metadata but its refcount is zero"
                )));
            }
        }
        // Before the caller writes there; `unpacked.rs` relies on it.
        let longest = self.layout.max_compressed();
        self.unpacked.forget(start << bits, end << bits, longest);
        let fresh = start << bits >= self.file_end;
        if end << bits > self.file_end {
            let length = end << bits;
            self.storage
                .set_len(length)
                .map_err(Error::io("growing", "image file", length))?;
            self.file_end = length;
        }
        Ok(fresh)
    }

    /// Adds the missing refcount block number `index`. It takes the first of the clusters that it counts.
    fn add_block(&mut self, index: u64) -> Result<()> {
        let first = index * self.layout.block_entries();
        self.claim(first, 1)?;
        let mut bytes = vec![0; self.layout.cluster_size() as usize];
        refcount::set(&mut bytes, self.layout.refcount_order, 0, 1);
        self.put_block(index, first, bytes);
        Ok(())
    }

    fn put_block(&mut self, index: u64, cluster: u64, bytes: Vec<u8>) {
        let offset = cluster << self.layout.cluster_bits;
        self.refs.blocks.insert(offset, bytes);
        self.refs.table[index as usize] = offset;
        self.refs.dirty_entries.insert(index as usize);
        self.tables.insert(offset);
    }

    /// Takes `count` contiguous clusters past all others, with the blocks that they need right behind them.
    fn alloc_at_end(&mut self, count: u64, may_grow: bool) -> Result<u64> {
        let storage = Arc::clone(&self.storage);
        let entries = self.layout.block_entries();
        let mut start = self.layout.clusters(self.file_end);
        // Leaked clusters may be counted past the end of the file: neither the run nor the blocks behind it go there.
        loop {
            let mut used = None;
            for cluster in start..start + count + count / entries + 2 {
                if self.refs.get(storage.as_ref(), cluster)? != 0 {
                    used = Some(cluster);
                }
            }
            match used {
                Some(cluster) => start = cluster + 1,
                None => break,
            }
        }
        let missing = |meta: &Meta, end: u64| -> Vec<u64> {
            let has = |i: &u64| meta.refs.table.get(*i as usize).is_some_and(|o| *o != 0);
            (start / entries..end.div_ceil(entries))
                .filter(|i| !has(i))
                .collect()
        };
        let mut blocks = Vec::new();
        loop {
            let now = missing(self, start + count + blocks.len() as u64);
            if now.len() == blocks.len() {
                break;
            }
            blocks = now;
        }
        let end = start + count + blocks.len() as u64;
        let last = (end - 1) / entries;
        if last >= self.refs.table.len() as u64 {
            if !may_grow {
                return Err(Error::Limit(
                    "the refcount table cannot grow to cover itself".into(),
                ));
            }
            self.grow_table(last + 1)?;
            return self.alloc_at_end(count, false);
        }
        self.claim(start, end - start)?;
        for (k, index) in blocks.iter().enumerate() {
            let bytes = vec![0; self.layout.cluster_size() as usize];
            self.put_block(*index, start + count + k as u64, bytes);
        }
        for cluster in start..end {
            self.refs.set(storage.as_ref(), cluster, 1)?;
        }
        Ok(start)
    }

    /// Moves the refcount table to a larger place, so that it has at least `needed` entries.
    fn grow_table(&mut self, needed: u64) -> Result<()> {
        let size = self.layout.cluster_size();
        let old_offset = self.header.refcount_table_offset;
        let old_clusters = self.header.refcount_table_clusters;
        let entries = self.layout.block_entries();
        // Room for what is needed, for half as much again, and for the new table itself.
        let wanted = needed + needed / 2 + 2;
        let clusters = (wanted * 8).div_ceil(size) + 1;
        if clusters * size > MAX_REFCOUNT_TABLE_BYTES.max(size) {
            return Err(Error::Limit("the refcount table is full at 8 MiB".into()));
        }
        let capacity = clusters * size / 8;
        let reach = self.layout.clusters(self.file_end) + clusters + clusters / entries + 2;
        if capacity <= reach / entries {
            return Err(Error::Limit(
                "the refcount table cannot grow to cover itself".into(),
            ));
        }
        let old_len = self.refs.table.len();
        self.refs.table.resize(capacity as usize, 0);
        let moved = self.move_table(clusters);
        if moved.is_err() {
            self.forget_entries(old_len);
        }
        let offset = moved?;
        self.refs.dirty_entries.clear();
        self.header.refcount_table_offset = offset;
        self.header.refcount_table_clusters = clusters as u32;
        self.write_header()?;
        self.flush_image()?;
        self.refresh_ranges();
        for i in 0..u64::from(old_clusters) {
            self.release(old_offset + i * size)?;
        }
        Ok(())
    }

    /// Writes the whole table, and all blocks, to new clusters.
    fn move_table(&mut self, clusters: u64) -> Result<u64> {
        let storage = Arc::clone(&self.storage);
        let offset = self.alloc_at_end(clusters, false)? << self.layout.cluster_bits;
        self.refs.blocks.write_back(storage.as_ref())?;
        let bytes = word_bytes(&self.refs.table, clusters * self.layout.cluster_size());
        self.write_image(&bytes, offset)?;
        self.flush_image()?;
        Ok(offset)
    }

    /// Cuts the table in memory back to what the one on disk can hold.
    fn forget_entries(&mut self, length: usize) {
        for offset in self.refs.table.drain(length..).filter(|o| *o != 0) {
            self.refs.blocks.remove(offset);
            self.tables.remove(&offset);
        }
        self.refs.dirty_entries.retain(|i| *i < length);
    }
}
