//! An image's metadata in memory, behind one lock: header, L1, caches, and what is in flight.
//!
//! Nothing here does data I/O: the lock is held to look up and change tables, never over guest data.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::header::{Header, autoclear, incompatible};
use crate::layout::{COPIED, Descriptor, L2Entry, Layout, OFFSET, OffsetSet};
use crate::refcount::Refcounts;
use crate::snapshot_table::Snapshot;
use crate::storage::Storage;
use crate::tickets::Tickets;
use crate::unpacked::Unpacked;

/// A host cluster that is no longer referenced by what is in memory, but may be by the disk or by I/O under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pending {
    pub cluster: u64,
    /// Operations with a lower ticket may still use the cluster.
    pub after: u64,
}

/// All mutable state of an image.
#[derive(Debug)]
pub(crate) struct Meta {
    pub storage: Arc<dyn Storage>,
    pub data: Option<Arc<dyn Storage>>,
    pub header: Header,
    pub layout: Layout,
    pub writable: bool,
    /// Writes ended early, because metadata is corrupt or what the disk holds is not known.
    pub stopped: bool,
    /// Whether a backing file is in use.
    pub backed: bool,
    pub l1: Vec<u64>,
    pub l1_dirty: BTreeSet<usize>,
    pub l2: Cache,
    pub refs: Refcounts,
    pub snapshots: Vec<Snapshot>,
    /// Offsets of L2 tables and refcount blocks in use.
    pub tables: OffsetSet,
    /// Other metadata: merged, sorted ranges of bytes.
    pub ranges: Vec<(u64, u64)>,
    /// To be given back with the next write-back.
    pub pending: Vec<Pending>,
    /// Operations under way.
    pub tickets: Arc<Tickets>,
    pub next_ticket: u64,
    /// Guest clusters whose entry an operation under way is about to change.
    pub busy: OffsetSet,
    /// Operations that wait to be alone.
    pub exclusive_waiters: usize,
    /// Threads that wait for a change.
    pub waiters: usize,
    /// Length of the image file.
    pub file_end: u64,
    /// Whether freed clusters are punched out of the image file.
    pub punch_holes: bool,
    pub unpacked: Unpacked,
    /// Free bytes behind the last compressed cluster, in a host cluster that holds only compressed data.
    pub compressed_tail: Option<(u64, u64)>,
}

impl Meta {
    /// Fails unless the image takes writes, and does what must be done before the first one.
    pub fn prepare_write(&mut self) -> Result<()> {
        if self.is_prepared()? {
            return Ok(());
        }
        // Bitmaps do not follow our writes, and unknown features cannot: say so before anything changes.
        let (stale, lazy) = (self.stale_features(), self.must_get_dirty());
        if stale != 0 || lazy {
            self.header.autoclear &= !stale;
            if lazy {
                self.header.incompatible |= incompatible::DIRTY;
            }
            self.write_header()?;
            self.flush_image()?;
        }
        if self.is_full() {
            self.write_back()?;
        }
        Ok(())
    }

    /// Whether there is nothing to do before a write. Fails unless the image takes writes.
    pub fn is_prepared(&self) -> Result<bool> {
        if !self.writable {
            return Err(self.stop_reason().unwrap_or(Error::ReadOnly));
        }
        Ok(self.stale_features() == 0 && !self.must_get_dirty() && !self.is_full())
    }

    fn stale_features(&self) -> u64 {
        self.header.autoclear & (autoclear::BITMAPS | !autoclear::KNOWN)
    }

    fn must_get_dirty(&self) -> bool {
        self.header.lazy_refcounts() && !self.header.dirty()
    }

    /// Bounds what is dirty and what is pending.
    fn is_full(&self) -> bool {
        self.l2.dirty() >= self.l2.limit() / 2 || self.pending.len() >= 4096
    }

    /// Writes the header's changing fields, all in one sector.
    pub fn write_header(&mut self) -> Result<()> {
        let at = Header::MUTABLE_OFFSET;
        let written = self.storage.write_at(&self.header.mutable_fields(), at);
        written.map_err(|e| {
            // Which of the two headers is there now, nobody knows.
            self.stop();
            Error::io("writing", "image file", at)(e)
        })
    }

    /// A barrier. Where it fails, the host may have dropped what was written before, and no later flush would tell.
    pub fn flush_image(&mut self) -> Result<()> {
        let flushed = self.storage.flush();
        flushed.map_err(|e| {
            self.stop();
            Error::io("flushing", "image file", 0)(e)
        })
    }

    /// Ends all writes.
    pub fn stop(&mut self) {
        self.stopped |= self.writable;
        self.writable = false;
    }

    /// Why there are no more writes, if they ended early.
    pub fn stop_reason(&self) -> Option<Error> {
        let reason = if self.header.corrupt() {
            Error::MarkedCorrupt
        } else {
            Error::Stopped
        };
        self.stopped.then_some(reason)
    }

