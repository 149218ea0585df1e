//! In which order metadata reaches the disk.
//!
//! ```text
//! refcounts that grew ─▶ refcount table ─▶ (data, flushed) ─▶ L2 tables ─▶ L1 entries ─▶ refcounts that shrink
//! ```
//!
//! Each arrow is a flush. A kill between any two writes leaves clusters that are counted but not used, which `check`
//! calls leaks, and never one that is used but not counted, or a table that points to what was not written.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::header::incompatible;
use crate::meta::Meta;

impl Meta {
    /// Whether the disk lacks anything that memory has.
    pub fn is_dirty(&self) -> bool {
        let postponed = self.header.lazy_refcounts() && self.header.dirty();
        let refcounts = !self.refs.dirty_entries.is_empty() || self.refs.blocks.dirty() > 0;
        self.l2.dirty() > 0
            || !self.l1_dirty.is_empty()
            || !self.pending.is_empty()
            || (refcounts && !postponed)
    }

    /// Brings the disk up to date, in order, and gives back what is no longer referenced. The last writes are not flushed.
    pub fn write_back(&mut self) -> Result<()> {
        let postponed = self.header.lazy_refcounts() && self.header.dirty();
        if !postponed {
            self.write_refcounts()?;
        }
        if self.l2.dirty() > 0 || !self.l1_dirty.is_empty() {
            self.flush_files()?;
            let storage = Arc::clone(&self.storage);
            self.l2.write_back(storage.as_ref())?;
            if !self.l1_dirty.is_empty() {
                self.flush_image()?;
                self.write_l1()?;
            }
        }
        self.apply_pending()?;
        if !postponed {
            self.write_refcounts()?;
        }
        Ok(())
    }

    /// Writes refcount blocks, and behind a flush the table entries that point to new ones.
    pub fn write_refcounts(&mut self) -> Result<()> {
        let storage = Arc::clone(&self.storage);
        self.refs.blocks.write_back(storage.as_ref())?;
        if self.refs.dirty_entries.is_empty() {
            return Ok(());
        }
        self.flush_image()?;
        for &i in &self.refs.dirty_entries {
            let at = self.header.refcount_table_offset + i as u64 * 8;
            let bytes = self.refs.table.get(i).copied().unwrap_or(0).to_be_bytes();
            storage
                .write_at(&bytes, at)
                .map_err(Error::io("writing", "image file", at))?;
        }
        self.refs.dirty_entries.clear();
        Ok(())
    }

    fn write_l1(&mut self) -> Result<()> {
        for &i in &self.l1_dirty {
            let at = self.header.l1_offset + i as u64 * 8;
            let bytes = self.l1.get(i).copied().unwrap_or(0).to_be_bytes();
            self.storage
                .write_at(&bytes, at)
                .map_err(Error::io("writing", "image file", at))?;
        }
        self.l1_dirty.clear();
        Ok(())
    }

    /// The barrier between data and what points to it.
    pub fn flush_files(&mut self) -> Result<()> {
        if let Some(data) = &self.data {
            let flushed = data.flush();
            flushed.map_err(|e| {
                self.stop();
                Error::io("flushing", "data file", 0)(e)
            })?;
        }
        self.flush_image()
    }

    /// Gives back clusters that neither the disk nor an operation under way references.
    fn apply_pending(&mut self) -> Result<()> {
        let oldest = self.tickets.oldest().unwrap_or(u64::MAX);
        if !self.pending.iter().any(|p| p.after <= oldest) {
            return Ok(());
        }
        // What referenced them must be gone from the disk first.
        self.flush_image()?;
        let (ready, rest) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|p| p.after <= oldest);
        self.pending = rest;
        let ready: Vec<_> = ready;
        for p in ready {
            self.give_back(p.cluster)?;
        }
        Ok(())
    }

    /// Lowers a refcount; a cluster that becomes free is forgotten by the caches.
    pub fn give_back(&mut self, cluster: u64) -> Result<()> {
        let storage = Arc::clone(&self.storage);
        let count = self.refs.get(storage.as_ref(), cluster)?;
        if count == 0 {
            return Err(self.corrupt(format!(
                "cluster {cluster:#x} is in use but its refcount is zero"
            )));
        }
        self.refs.set(storage.as_ref(), cluster, count - 1)?;
        if count == 1 {
            let (offset, size) = (
                cluster << self.layout.cluster_bits,
                self.layout.cluster_size(),
            );
            self.l2.remove(offset);
            self.tables.remove(&offset);
            if self
                .compressed_tail
                .is_some_and(|(at, _)| at & !(size - 1) == offset)
            {
                self.compressed_tail = None;
            }
            if self.punch_holes {
                // A hint: a host that cannot do it changes nothing.
                let _ = self.storage.discard(offset, size);
            }
        }
        Ok(())
    }

    /// Brings everything to the disk, postponed refcounts too, and clears the dirty bit. Nothing may be under way.
    pub fn clean(&mut self) -> Result<()> {
        self.write_back()?;
        if self.header.lazy_refcounts() && self.header.dirty() {
            self.write_refcounts()?;
            self.flush_files()?;
            self.header.incompatible &= !incompatible::DIRTY;
            self.write_header()?;
        }
        self.flush_files()
    }

    /// Everything durable, at the price of holding the lock.
    pub fn flush_all(&mut self) -> Result<()> {
        self.write_back()?;
        self.flush_files()
    }
}
