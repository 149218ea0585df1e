//! Internal snapshots: list, create, apply, delete (qcow2 "Snapshots").
//!
//! Each is one [`switch`](crate::switch): the active L1 and L2 tables are copied, counts are changed in memory, and the header turns to the
//! new tables at once. The tables of a snapshot are never written.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{COPIED, OFFSET};
use crate::meta::Meta;
use crate::refcount::{read_words, word_bytes};
use crate::refmap::RefMap;
use crate::snapshot_table::{self, Snapshot};
use crate::switch::Place;

impl Image {
    /// The internal snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.lock().snapshots.clone()
    }

    /// Keeps the disk as it is now under `name`. Returns the new snapshot's id.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is taken, [`Error::Unsupported`] with a data file, [`Error::Limit`] if refcounts are too narrow,
    /// [`Error::Corrupt`], [`Error::Io`]. The image is unchanged then.
    pub fn create_snapshot(&self, name: &str) -> Result<String> {
        let mut meta = self.exclusive();
        meta.prepare_snapshots()?;
        if meta.snapshots.iter().any(|s| s.name == name) {
            return Err(Error::Invalid(format!(
                "there is a snapshot {name:?} already"
            )));
        }
        if meta.layout.max_refcount() < 2 {
            return Err(Error::Limit(
                "snapshots need refcounts of more than 1 bit".into(),
            ));
        }
        let id = meta
            .snapshots
            .iter()
            .filter_map(|s| s.id.parse::<u64>().ok())
            .max()
            .unwrap_or(0)
            .saturating_add(1);
        let mut snapshots = meta.snapshots.clone();
        snapshots.push(Snapshot {
            id: id.to_string(),
            name: name.to_owned(),
            taken: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
            guest_clock: Default::default(),
            vm_state_size: 0,
            disk_size: meta.header.size,
            l1_offset: meta.header.l1_offset,
            l1_size: meta.header.l1_size,
            more: Vec::new(),
            on_disk: 0,
        });
        let mut counts = meta.trusted_counts()?;
        // The old active tree becomes the snapshot's as it is.
        let l1 = meta.l1.clone();
        let size = meta.header.size;
        let before = counts.clone();
        meta.turn(&before, &mut counts, &l1, size, &snapshots)?;
        Ok(id.to_string())
    }

    /// Makes the disk what it was at a snapshot, named by id or else by name. What was written since is gone.
    ///
    /// # Errors
    /// [`Error::NotFound`], and those of [`Image::create_snapshot`].
    pub fn apply_snapshot(&self, id_or_name: &str) -> Result<()> {
        let mut meta = self.exclusive();
        meta.prepare_snapshots()?;
        let snapshot = meta.find_snapshot(id_or_name)?;
        let before = meta.trusted_counts()?;
        let mut counts = before.clone();
        meta.forget_active(&mut counts)?;
        let storage = Arc::clone(&meta.storage);
        let l1 = read_words(
            storage.as_ref(),
            snapshot.l1_offset,
            u64::from(snapshot.l1_size),
        )?;
        let snapshots = meta.snapshots.clone();
        meta.turn(&before, &mut counts, &l1, snapshot.disk_size, &snapshots)?;
        self.size
            .store(meta.header.size, std::sync::atomic::Ordering::Release);
        Ok(())
    }

    /// Deletes a snapshot, named by id or else by name. What only it used becomes free.
    ///
    /// # Errors
    /// [`Error::NotFound`], and those of [`Image::create_snapshot`].
    pub fn delete_snapshot(&self, id_or_name: &str) -> Result<()> {
        let mut meta = self.exclusive();
        meta.prepare_snapshots()?;
        let gone = meta.find_snapshot(id_or_name)?;
        let before = meta.trusted_counts()?;
        let mut counts = before.clone();
        let storage = Arc::clone(&meta.storage);
        let l1 = read_words(storage.as_ref(), gone.l1_offset, u64::from(gone.l1_size))?;
        meta.forget_tree(&mut counts, &l1, gone.l1_offset)?;
        meta.forget_active(&mut counts)?;
        let snapshots: Vec<Snapshot> = meta
            .snapshots
            .iter()
            .filter(|s| s.l1_offset != gone.l1_offset)
            .cloned()
            .collect();
        let (l1, size) = (meta.l1.clone(), meta.header.size);
        meta.turn(&before, &mut counts, &l1, size, &snapshots)
    }
}

impl Meta {
    fn prepare_snapshots(&mut self) -> Result<()> {
        if self.layout.external_data {
            return Err(Error::Unsupported(
                "internal snapshots of an image with a data file".into(),
            ));
        }
        self.prepare_write()?;
        self.clean()
    }

    /// The snapshot with that id, or else the first with that name.
    pub fn find_snapshot(&self, id_or_name: &str) -> Result<Snapshot> {
        let by_id = self.snapshots.iter().find(|s| s.id == id_or_name);
        let found = by_id.or_else(|| self.snapshots.iter().find(|s| s.name == id_or_name));
        found.cloned().ok_or_else(|| Error::NotFound {
            kind: "snapshot",
            name: id_or_name.to_owned(),
        })
    }