    /// Marks the image corrupt on disk, where its version can, and stops all writes. Returns the error to give to the caller.
    pub fn corrupt(&mut self, why: impl Into<String>) -> Error {
        if self.writable {
            self.stop();
            if self.header.version >= 3 {
                self.header.incompatible |= incompatible::CORRUPT;
                // The error that is being reported is worse than one of these.
                let _ = self.write_header();
                let _ = self.flush_image();
            }
        }
        Error::Corrupt(why.into())
    }

    /// Collects where metadata other than L2 tables and refcount blocks is.
    pub fn refresh_ranges(&mut self) {
        let h = &self.header;
        let size = self.layout.cluster_size();
        let span =
            |offset: u64, bytes: u64| (offset, offset.saturating_add(bytes.next_multiple_of(size)));
        let mut ranges = vec![
            (0, size),
            span(h.l1_offset, u64::from(h.l1_size) * 8),
            span(
                h.refcount_table_offset,
                u64::from(h.refcount_table_clusters) * size,
            ),
        ];
        if h.snapshot_count > 0 {
            ranges.push(span(h.snapshots_offset, 1));
        }
        ranges.extend(
            self.snapshots
                .iter()
                .map(|s| span(s.l1_offset, u64::from(s.l1_size) * 8)),
        );
        ranges.retain(|r| r.1 > r.0);
        ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for r in ranges {
            match merged.last_mut() {
                Some(last) if r.0 <= last.1 => last.1 = last.1.max(r.1),
                _ => merged.push(r),
            }
        }
        self.ranges = merged;
    }

    /// Whether the host cluster at `offset` holds metadata that is known to be in use.
    pub fn is_metadata(&self, offset: u64) -> bool {
        let after = self.ranges.partition_point(|r| r.0 <= offset);
        let in_range = after
            .checked_sub(1)
            .and_then(|i| self.ranges.get(i))
            .is_some_and(|r| offset < r.1);
        in_range || self.tables.contains(&offset)
    }

    // ---- L1 and L2 ----

