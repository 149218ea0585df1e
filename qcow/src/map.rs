//! What is where: extents of the disk, through the whole chain, and a summary of an image.

use std::path::Path;
use std::sync::Arc;

use crate::backing::Backing;
use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::header::{Compression, Header};
use crate::image::Image;
use crate::read::Source;
use crate::snapshot_table::Snapshot;
use crate::storage::Storage;

/// What an extent of the disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, at this byte of the file that holds it.
    Data(u64),
    /// Compressed data.
    Compressed,
    /// Reads as zeros, because a file of the chain says so.
    Zero,
    /// Reads as zeros, because no file of the chain has it.
    Unallocated,
}

/// Neighbouring bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// Which file of the chain has it: 0 is the image itself, 1 its backing file, and so on.
    pub depth: usize,
}

/// An image in numbers and names.
#[derive(Clone, Debug)]
pub struct ImageInfo {
    /// The header, with all its fields.
    pub header: Header,
    /// Length of the image file in bytes.
    pub file_length: u64,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Persistent bitmaps.
    pub bitmaps: Vec<Bitmap>,
}

impl ImageInfo {
    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Width of a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.header.refcount_order
    }

    /// How compressed clusters are compressed.
    pub fn compression(&self) -> Compression {
        self.header.compression
    }
}

/// Describes the image at `path` without opening what it names.
///
/// # Errors
/// As [`Image::open`].
pub fn info(path: impl AsRef<Path>) -> Result<ImageInfo> {
    Image::open(path, &crate::OpenOptions::new().for_repair())?.info()
}

/// Segments that are looked up at once.
const BATCH: usize = 1024;

impl Image {
    /// Describes the image.
    ///
    /// # Errors
    /// [`Error::Malformed`] for its bitmap directory, [`Error::Io`].
    pub fn info(&self) -> Result<ImageInfo> {
        let (header, snapshots) = {
            let meta = self.lock();
            (meta.header.clone(), meta.snapshots.clone())
        };
        Ok(ImageInfo {
            bitmaps: crate::bitmap::read_directory(self.storage.as_ref(), &header)?,
            file_length: self
                .storage
                .len()
                .map_err(Error::io("measuring", "image file", 0))?,
            header,
            snapshots,
        })
    }

    /// Calls `each` with the extents of `length` bytes at `offset`, in order. Neighbours of one kind are one extent.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Malformed`], [`Error::Io`], and what `each` returns.
    pub fn map(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        self.check_range(offset, length)?;
        let mut last: Option<Extent> = None;
        self.map_at_depth(offset, length, 0, &mut |extent| {
            match last.as_mut() {
                Some(l) if joins(l, &extent) => l.length += extent.length,
                _ => {
                    if let Some(done) = last.replace(extent) {
                        each(done)?;
                    }
                }
            }
            Ok(())
        })?;
        last.map_or(Ok(()), each)
    }

    fn map_at_depth(
        &self,
        offset: u64,
        length: u64,
        depth: usize,
        each: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let segments = self.enter().resolve(at, end - at, BATCH)?;
            for s in segments {
                at = s.guest + s.length;
                let kind = match s.source {
                    Source::Host(host) => ExtentKind::Data(host),
                    Source::Compressed { .. } => ExtentKind::Compressed,
                    Source::Zero if self.backing.is_some() => ExtentKind::Zero,
                    Source::Zero => ExtentKind::Unallocated,
                    Source::Backing => {
                        self.map_backing(s.guest, s.length, depth + 1, each)?;
                        continue;
                    }
                };
                each(Extent {
                    start: s.guest,
                    length: s.length,
                    kind,
                    depth,
                })?;
            }
        }
        Ok(())
    }

    fn map_backing(
        &self,
        offset: u64,
        length: u64,
        depth: usize,
        each: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        let covered = self
            .backing
            .as_ref()
            .map_or(0, Backing::len)
            .saturating_sub(offset)
            .min(length);
        if covered > 0 {
            match &self.backing {
                Some(Backing::Qcow2(image)) => image.map_at_depth(offset, covered, depth, each)?,
                _ => each(Extent {
                    start: offset,
                    length: covered,
                    kind: ExtentKind::Data(offset),
                    depth,
                })?,
            }
        }
        if covered < length {
            let kind = ExtentKind::Unallocated;
            each(Extent {
                start: offset + covered,
                length: length - covered,
                kind,
                depth,
            })?;
        }
        Ok(())
    }

    /// The storage below, shared.
    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }
}

fn joins(a: &Extent, b: &Extent) -> bool {
    a.depth == b.depth
        && match (a.kind, b.kind) {
            (ExtentKind::Data(x), ExtentKind::Data(y)) => x + a.length == y,
            (x, y) => x == y,
        }
}
