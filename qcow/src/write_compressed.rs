//! Writing compressed clusters. They are packed one behind the other, byte by byte, into host clusters that hold nothing else.

use std::sync::Arc;

use crate::compress;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::meta::Meta;

impl Meta {
    /// Room for `length` bytes of compressed data, less than a cluster; references to the host clusters are counted.
    fn alloc_bytes(&mut self, length: u64) -> Result<u64> {
        let storage = Arc::clone(&self.storage);
        let bits = self.layout.cluster_bits;
        let size = self.layout.cluster_size();
        // The cluster of the tail takes one more reference, if its count has room.
        let tail = match self.compressed_tail {
            Some((at, end)) => {
                let count = self.refs.get(storage.as_ref(), at >> bits)?;
                (count > 0 && count < self.layout.max_refcount()).then_some((at, end, count))
            }
            None => None,
        };
        let offset = match tail {
            Some((at, end, count)) if end - at >= length => {
                self.refs.set(storage.as_ref(), at >> bits, count + 1)?;
                self.compressed_tail = (end - at > length).then_some((at + length, end));
                at
            }
            _ => {
                let new = self.alloc(1)?.offset;
                let at = match tail {
                    Some((at, end, count)) if end == new => {
                        self.refs.set(storage.as_ref(), at >> bits, count + 1)?;
                        at
                    }
                    _ => new,
                };
                let end = new + size;
                self.compressed_tail = (end - at > length).then_some((at + length, end));
                at
            }
        };
        if (offset + length) >> self.layout.compressed_offset_bits() != 0 {
            self.give_back_bytes(offset, length)?;
            return Err(Error::Limit(
                "compressed data cannot lie that far back in the file".into(),
            ));
        }
        Ok(offset)
    }

    fn give_back_bytes(&mut self, offset: u64, length: u64) -> Result<()> {
        let bits = self.layout.cluster_bits;
        for cluster in offset >> bits..((offset + length - 1) >> bits) + 1 {
            self.give_back(cluster)?;
        }
        Ok(())
    }
}

impl Image {
    /// Writes `buf` at `offset` as compressed clusters, where that makes them smaller. Both ends are those of clusters, or the end is that
    /// of the disk. Clusters that are zero are made so without compression.
    ///
    /// # Errors
    /// [`Error::Invalid`] for other offsets, [`Error::Unsupported`] with a data file, and those of [`Image::write_at`].
    pub fn write_compressed_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let size = self.cluster_size();
        let length = buf.len() as u64;
        self.check_range(offset, length)?;
        if !offset.is_multiple_of(size)
            || (!length.is_multiple_of(size) && offset + length != self.len())
        {
            return Err(Error::Invalid(format!(
                "compressing {length} bytes at {offset:#x}: whole clusters are needed"
            )));
        }
        if self.layout.external_data {
            return Err(Error::Unsupported(
                "compressed clusters in an image with a data file".into(),
            ));
        }
        for (i, part) in buf.chunks(size as usize).enumerate() {
            self.compress_cluster(part, offset + i as u64 * size)?;
        }
        Ok(())
    }

    fn compress_cluster(&self, part: &[u8], guest: u64) -> Result<()> {
        if part.iter().all(|b| *b == 0) {
            return self.discard(guest, part.len() as u64);
        }
        let mut cluster = part.to_vec();
        cluster.resize(self.cluster_size() as usize, 0);
        let packed = compress::pack(self.compression, &cluster)
            .map_err(|why| Error::Invalid(format!("compressing: {why}")))?;
        let Some(packed) = packed else {
            return self.write_at(part, guest);
        };
        let mut meta = self.enter();
        let length = packed.len() as u64;
        let (offset, ticket) = loop {
            meta.prepare_write()?;
            if meta.busy.contains(&guest) {
                meta = self.wait_entered(meta);
                continue;
            }
            meta.own_l2(guest)?;
            let offset = meta.alloc_bytes(length)?;
            meta.busy.insert(guest);
            break (offset, meta.begin());
        };
        drop(meta);
        let written = self.storage.write_at(&packed, offset).map_err(Error::io(
            "writing",
            "image file",
            offset,
        ));
        let mut meta = self.lock();
        let result = match written {
            Ok(()) => meta.link_compressed(guest, offset, length),
            Err(e) => meta.give_back_bytes(offset, length).and(Err(e)),
        };
        meta.busy.remove(&guest);
        meta.end(ticket);
        self.wake(meta);
        result
    }
}

impl Meta {
    fn link_compressed(&mut self, guest: u64, offset: u64, length: u64) -> Result<()> {
        let old = self.entry(guest)?;
        let new = self.layout.compressed_entry(offset, length);
        self.set_entry(guest, new)?;
        self.release_entry(old)
    }
}
