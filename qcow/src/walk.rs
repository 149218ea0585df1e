//! Walks all metadata and counts who references what. Each table is read once, however often it is referenced,
//! so that the time is bounded by the size of the file.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::bitmap;
use crate::error::{Error, Result};
use crate::header::be64;
use crate::layout::{COMPRESSED, Descriptor, L2Entry, OFFSET};
use crate::meta::{Meta, referenced};
use crate::refcount::read_words;
use crate::refmap::RefMap;

/// Findings that are kept as text; all are counted.
const MAX_TEXTS: usize = 200;

/// What a walk found.
#[derive(Debug)]
pub(crate) struct Walk {
    /// References to each cluster, but for those of the refcount table and its blocks.
    pub counts: RefMap,
    /// References that lead nowhere, or break the format's rules. While there are any, counts may be too low.
    pub broken: u64,
    pub texts: Vec<String>,
    /// Guest clusters of the active disk that have data here.
    pub allocated: u64,
    /// Of those, the compressed ones.
    pub compressed: u64,
}

impl Walk {
    pub fn report(&mut self, text: String) {
        self.broken += 1;
        self.note(text);
    }

    pub fn note(&mut self, text: String) {
        if self.texts.len() < MAX_TEXTS {
            self.texts.push(text);
        }
    }

    /// Counts the clusters of `bytes` bytes at `offset`.
    fn count(
        &mut self,
        meta: &Meta,
        what: impl FnOnce() -> String,
        offset: u64,
        bytes: u64,
    ) -> bool {
        let layout = meta.layout;
        let end = offset.checked_add(bytes).map(|e| layout.clusters(e));
        let limit = layout.clusters(meta.file_end);
        match end {
            _ if bytes == 0 => true,
            Some(end) if layout.aligned(offset) && end <= limit => {
                (offset >> layout.cluster_bits..end).for_each(|c| self.counts.add(c, 1));
                true
            }
            _ => {
                let text = format!(
                    "{} at {offset:#x} is not aligned, or past the end of the file",
                    what()
                );
                self.report(text);
                false
            }
        }
    }
}

