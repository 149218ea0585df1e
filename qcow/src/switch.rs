//! A new state of the metadata, all at once.
//!
//! Snapshots and repairs change refcounts and the tables that depend on them in many places. They write new tables next to the old ones,
//! and then change the header, which is one sector: a kill leaves either the old state or the new one, and at worst leaks.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::image::note_tables;
use crate::meta::Meta;
use crate::refcount::{self, read_words, word_bytes};
use crate::refmap::RefMap;

/// Where new refcount tables go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// To clusters that the present refcounts call free.
    Free,
    /// Past the end of the file, because the present refcounts cannot be believed.
    PastEnd,
}

impl Meta {
    fn place(&mut self, place: Place, count: u64) -> Result<u64> {
        match place {
            Place::Free => Ok(self.alloc_exact(count)? >> self.layout.cluster_bits),
            Place::PastEnd => {
                let start = self.layout.clusters(self.file_end);
                let length = (start + count) << self.layout.cluster_bits;
                self.storage
                    .set_len(length)
                    .map_err(Error::io("growing", "image file", length))?;
                self.file_end = length;
                Ok(start)
            }
        }
    }

    /// Writes refcounts as `counts` has them, into new tables, and switches to them with whatever else `change` does to the header.
    /// `counts` covers everything but the refcount tables. No operation is under way, and the disk is up to date.
    pub fn switch(
        &mut self,
        mut counts: RefMap,
        place: Place,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let layout = self.layout;
        let (size, entries) = (layout.cluster_size(), layout.block_entries());
        if counts.max() > layout.max_refcount() {
            return Err(Error::Limit(format!(
                "{} references to a cluster do not fit in a refcount of {} bits",
                counts.max(),
                layout.refcount_bits()
            )));
        }
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let mut table: Option<(u64, u64)> = None;
        loop {
            let before = (blocks.len(), table);
            for index in counts.groups(entries) {
                if let std::collections::btree_map::Entry::Vacant(slot) = blocks.entry(index) {
                    let cluster = self.place(place, 1)?;
                    counts.set(cluster, 1);
                    slot.insert(cluster);
                }
            }
            let needed = blocks.last_key_value().map_or(1, |(i, _)| i + 1);
            let clusters = layout.clusters(needed * 8);
            if clusters * size > MAX_REFCOUNT_TABLE_BYTES.max(size) {
                return Err(Error::Limit("the refcount table is full at 8 MiB".into()));
            }
            if table.is_none_or(|(_, n)| n < clusters) {
                if let Some((start, n)) = table {
                    (start..start + n).for_each(|c| counts.set(c, 0));
                }
                let start = self.place(place, clusters)?;
                (start..start + clusters).for_each(|c| counts.set(c, 1));
                table = Some((start, clusters));
            }
            if (blocks.len(), table) == before {
                break;
            }
        }
        let (start, clusters) = table.unwrap_or((0, 0));
        let mut words = vec![0; (clusters * size / 8) as usize];
        for (&index, &cluster) in &blocks {
            let mut block = vec![0; size as usize];
            for i in 0..entries {
                let n = counts.get(index * entries + i);
                if n > 0 {
                    refcount::set(&mut block, layout.refcount_order, i, n);
                }
            }
            self.write_image(&block, cluster * size)?;
            if let Some(word) = words.get_mut(index as usize) {
                *word = cluster * size;
            }
        }
        self.write_image(&word_bytes(&words, clusters * size), start * size)?;
        self.flush_image()?;
        let old = std::mem::replace(&mut self.refs.table, words);
        let old_header = self.header.clone();
        change(&mut self.header);
        self.header.refcount_table_offset = start * size;
        self.header.refcount_table_clusters = clusters as u32;
        if let Err(e) = self.write_header().and_then(|()| self.flush_image()) {
            // Writes have ended. The tables in memory are those of the old header, which are all there still.
            self.header = old_header;
            self.refs.table = old;
            return Err(e);
        }
        if let Err(e) = self.reload() {
            self.stop();
            return Err(e);
        }
        for offset in old.into_iter().filter(|o| *o != 0 && layout.aligned(*o)) {
            if self.punch_holes && counts.get(offset >> layout.cluster_bits) == 0 {
                // A hint only.
                let _ = self.storage.discard(offset, size);
            }
        }
        Ok(())
    }

    pub fn write_image(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.storage
            .write_at(bytes, offset)
            .map_err(Error::io("writing", "image file", offset))
    }

    /// Forgets what is in memory, and reads the tables that the header points to.
    fn reload(&mut self) -> Result<()> {
        let storage = Arc::clone(&self.storage);
        self.l1 = read_words(
            storage.as_ref(),
            self.header.l1_offset,
            u64::from(self.header.l1_size),
        )?;
        self.snapshots = crate::snapshot_table::read(storage.as_ref(), &self.header)?;
        self.l1_dirty.clear();
        self.l2.clear();
        self.refs.blocks.clear();
        self.refs.dirty_entries.clear();
        self.refs.hint = 0;
        self.pending.clear();
        self.unpacked.clear();
        self.compressed_tail = None;
        self.refresh_ranges();
        note_tables(self)
    }
}
