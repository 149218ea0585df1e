//! Checking an image, and repairing it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::header::{be64, incompatible};
use crate::image::Image;
use crate::layout::{COMPRESSED, COPIED, OFFSET};
use crate::meta::Meta;
use crate::options::OpenOptions;
use crate::refcount;
use crate::refmap::RefMap;
use crate::storage::Storage;
use crate::switch::Place;
use crate::walk::Walk;

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    Nothing,
    /// Clusters that are counted but not used become free. Only where nothing else is wrong.
    Leaks,
    /// All refcounts and what depends on them are made anew from what is referenced, snapshots included.
    All,
}

/// What a check found, and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that endanger data and were left as they are.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used, and were left so.
    pub leaks: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// The findings in words; no more than the first 200.
    pub findings: Vec<String>,
    /// Guest clusters with data or a place in this image.
    pub allocated_clusters: u64,
    /// Of those, the compressed ones.
    pub compressed_clusters: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end: u64,
    /// The image was not closed after its refcounts were postponed.
    pub dirty: bool,
    /// The image is marked corrupt.
    pub marked_corrupt: bool,
}

/// Checks the image at `path`, and repairs it as far as `repair` allows. Its backing file and data file are not opened.
///
/// # Errors
/// What keeps the image from being looked at: [`Header::read`](crate::Header::read)'s errors, tables out of the file, [`Error::Io`].
pub fn check(path: impl AsRef<Path>, repair: Repair) -> Result<CheckReport> {
    let options = OpenOptions::new()
        .write(repair != Repair::Nothing)
        .for_repair();
    Image::open(path, &options)?.check_as_opened(repair)
}

/// Checks the image in `storage`; see [`check`].
///
/// # Errors
/// As [`check`].
pub fn check_storage(storage: Box<dyn Storage>, repair: Repair) -> Result<CheckReport> {
    let options = OpenOptions::new()
        .write(repair != Repair::Nothing)
        .for_repair();
    Image::open_storage(storage, &options)?.check_as_opened(repair)
}

impl Image {
    /// Checks the open image. Other operations wait meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn check(&self) -> Result<CheckReport> {
        let mut meta = self.exclusive();
        if meta.writable {
            meta.clean()?;
        }
        Ok(meta.examine()?.0)
    }

    fn check_as_opened(&self, repair: Repair) -> Result<CheckReport> {
        let mut meta = self.exclusive();
        let (report, walk) = meta.examine()?;
        match repair {
            Repair::Leaks if report.leaks > 0 && report.corruptions == 0 && !report.dirty => {
                meta.repair_leaks(report, walk)
            }
            Repair::All
                if report.leaks > 0
                    || report.corruptions > 0
                    || report.dirty
                    || report.marked_corrupt =>
            {
                meta.repair_all(report, walk)
            }
            _ => Ok(report),
        }
    }

    /// Makes the refcounts of a dirty image right, as it is opened for writing.
    pub(crate) fn repair_dirty(&self) -> Result<()> {
        let mut meta = self.exclusive();
        let (report, walk) = meta.examine()?;
        let broken = walk.broken;
        if broken > 0 {
            let why = report.findings.first().cloned().unwrap_or_default();
            return Err(meta.corrupt(format!(
                "it was not closed, and has {broken} broken references: {why}"
            )));
        }
        meta.repair_all(report, walk).map(|_| ())
    }
}

impl Meta {
    /// Walks all metadata and compares.
    fn examine(&mut self) -> Result<(CheckReport, Walk)> {
        let mut walk = self.walk()?;
        let mut report = CheckReport {
            allocated_clusters: walk.allocated,
            compressed_clusters: walk.compressed,
            total_clusters: self.layout.clusters(self.header.size),
            dirty: self.header.dirty(),
            marked_corrupt: self.header.corrupt(),
            ..CheckReport::default()
        };
        let mut all = walk.counts.clone();
        self.count_refcount_tables(&mut walk, &mut all);
        self.compare(&mut walk, &all, &mut report)?;
        self.compare_copied(&mut walk, &mut report)?;
        report.corruptions += walk.broken;
        report.findings.clone_from(&walk.texts);
        Ok((report, walk))
    }

