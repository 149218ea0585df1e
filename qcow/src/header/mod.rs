//! The header, its feature bits and its extensions (qcow2 "Header", "Header extensions").

mod encode;
mod parse;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::layout::Layout;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Incompatible feature bits.
pub(crate) mod incompatible {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Compatible feature bits.
pub(crate) mod compatible {
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Auto-clear feature bits.
pub(crate) mod autoclear {
    pub const BITMAPS: u64 = 1;
    pub const RAW_DATA_FILE: u64 = 1 << 1;
    pub const KNOWN: u64 = BITMAPS | RAW_DATA_FILE;
}

/// Header extension types.
mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const ENCRYPTION: u32 = 0x0537_be77;
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// Length of a version 2 header.
const V2_LENGTH: u32 = 72;
/// Length of a version 3 header that we write: through `compression_type`, padded.
const V3_LENGTH: u32 = 112;
/// Longest backing file name.
const MAX_NAME: u32 = 1023;
/// Largest L1 table, in bytes: that of other implementations too.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots in an image.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream with a window of 4 KiB.
    #[default]
    Zlib,
    /// A Zstandard frame. Version 3 only.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        })
    }
}

/// Where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Size of the directory in bytes.
    pub directory_size: u64,
    /// Where it starts, in bytes.
    pub directory_offset: u64,
}

/// An image's header, checked on its own: offsets are aligned and sizes within the limits of this crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Byte offset of the active L1 table.
    pub l1_offset: u64,
    /// Byte offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Byte offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Auto-clear feature bits.
    pub autoclear: u64,
    /// log2 of the width of a refcount in bits: 0 to 6.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file, byte for byte.
    pub backing_name: Option<Vec<u8>>,
    /// Format of the backing file, where the image names it.
    pub backing_format: Option<String>,
    /// Name of the external data file, byte for byte.
    pub data_name: Option<Vec<u8>>,
    /// The bitmaps extension.
    pub bitmaps: Option<BitmapExtension>,
    /// Types of the extensions that are not known here; they stay as they are.
    pub unknown_extensions: Vec<u32>,
}

/// Big-endian numbers out of a slice that may be too short: zeros then.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

/// Whether `bytes`, the beginning of a file, are those of a qcow image.
pub fn is_qcow2(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

impl Header {
    pub(crate) fn layout(&self) -> Layout {
        Layout {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2(),
            version: self.version,
            external_data: self.external_data(),
        }
    }

    /// Whether clusters have subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether guest data is in another file.
    pub fn external_data(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether the data file is, at any time, a raw image of the disk.
    pub fn raw_data_file(&self) -> bool {
        self.autoclear & autoclear::RAW_DATA_FILE != 0
    }

    /// Whether refcounts may be wrong on disk.
    pub fn dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image is marked corrupt.
    pub fn corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether refcount updates may be postponed.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }
}