    /// Turns this read-only image into a view of a snapshot.
    pub fn view_snapshot(&mut self, id_or_name: &str) -> Result<()> {
        if self.writable {
            return Err(Error::Invalid(
                "a snapshot is opened for reading only".into(),
            ));
        }
        let s = self.find_snapshot(id_or_name)?;
        self.l1 = read_words(self.storage.as_ref(), s.l1_offset, u64::from(s.l1_size))?;
        (self.header.size, self.header.l1_size, self.header.l1_offset) =
            (s.disk_size, s.l1_size, s.l1_offset);
        Ok(())
    }

    /// References as they are; an error if any is broken, or a cluster is counted too low.
    fn trusted_counts(&mut self) -> Result<RefMap> {
        if let Some(kind) = self.header.unknown_extensions.first() {
            return Err(Error::Unsupported(format!(
                "changing the snapshots of an image with extension {kind:#010x}, which may own clusters"
            )));
        }
        let walk = self.walk()?;
        if walk.broken > 0 {
            let first = walk.texts.first().cloned().unwrap_or_default();
            return Err(self.corrupt(first));
        }
        Ok(walk.counts)
    }

    /// Takes an L1 table and all that it references off the counts.
    fn forget_tree(&self, counts: &mut RefMap, l1: &[u64], l1_offset: u64) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let clusters = self.layout.clusters(l1.len() as u64 * 8);
        (0..clusters).for_each(|i| counts.sub((l1_offset >> bits) + i));
        self.each_l2(l1, |_, offset, table| {
            counts.sub(offset >> bits);
            for clusters in self.references_of(&table)? {
                clusters.for_each(|c| counts.sub(c));
            }
            Ok(())
        })
    }

    fn forget_active(&self, counts: &mut RefMap) -> Result<()> {
        self.forget_tree(counts, &self.l1, self.header.l1_offset)
    }

    /// Makes a copy of the tree below `l1` the active one, with these snapshots. `counts` still lacks that copy.
    /// What `before` has and the new state has not is punched out.
    fn turn(
        &mut self,
        before: &RefMap,
        counts: &mut RefMap,
        l1: &[u64],
        disk_size: u64,
        snapshots: &[Snapshot],
    ) -> Result<()> {
        let bits = self.layout.cluster_bits;
        // References of the copy.
        self.each_l2(l1, |_, _, table| {
            for clusters in self.references_of(&table)? {
                clusters.for_each(|c| counts.add(c, 1));
            }
            Ok(())
        })?;
        if counts.max() > self.layout.max_refcount() {
            return Err(Error::Limit(format!(
                "{} references to a cluster do not fit in a refcount of {} bits",
                counts.max(),
                self.layout.refcount_bits()
            )));
        }
        // The old snapshot table goes.
        if self.header.snapshot_count > 0 {
            let clusters = self
                .layout
                .clusters(snapshot_table::table_bytes(&self.snapshots));
            (0..clusters).for_each(|i| counts.sub((self.header.snapshots_offset >> bits) + i));
        }
        let table = snapshot_table::encode(snapshots)?;
        let table_offset = if table.is_empty() {
            0
        } else {
            self.put_counted(counts, &table)?
        };

        let mut new_l1 = vec![0; l1.len()];
        for (i, entry) in l1.iter().enumerate().filter(|(_, e)| **e & OFFSET != 0) {
            let offset = entry & OFFSET;
            let mut bytes = vec![0u8; self.layout.cluster_size() as usize];
            self.storage.read_at(&mut bytes, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            self.set_copied(&mut bytes, counts)?;
            new_l1[i] = self.put_counted(counts, &bytes)? | COPIED;
        }
        let bytes = word_bytes(&new_l1, l1.len() as u64 * 8);
        let l1_offset = if bytes.is_empty() {
            self.header.l1_offset
        } else {
            self.put_counted(counts, &bytes)?
        };
        let (l1_size, count) = (l1.len() as u32, snapshots.len() as u32);
        self.switch(counts.clone(), Place::Free, |header| {
            header.size = disk_size;
            header.l1_size = l1_size;
            header.l1_offset = l1_offset;
            header.snapshot_count = count;
            header.snapshots_offset = table_offset;
        })?;
        if self.punch_holes {
            for cluster in before.without(counts) {
                // The new refcount tables may be there already.
                if self.refs.get(&Arc::clone(&self.storage), cluster)? == 0 {
                    // A hint only.
                    let _ = self
                        .storage
                        .discard(cluster << bits, self.layout.cluster_size());
                }
            }
        }
        Ok(())
    }

    /// Writes a structure to new clusters, and counts them.
    fn put_counted(&mut self, counts: &mut RefMap, bytes: &[u8]) -> Result<u64> {
        let clusters = self.layout.clusters(bytes.len() as u64);
        let offset = self.alloc_exact(clusters)?;
        self.write_image(bytes, offset)?;
        (0..clusters).for_each(|i| counts.set((offset >> self.layout.cluster_bits) + i, 1));
        Ok(offset)
    }
}