    /// Counts the refcount table and its blocks.
    fn count_refcount_tables(&self, walk: &mut Walk, all: &mut RefMap) {
        let bits = self.layout.cluster_bits;
        let limit = self.layout.clusters(self.file_end);
        let start = self.header.refcount_table_offset >> bits;
        let end = start.saturating_add(u64::from(self.header.refcount_table_clusters));
        if end > limit {
            walk.note("the refcount table reaches past the end of the file".into());
        }
        (start..end.min(limit)).for_each(|c| all.add(c, 1));
        for &offset in self
            .refs
            .table
            .iter()
            .filter(|o| self.layout.aligned(**o) && **o != 0)
        {
            if offset >> bits < limit {
                all.add(offset >> bits, 1);
            }
        }
    }

    /// Compares counts with the refcounts on disk.
    fn compare(&mut self, walk: &mut Walk, all: &RefMap, report: &mut CheckReport) -> Result<()> {
        let storage = Arc::clone(&self.storage);
        let layout = self.layout;
        let (entries, order) = (layout.block_entries(), layout.refcount_order);
        let mut finding = |report: &mut CheckReport, cluster: u64, disk: u64, used: u64| {
            let verb = if disk < used {
                report.corruptions += 1;
                "too low"
            } else {
                report.leaks += 1;
                "too high"
            };
            walk.note(format!(
                "refcount of cluster {cluster:#x} is {disk}, {verb} for {used} references"
            ));
        };
        let mut seen = HashSet::new();
        let mut covered = HashSet::new();
        let mut last = 0;
        let table = self.refs.table.clone();
        for (index, &offset) in table.iter().enumerate().filter(|(_, o)| **o != 0) {
            if !layout.aligned(offset) || offset >= self.file_end || !seen.insert(offset) {
                report.corruptions += 1;
                continue;
            }
            covered.insert(index as u64);
            let mut block = vec![0; layout.cluster_size() as usize];
            storage.read_at(&mut block, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            for i in 0..entries {
                let cluster = index as u64 * entries + i;
                let (disk, used) = (refcount::get(&block, order, i), all.get(cluster));
                if used > 0 {
                    last = last.max(cluster + 1);
                }
                if disk != used {
                    finding(report, cluster, disk, used);
                }
            }
        }
        for group in all.groups(entries) {
            if !covered.contains(&group) {
                for cluster in group * entries..(group + 1) * entries {
                    let used = all.get(cluster);
                    if used > 0 {
                        last = last.max(cluster + 1);
                        finding(report, cluster, 0, used);
                    }
                }
            }
        }
        report.image_end = last << layout.cluster_bits;
        Ok(())
    }

    /// Compares the COPIED flags of the active tables with the refcounts on disk.
    fn compare_copied(&mut self, walk: &mut Walk, report: &mut CheckReport) -> Result<()> {
        let layout = self.layout;
        if layout.external_data {
            return Ok(());
        }
        let storage = Arc::clone(&self.storage);
        let limit = layout.clusters(self.file_end);
        let l1 = self.l1.clone();
        let mut seen = HashSet::new();
        for (i, &entry) in l1.iter().enumerate().filter(|(_, e)| **e & OFFSET != 0) {
            let offset = entry & OFFSET;
            if !layout.aligned(offset) || offset >> layout.cluster_bits >= limit {
                continue;
            }
            let once = matches!(
                self.refs
                    .get(storage.as_ref(), offset >> layout.cluster_bits),
                Ok(1)
            );
            if once != (entry & COPIED != 0) {
                report.corruptions += 1;
                walk.note(format!(
                    "the COPIED flag of L1 entry {i} contradicts the refcount"
                ));
            }
            if !seen.insert(offset) {
                continue;
            }
            let mut table = vec![0u8; layout.cluster_size() as usize];
            storage.read_at(&mut table, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            for (k, bytes) in table.chunks_exact(layout.entry_size() as usize).enumerate() {
                let word = be64(bytes, 0);
                let host = word & OFFSET;
                let expected = if word & COMPRESSED != 0 || host == 0 {
                    false
                } else if layout.aligned(host) && host >> layout.cluster_bits < limit {
                    matches!(
                        self.refs.get(storage.as_ref(), host >> layout.cluster_bits),
                        Ok(1)
                    )
                } else {
                    continue;
                };
                if expected != (word & COPIED != 0) {
                    report.corruptions += 1;
                    walk.note(format!("the COPIED flag of entry {k} of the L2 table at {offset:#x} contradicts the refcount"));
                }
            }
        }
        Ok(())
    }

    /// Lowers refcounts that are too high. Nothing else is wrong.
    fn repair_leaks(&mut self, mut report: CheckReport, mut walk: Walk) -> Result<CheckReport> {
        let unknown = self.header.unknown_extensions.clone();
        if !unknown.is_empty() {
            report.findings.push(format!(
                "leaks stay: extension {:#010x} may own clusters",
                unknown[0]
            ));
            return Ok(report);
        }
        let storage = Arc::clone(&self.storage);
        let mut all = walk.counts.clone();
        self.count_refcount_tables(&mut walk, &mut all);
        let layout = self.layout;
        for (index, offset) in self
            .refs
            .table
            .clone()
            .into_iter()
            .enumerate()
            .filter(|(_, o)| *o != 0)
        {
            let mut block = vec![0; layout.cluster_size() as usize];
            storage.read_at(&mut block, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            let mut changed = false;
            for i in 0..layout.block_entries() {
                let used = all.get(index as u64 * layout.block_entries() + i);
                if refcount::get(&block, layout.refcount_order, i) > used {
                    refcount::set(&mut block, layout.refcount_order, i, used);
                    changed = true;
                }
            }
            if changed {
                self.write_image(&block, offset)?;
            }
        }
        self.flush_image()?;
        self.refs.blocks.clear();
        // A count that became one makes its owner the only one.
        self.repair_copied(&all)?;
        self.flush_image()?;
        report.leaks_fixed = std::mem::take(&mut report.leaks);
        Ok(report)
    }

    /// Makes all refcounts anew, and the flags that depend on them. Broken references stay, and keep the image marked corrupt.
    fn repair_all(&mut self, mut report: CheckReport, walk: Walk) -> Result<CheckReport> {
        if let Some(kind) = self.header.unknown_extensions.first() {
            return Err(Error::Unsupported(format!(
                "making refcounts anew in an image with extension {kind:#010x}, which may own clusters"
            )));
        }
        if walk.broken > 0 {
            // Counts may be too low: what a broken reference meant is not known, so nothing may become free.
            return Err(self.corrupt(format!(
                "{} references are broken; repairing would have to guess",
                walk.broken
            )));
        }
        let counts = walk.counts;
        // Flags that claim too much go first; those that claim too little come last.
        let was_writable = std::mem::replace(&mut self.writable, true);
        self.clear_copied(&counts)?;
        self.switch(counts.clone(), Place::PastEnd, |header| {
            header.incompatible &= !(incompatible::DIRTY | incompatible::CORRUPT);
        })?;
        self.repair_copied(&counts)?;
        self.flush_image()?;
        self.writable = was_writable;
        report.leaks_fixed = std::mem::take(&mut report.leaks);
        report.corruptions_fixed = std::mem::take(&mut report.corruptions);
        report.dirty = false;
        report.marked_corrupt = false;
        Ok(report)
    }

    /// Clears COPIED flags on disk where `counts` is not one.
    fn clear_copied(&mut self, counts: &RefMap) -> Result<()> {
        self.rewrite_flags(counts, false)
    }

    /// Makes the COPIED flags on disk those that follow from `counts`.
    fn repair_copied(&mut self, counts: &RefMap) -> Result<()> {
        self.rewrite_flags(counts, true)
    }

    fn rewrite_flags(&mut self, counts: &RefMap, set: bool) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let mut l1 = self.l1.clone();
        let mut seen = HashSet::new();
        self.each_l2(&l1, |_, offset, mut table| {
            if !seen.insert(offset) {
                return Ok(());
            }
            let before = table.clone();
            self.set_copied(&mut table, counts)?;
            if !set {
                for (new, old) in table.chunks_exact_mut(8).zip(before.chunks_exact(8)) {
                    new.iter_mut().zip(old).for_each(|(n, o)| *n &= o);
                }
            }
            if table != before {
                self.write_image(&table, offset)
            } else {
                Ok(())
            }
        })?;
        for (i, entry) in l1.iter_mut().enumerate().filter(|(_, e)| **e & OFFSET != 0) {
            let once = counts.get((*entry & OFFSET) >> bits) == 1;
            let new = *entry & !COPIED
                | if once && (set || *entry & COPIED != 0) {
                    COPIED
                } else {
                    0
                };
            if new != *entry {
                *entry = new;
                self.write_image(&new.to_be_bytes(), self.header.l1_offset + i as u64 * 8)?;
            }
        }
        self.l1 = l1;
        self.l2.clear();
        Ok(())
    }
}
