//! Changing the size of the disk.

use std::sync::atomic::Ordering;

use crate::backing::Backing;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::meta::Meta;
use crate::refcount::word_bytes;

/// What may be lost when a disk becomes smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// Nothing: data past the new end is an error.
    IfFree,
    /// What lies past the new end is discarded.
    Discard,
}

impl Image {
    /// Makes the disk `size` bytes. New bytes read as zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`] if data would be lost that `shrink` does not give up, [`Error::Limit`] for a size that the clusters do not allow,
    /// [`Error::ReadOnly`], [`Error::Io`].
    pub fn resize(&self, size: u64, shrink: Shrink) -> Result<()> {
        let old = self.len();
        if size < old {
            self.shrink(old, size, shrink)
        } else {
            self.grow(old, size)
        }
    }

    fn shrink(&self, old: u64, size: u64, shrink: Shrink) -> Result<()> {
        if shrink == Shrink::IfFree {
            self.check_range(size, old - size)?;
            let segments = self.enter().resolve(size, old - size, usize::MAX)?;
            // The rest of the last cluster is no loss if it is zero; elsewhere what counts is that no cluster is in use.
            let mut buf = vec![0u8; 65536];
            for s in segments.iter().filter(|s| {
                matches!(
                    s.source,
                    crate::read::Source::Host(_) | crate::read::Source::Compressed { .. }
                )
            }) {
                let mut at = s.guest;
                while at < s.guest + s.length {
                    let n = (s.guest + s.length - at).min(buf.len() as u64) as usize;
                    self.read_at(&mut buf[..n], at)?;
                    if buf[..n].iter().any(|b| *b != 0) {
                        return Err(Error::Invalid(format!(
                            "shrinking to {size} bytes would lose data at {at:#x}"
                        )));
                    }
                    at += n as u64;
                }
            }
        }
        self.discard(size, old - size)?;
        self.flush()?;
        let mut meta = self.exclusive();
        meta.prepare_write()?;
        meta.header.size = size;
        meta.write_header()?;
        meta.flush_image()?;
        self.size.store(size, Ordering::Release);
        drop(meta);
        match (&self.data, self.raw_data) {
            (Some(data), true) => {
                data.set_len(size)
                    .map_err(Error::io("cutting", "data file", size))
            }
            _ => Ok(()),
        }
    }

    fn grow(&self, old: u64, size: u64) -> Result<()> {
        {
            let mut meta = self.exclusive();
            meta.prepare_write()?;
            meta.grow_l1(size)?;
        }
        if let Some(data) = &self.data {
            let length = data.len().map_err(Error::io("measuring", "data file", 0))?;
            if length < size {
                data.set_len(size)
                    .map_err(Error::io("growing", "data file", size))?;
            }
        }
        // The rest of the last cluster, and what the backing file has past the old end, must not come to light.
        let covered = self.backing.as_ref().map_or(0, Backing::len).min(size);
        let end = old
            .next_multiple_of(self.cluster_size())
            .max(covered)
            .min(size);
        if end > old {
            self.zero_unchecked(old, end)?;
            self.flush()?;
        }
        let mut meta = self.exclusive();
        meta.header.size = size;
        meta.write_header()?;
        meta.flush_image()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

impl Meta {
    /// Moves the L1 table to a larger place if a disk of `size` bytes needs it.
    fn grow_l1(&mut self, size: u64) -> Result<()> {
        let layout = self.layout;
        let needed = layout.l1_entries(size);
        if needed * 8 > 32 << 20 {
            return Err(Error::Limit(format!(
                "a disk of {size} bytes needs an L1 table of more than 32 MiB"
            )));
        }
        if needed <= u64::from(self.header.l1_size) {
            return Ok(());
        }
        self.flush_all()?;
        let (old_offset, old_bytes) = (self.header.l1_offset, u64::from(self.header.l1_size) * 8);
        let clusters = layout.clusters(needed * 8);
        let offset = self.alloc_exact(clusters)?;
        self.write_refcounts()?;
        self.l1.resize(needed as usize, 0);
        self.write_image(
            &word_bytes(&self.l1, clusters * layout.cluster_size()),
            offset,
        )?;
        self.flush_image()?;
        self.header.l1_offset = offset;
        self.header.l1_size = needed as u32;
        self.write_header()?;
        self.flush_image()?;
        self.refresh_ranges();
        for i in 0..layout.clusters(old_bytes) {
            self.release(old_offset + i * layout.cluster_size())?;
        }
        self.write_back()
    }
}
