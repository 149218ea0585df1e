//! Writing a header: all of it once, its changing fields often.

use super::*;
use crate::error::{Error, Result};

impl Header {
    /// The fixed fields that change while an image is in use: bytes 24 to 104 (72 in version 2) as written at offset 24.
    /// They lie in the first sector, so that they change all together or not at all.
    pub(crate) fn mutable_fields(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(80);
        b.extend_from_slice(&self.size.to_be_bytes());
        b.extend_from_slice(&0u32.to_be_bytes());
        b.extend_from_slice(&self.l1_size.to_be_bytes());
        b.extend_from_slice(&self.l1_offset.to_be_bytes());
        b.extend_from_slice(&self.refcount_table_offset.to_be_bytes());
        b.extend_from_slice(&self.refcount_table_clusters.to_be_bytes());
        b.extend_from_slice(&self.snapshot_count.to_be_bytes());
        b.extend_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            b.extend_from_slice(&self.incompatible.to_be_bytes());
            b.extend_from_slice(&self.compatible.to_be_bytes());
            b.extend_from_slice(&self.autoclear.to_be_bytes());
        }
        b
    }

    /// Where [`Self::mutable_fields`] go.
    pub(crate) const MUTABLE_OFFSET: u64 = 24;

    /// The whole header with extensions and backing file name, for a new image.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let mut b = Vec::with_capacity(512);
        b.extend_from_slice(&MAGIC);
        b.extend_from_slice(&self.version.to_be_bytes());
        b.extend_from_slice(&[0; 12]);
        b.extend_from_slice(&self.cluster_bits.to_be_bytes());
        b.extend_from_slice(&self.mutable_fields());
        if self.version >= 3 {
            b.extend_from_slice(&self.refcount_order.to_be_bytes());
            b.extend_from_slice(&V3_LENGTH.to_be_bytes());
            b.push(u8::from(self.compression == Compression::Zstd));
            b.extend_from_slice(&[0; 7]);
        }
        let mut add = |kind: u32, data: &[u8]| {
            b.extend_from_slice(&kind.to_be_bytes());
            b.extend_from_slice(&(data.len() as u32).to_be_bytes());
            b.extend_from_slice(data);
            b.resize(b.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            add(extension::BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_name {
            add(extension::DATA_FILE, name);
        }
        add(extension::END, &[]);
        if let Some(name) = &self.backing_name {
            if name.is_empty() || name.len() > MAX_NAME as usize {
                return Err(Error::Invalid(format!(
                    "a backing file name of {} bytes; 1 to 1023 fit",
                    name.len()
                )));
            }
            let offset = b.len() as u64;
            b[8..16].copy_from_slice(&offset.to_be_bytes());
            b[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            b.extend_from_slice(name);
        }
        if b.len() > 1 << self.cluster_bits {
            return Err(Error::Invalid(
                "the header with its file names does not fit the first cluster".into(),
            ));
        }
        Ok(b)
    }
}