impl Meta {
    /// Counts all references. The disk has to be up to date.
    pub fn walk(&mut self) -> Result<Walk> {
        let storage = Arc::clone(&self.storage);
        let size = self.layout.cluster_size();
        let mut walk = Walk {
            counts: RefMap::new(self.layout.clusters(self.file_end)),
            broken: 0,
            texts: Vec::new(),
            allocated: 0,
            compressed: 0,
        };
        walk.count(self, || "the header".into(), 0, size.min(self.file_end));
        let h = self.header.clone();
        walk.count(
            self,
            || "the L1 table".into(),
            h.l1_offset,
            u64::from(h.l1_size) * 8,
        );
        if h.snapshot_count > 0 {
            let bytes = crate::snapshot_table::table_bytes(&self.snapshots);
            walk.count(
                self,
                || "the snapshot table".into(),
                h.snapshots_offset,
                bytes,
            );
        }
        self.walk_bitmaps(&mut walk)?;

        // How often each L2 table is referenced, and by the active disk.
        let mut tables: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        for (i, entry) in self
            .l1
            .iter()
            .enumerate()
            .filter(|(_, e)| **e & OFFSET != 0)
        {
            let offset = entry & OFFSET;
            if walk.count(
                self,
                || format!("the L2 table of L1 entry {i}"),
                offset,
                size,
            ) {
                let t = tables.entry(offset).or_default();
                *t = (t.0 + 1, true);
            }
        }
        for s in self.snapshots.clone() {
            walk.count(
                self,
                || format!("the L1 table of snapshot {}", s.id),
                s.l1_offset,
                u64::from(s.l1_size) * 8,
            );
            for entry in read_words(storage.as_ref(), s.l1_offset, u64::from(s.l1_size))? {
                let offset = entry & OFFSET;
                if offset != 0
                    && walk.count(
                        self,
                        || format!("an L2 table of snapshot {}", s.id),
                        offset,
                        size,
                    )
                {
                    tables.entry(offset).or_default().0 += 1;
                }
            }
        }
        let mut bytes = vec![0u8; size as usize];
        for (offset, (times, active)) in tables {
            storage.read_at(&mut bytes, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            self.walk_l2(&mut walk, &bytes, offset, times, active);
        }
        Ok(walk)
    }

    fn walk_l2(&self, walk: &mut Walk, bytes: &[u8], offset: u64, times: u64, active: bool) {
        let layout = self.layout;
        let limit = layout.clusters(self.file_end);
        for (i, entry) in bytes.chunks_exact(layout.entry_size() as usize).enumerate() {
            let entry = L2Entry {
                word: be64(entry, 0),
                bitmap: if layout.extended_l2 {
                    be64(entry, 8)
                } else {
                    0
                },
            };
            if entry == L2Entry::default() {
                continue;
            }
            match referenced(&entry, &layout) {
                Ok(clusters) if clusters.is_empty() && !layout.external_data => {}
                Ok(clusters) => {
                    // The last sectors of compressed data may be counted past what was written.
                    let compressed = entry.word & COMPRESSED != 0;
                    let first_outside = clusters.start >= limit;
                    let outside = clusters.end > limit && !compressed;
                    if !clusters.is_empty() && (first_outside || outside) {
                        walk.report(format!("entry {i} of the L2 table at {offset:#x} points past the end of the file"));
                        continue;
                    }
                    walk.allocated += u64::from(active);
                    walk.compressed += u64::from(active && compressed);
                    clusters.for_each(|c| walk.counts.add(c, times));
                }
                Err(e) => walk.report(format!("entry {i} of the L2 table at {offset:#x}: {e}")),
            }
        }
    }

    fn walk_bitmaps(&mut self, walk: &mut Walk) -> Result<()> {
        let storage = Arc::clone(&self.storage);
        let Some(extension) = self.header.bitmaps else {
            return Ok(());
        };
        let bitmaps = match bitmap::read_directory(storage.as_ref(), &self.header) {
            Ok(bitmaps) => bitmaps,
            Err(e) => {
                walk.report(e.to_string());
                return Ok(());
            }
        };
        walk.count(
            self,
            || "the bitmap directory".into(),
            extension.directory_offset,
            extension.directory_size,
        );
        for b in bitmaps {
            walk.count(
                self,
                || format!("the table of bitmap {:?}", b.name),
                b.table_offset,
                u64::from(b.table_size) * 8,
            );
            for offset in b.clusters(storage.as_ref())? {
                walk.count(
                    self,
                    || format!("a cluster of bitmap {:?}", b.name),
                    offset,
                    self.layout.cluster_size(),
                );
            }
        }
        Ok(())
    }

    /// Calls `each` with the bytes of every L2 table of an L1 table on disk, and its index in there.
    pub fn each_l2(
        &self,
        l1: &[u64],
        mut each: impl FnMut(usize, u64, Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        for (i, entry) in l1.iter().enumerate() {
            let offset = entry & OFFSET;
            if offset == 0 {
                continue;
            }
            let mut bytes = vec![0u8; self.layout.cluster_size() as usize];
            self.storage.read_at(&mut bytes, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            each(i, offset, bytes)?;
        }
        Ok(())
    }

    /// Entries of an L2 table that hold a reference, with the clusters.
    pub fn references_of(&self, table: &[u8]) -> Result<Vec<std::ops::Range<u64>>> {
        let layout = self.layout;
        let mut found = Vec::new();
        for entry in table.chunks_exact(layout.entry_size() as usize) {
            let entry = L2Entry {
                word: be64(entry, 0),
                bitmap: if layout.extended_l2 {
                    be64(entry, 8)
                } else {
                    0
                },
            };
            let clusters = referenced(&entry, &layout)?;
            if !clusters.is_empty() {
                found.push(clusters);
            }
        }
        Ok(found)
    }

    /// Sets the COPIED flags of an L2 table from counts; how many changed.
    pub fn set_copied(&self, table: &mut [u8], counts: &RefMap) -> Result<u64> {
        let layout = self.layout;
        let mut changed = 0;
        for bytes in table.chunks_exact_mut(layout.entry_size() as usize) {
            let entry = L2Entry {
                word: be64(bytes, 0),
                bitmap: if layout.extended_l2 {
                    be64(bytes, 8)
                } else {
                    0
                },
            };
            let once = match entry.descriptor(&layout)? {
                Descriptor::Standard {
                    host: Some(host), ..
                } => layout.external_data || counts.get(host >> layout.cluster_bits) == 1,
                _ => false,
            };
            let word =
                entry.word & !crate::layout::COPIED | if once { crate::layout::COPIED } else { 0 };
            if word != entry.word {
                bytes[..8].copy_from_slice(&word.to_be_bytes());
                changed += 1;
            }
        }
        Ok(changed)
    }
}