    /// Offset of the L2 table for L1 entry `index`, and whether only that entry references it.
    pub fn l2_offset(&self, index: u64) -> Result<Option<(u64, bool)>> {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|i| self.l1.get(i))
            .copied()
            .unwrap_or(0);
        let offset = entry & OFFSET;
        if offset == 0 {
            return Ok(None);
        }
        if !self.layout.aligned(offset) {
            return Err(Error::malformed(
                "L1 entry",
                format!("entry {index}: L2 table at {offset:#x} is not aligned"),
            ));
        }
        Ok(Some((offset, entry & COPIED != 0)))
    }

    /// Checks the COPIED flags of the L2 table at `offset` against the refcounts, before anything is written by them. Where they claim
    /// too much they are ignored, so that a write cannot change what a snapshot shares.
    fn verify_l2(&mut self, offset: u64) -> Result<()> {
        if self.l2.is_verified(offset) || self.layout.external_data {
            return Ok(());
        }
        let storage = Arc::clone(&self.storage);
        let table = self.l2.get(storage.as_ref(), offset)?;
        let step = self.layout.entry_size() as usize / 8;
        let mut wrong = Vec::new();
        for i in (0..self.layout.cluster_size() as usize / 8).step_by(step) {
            let word = table.word(i);
            if word & COPIED != 0 {
                let cluster = (word & OFFSET) >> self.layout.cluster_bits;
                if self.refs.get(storage.as_ref(), cluster)? != 1 {
                    wrong.push((i, word & !COPIED));
                }
            }
        }
        if !wrong.is_empty() {
            self.l2.change(storage.as_ref(), offset, |t| {
                wrong.iter().for_each(|(i, w)| t.mask_word(*i, *w));
            })?;
        }
        self.l2.set_verified(offset);
        Ok(())
    }

    /// The entry for the guest cluster at `guest`, for reading: its COPIED flag says nothing.
    pub fn entry_to_read(&mut self, guest: u64) -> Result<L2Entry> {
        let Some((offset, _)) = self.l2_offset(self.layout.l1_index(guest))? else {
            return Ok(L2Entry::default());
        };
        let table = self.l2.get(self.storage.as_ref(), offset)?;
        Ok(read_entry(table, &self.layout, self.layout.l2_index(guest)))
    }

    /// The entry for the guest cluster at `guest`. Its COPIED flag is off where the L2 table itself is shared.
    pub fn entry(&mut self, guest: u64) -> Result<L2Entry> {
        let Some((offset, own)) = self.l2_offset(self.layout.l1_index(guest))? else {
            return Ok(L2Entry::default());
        };
        self.verify_l2(offset)?;
        let table = self.l2.get(self.storage.as_ref(), offset)?;
        let mut entry = read_entry(table, &self.layout, self.layout.l2_index(guest));
        if !own {
            entry.word &= !COPIED;
        }
        Ok(entry)
    }

    /// Makes the L2 table for `guest` one that only the active L1 table references.
    pub fn own_l2(&mut self, guest: u64) -> Result<u64> {
        let index = self.layout.l1_index(guest);
        let old = self.l2_offset(index)?;
        if let Some((offset, true)) = old {
            self.verify_l2(offset)?;
            return Ok(offset);
        }
        let size = self.layout.cluster_size();
        let mut bytes = vec![0; size as usize];
        let storage = Arc::clone(&self.storage);
        if let Some((offset, _)) = old {
            bytes.copy_from_slice(self.l2.get(storage.as_ref(), offset)?.bytes());
            self.recompute_copied(&mut bytes)?;
        }
        let new = self.alloc(1)?.offset;
        self.l2.insert(new, bytes);
        self.tables.insert(new);
        let slot = index as usize;
        let Some(entry) = self.l1.get_mut(slot) else {
            return Err(Error::malformed("L1 table", format!("no entry {index}")));
        };
        *entry = new | COPIED;
        self.l1_dirty.insert(slot);
        if let Some((offset, _)) = old {
            self.release(offset)?;
        }
        Ok(new)
    }

    /// Sets the COPIED flags of an L2 table from the refcounts.
    pub fn recompute_copied(&mut self, bytes: &mut [u8]) -> Result<()> {
        if self.layout.external_data {
            return Ok(());
        }
        let storage = Arc::clone(&self.storage);
        for entry in bytes.chunks_exact_mut(self.layout.entry_size() as usize) {
            let e = L2Entry {
                word: crate::header::be64(entry, 0),
                bitmap: crate::header::be64(entry, 8),
            };
            if let Descriptor::Standard {
                host: Some(host), ..
            } = e.descriptor(&self.layout)?
            {
                let once = self
                    .refs
                    .get(storage.as_ref(), host >> self.layout.cluster_bits)?
                    == 1;
                let word = if once {
                    e.word | COPIED
                } else {
                    e.word & !COPIED
                };
                entry[..8].copy_from_slice(&word.to_be_bytes());
            }
        }
        Ok(())
    }

    /// Replaces the entry for `guest`.
    pub fn set_entry(&mut self, guest: u64, entry: L2Entry) -> Result<()> {
        let offset = self.own_l2(guest)?;
        let storage = Arc::clone(&self.storage);
        let index = self.layout.l2_index(guest) as usize;
        let extended = self.layout.extended_l2;
        self.l2.change(storage.as_ref(), offset, |t| {
            if extended {
                t.set_word(index * 2, entry.word);
                t.set_word(index * 2 + 1, entry.bitmap);
            } else {
                t.set_word(index, entry.word);
            }
        })
    }

    /// Gives up what `entry` references.
    pub fn release_entry(&mut self, entry: L2Entry) -> Result<()> {
        for cluster in referenced(&entry, &self.layout)? {
            self.release(cluster << self.layout.cluster_bits)?;
        }
        Ok(())
    }

    /// Gives up one reference to the host cluster at `offset`, as soon as the disk no longer has it and no I/O uses it.
    pub fn release(&mut self, offset: u64) -> Result<()> {
        self.pending.push(Pending {
            cluster: offset >> self.layout.cluster_bits,
            after: self.next_ticket,
        });
        Ok(())
    }

    // ---- operations under way ----

    /// Registers an operation: host clusters that it looked up are not given to anyone else until [`Self::end`].
    pub fn begin(&mut self) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.begin(ticket);
        ticket
    }

    /// Who holds the lock tells of a change anyway.
    pub fn end(&mut self, ticket: u64) {
        let _ = self.tickets.end(ticket);
    }
}

/// Entry number `index` of an L2 table.
pub(crate) fn read_entry(table: &crate::cache::Table, layout: &Layout, index: u64) -> L2Entry {
    let index = index as usize;
    if layout.extended_l2 {
        L2Entry {
            word: table.word(index * 2),
            bitmap: table.word(index * 2 + 1),
        }
    } else {
        L2Entry {
            word: table.word(index),
            bitmap: 0,
        }
    }
}

/// Numbers of the host clusters of the image file that an entry holds a reference to.
pub(crate) fn referenced(entry: &L2Entry, layout: &Layout) -> Result<std::ops::Range<u64>> {
    if layout.external_data {
        return Ok(0..0);
    }
    Ok(match entry.descriptor(layout)? {
        Descriptor::Compressed { offset, length } => {
            offset >> layout.cluster_bits..((offset + length - 1) >> layout.cluster_bits) + 1
        }
        Descriptor::Standard {
            host: Some(host), ..
        } => host >> layout.cluster_bits..(host >> layout.cluster_bits) + 1,
        Descriptor::Standard { host: None, .. } => 0..0,
    })
}
