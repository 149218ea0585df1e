//! Persistent bitmaps (qcow2 "Bitmaps"): listed, counted by `check`, never followed by our writes.
//!
//! The first write to an image clears the auto-clear bit that says that its bitmaps are up to date, so nobody trusts them after.

use crate::error::{Error, Result};
use crate::header::{Header, autoclear, be32, be64};
use crate::image::Image;
use crate::layout::OFFSET;
use crate::refcount::read_words;
use crate::storage::Storage;

/// Largest bitmap directory that is read, in bytes.
const MAX_DIRECTORY: u64 = 64 << 20;
/// Largest bitmap table that is read, in entries.
const MAX_TABLE: u32 = 4 << 20;

/// A persistent bitmap, as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that each bit stands for.
    pub granularity: u64,
    /// It is meant to follow all writes.
    pub auto: bool,
    /// It was not saved correctly, or the image was written by who does not know bitmaps.
    pub inconsistent: bool,
    pub(crate) table_offset: u64,
    pub(crate) table_size: u32,
}

/// Reads the bitmap directory.
pub(crate) fn read_directory(storage: &dyn Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(extension) = header.bitmaps else {
        return Ok(Vec::new());
    };
    let malformed = |why: String| Error::malformed("bitmap directory", why);
    let layout = header.layout();
    let (offset, size) = (extension.directory_offset, extension.directory_size);
    let length = storage
        .len()
        .map_err(Error::io("measuring", "image file", 0))?;
    let within = |offset: u64, bytes: u64| {
        layout.aligned(offset)
            && offset
                .checked_add(bytes)
                .is_some_and(|e| e <= length.next_multiple_of(layout.cluster_size()))
    };
    if size > MAX_DIRECTORY || !within(offset, size) {
        return Err(malformed(format!("{size} bytes at {offset:#x}")));
    }
    let mut bytes = vec![0; size as usize];
    storage
        .read_at(&mut bytes, offset)
        .map_err(Error::io("reading", "image file", offset))?;
    let stale = header.autoclear & autoclear::BITMAPS == 0;
    let mut bitmaps = Vec::new();
    let mut rest = &bytes[..];
    for i in 0..extension.count {
        if rest.len() < 24 {
            return Err(malformed(format!("it ends before entry {i}")));
        }
        let name_length = usize::from(u16::from_be_bytes([rest[18], rest[19]]));
        let extra = be32(rest, 20) as usize;
        let whole = extra
            .checked_add(24 + name_length)
            .and_then(|n| n.checked_next_multiple_of(8));
        let Some(entry) = whole.and_then(|n| rest.get(..n)) else {
            return Err(malformed(format!("entry {i} reaches past its end")));
        };
        let flags = be32(entry, 12);
        let bitmap = Bitmap {
            name: String::from_utf8_lossy(&entry[24 + extra..24 + extra + name_length])
                .into_owned(),
            granularity: 1u64.checked_shl(u32::from(entry[17])).unwrap_or(0),
            auto: flags & 2 != 0,
            inconsistent: stale || flags & 1 != 0,
            table_offset: be64(entry, 0),
            table_size: be32(entry, 8),
        };
        if bitmap.table_size > MAX_TABLE
            || !within(bitmap.table_offset, u64::from(bitmap.table_size) * 8)
        {
            return Err(malformed(format!(
                "entry {i}: a table of {} entries at {:#x}",
                bitmap.table_size, bitmap.table_offset
            )));
        }
        bitmaps.push(bitmap);
        rest = &rest[entry.len()..];
    }
    Ok(bitmaps)
}

impl Bitmap {
    /// Host offsets of the clusters with the bits.
    pub(crate) fn clusters(&self, storage: &dyn Storage) -> Result<Vec<u64>> {
        let table = read_words(storage, self.table_offset, u64::from(self.table_size))?;
        Ok(table
            .into_iter()
            .map(|w| w & OFFSET)
            .filter(|o| *o != 0)
            .collect())
    }
}

impl Image {
    /// The persistent bitmaps of the image.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Io`].
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        read_directory(self.storage.as_ref(), &self.lock().header)
    }
}
