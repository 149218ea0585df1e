//! The header, its feature bits and its extensions (qcow2 "Header", "Header extensions").

use std::fmt;

use crate::error::{Error, Result};
use crate::layout::{Layout, SUBCLUSTERS};
use crate::storage::Storage;

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
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::NotQcow2`]; [`Error::Unsupported`] for encryption, other versions and unknown incompatible features, by name;
    /// [`Error::Malformed`] for what breaks the format's rules; [`Error::Io`].
    pub fn read(storage: &dyn Storage) -> Result<Header> {
        let mut fixed = [0u8; V3_LENGTH as usize];
        storage
            .read_at(&mut fixed, 0)
            .map_err(Error::io("reading", "image file", 0))?;
        let magic = [fixed[0], fixed[1], fixed[2], fixed[3]];
        if magic != MAGIC {
            return Err(Error::NotQcow2(magic));
        }
        let version = be32(&fixed, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::Unsupported(format!(
                "qcow version {version}; 2 and 3 are read"
            )));
        }
        let cluster_bits = be32(&fixed, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::malformed(
                "header",
                format!("cluster size 2^{cluster_bits}, not 2^9 to 2^21"),
            ));
        }
        let header_length = if version == 2 {
            V2_LENGTH
        } else {
            be32(&fixed, 100)
        };
        let cluster_size = 1u32 << cluster_bits;
        if version == 3
            && (header_length < 104 || header_length % 8 != 0 || header_length > cluster_size)
        {
            return Err(Error::malformed(
                "header",
                format!("its length is {header_length} bytes"),
            ));
        }
        // The first cluster, to where the file ends.
        let length = storage
            .len()
            .map_err(Error::io("measuring", "image file", 0))?;
        let mut first = vec![0u8; length.min(u64::from(cluster_size)) as usize];
        storage
            .read_at(&mut first, 0)
            .map_err(Error::io("reading", "image file", 0))?;

        let v3 = |at: usize| if version == 3 { be64(&fixed, at) } else { 0 };
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(&fixed, 24),
            l1_size: be32(&fixed, 36),
            l1_offset: be64(&fixed, 40),
            refcount_table_offset: be64(&fixed, 48),
            refcount_table_clusters: be32(&fixed, 56),
            snapshot_count: be32(&fixed, 60),
            snapshots_offset: be64(&fixed, 64),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order: if version == 3 { be32(&fixed, 96) } else { 4 },
            compression: Compression::Zlib,
            backing_name: None,
            backing_format: None,
            data_name: None,
            bitmaps: None,
            unknown_extensions: Vec::new(),
        };
        match be32(&fixed, 32) {
            0 => {}
            1 => return Err(Error::Unsupported("the image is encrypted with AES".into())),
            2 => {
                return Err(Error::Unsupported(
                    "the image is encrypted with LUKS".into(),
                ));
            }
            n => {
                return Err(Error::Unsupported(format!(
                    "the image is encrypted by unknown method {n}"
                )));
            }
        }

        let (backing_offset, backing_length) = (be64(&fixed, 8), be32(&fixed, 16));
        let mut extensions_end = first.len();
        if backing_offset != 0 {
            let end = backing_offset.checked_add(u64::from(backing_length));
            if backing_length > MAX_NAME
                || backing_length == 0
                || end.is_none_or(|e| e > first.len() as u64)
            {
                return Err(Error::malformed(
                    "header",
                    "the backing file name is not within the first cluster",
                ));
            }
            let at = backing_offset as usize;
            header.backing_name = first
                .get(at..at + backing_length as usize)
                .map(<[u8]>::to_vec);
            extensions_end = at;
        }
        let names = header.read_extensions(&first, header_length as usize, extensions_end)?;
        header.check_features(names, if header_length > 104 { fixed[104] } else { 0 })?;
        header.check_tables()?;
        Ok(header)
    }

    /// Walks the extensions; returns the feature name table.
    fn read_extensions<'a>(
        &mut self,
        first: &'a [u8],
        start: usize,
        end: usize,
    ) -> Result<&'a [u8]> {
        let mut names: &[u8] = &[];
        let mut seen = Vec::new();
        let mut at = start;
        while at + 8 <= end {
            let (kind, length) = (be32(first, at), be32(first, at + 4) as usize);
            if kind == extension::END {
                break;
            }
            let data = length
                .checked_add(at + 8)
                .filter(|e| *e <= end)
                .and_then(|e| first.get(at + 8..e));
            let Some(data) = data else {
                return Err(Error::malformed(
                    "header extension",
                    format!("{kind:#010x} ends outside of the first cluster"),
                ));
            };
            if seen.contains(&kind) {
                return Err(Error::malformed(
                    "header extension",
                    format!("{kind:#010x} appears twice"),
                ));
            }
            // At most as many as fit a header of unknown ones: bounds the search above.
            if seen.len() >= 1024 {
                return Err(Error::malformed(
                    "header extension",
                    "more than 1024 of them",
                ));
            }
            seen.push(kind);
            match kind {
                extension::BACKING_FORMAT => {
                    self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                extension::DATA_FILE => self.data_name = Some(data.to_vec()),
                extension::FEATURE_NAMES => names = data,
                extension::BITMAPS => {
                    if data.len() != 24 || be32(data, 4) != 0 {
                        return Err(Error::malformed(
                            "bitmaps extension",
                            format!("its length is {} bytes", data.len()),
                        ));
                    }
                    self.bitmaps = Some(BitmapExtension {
                        count: be32(data, 0),
                        directory_size: be64(data, 8),
                        directory_offset: be64(data, 16),
                    });
                }
                extension::ENCRYPTION => {
                    return Err(Error::Unsupported(
                        "the image has an encryption header (LUKS)".into(),
                    ));
                }
                other => self.unknown_extensions.push(other),
            }
            at += 8 + length.next_multiple_of(8);
        }
        Ok(names)
    }

    fn check_features(&mut self, names: &[u8], compression: u8) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let list: Vec<String> = (0..64)
                .filter(|bit| unknown >> bit & 1 != 0)
                .map(|bit| feature_name(names, bit))
                .collect();
            return Err(Error::Unsupported(format!(
                "incompatible features {}",
                list.join(", ")
            )));
        }
        self.compression = match (
            self.incompatible & incompatible::COMPRESSION_TYPE != 0,
            compression,
        ) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (true, 0) | (false, _) => {
                return Err(Error::malformed(
                    "header",
                    "compression type and its feature bit contradict each other",
                ));
            }
            (true, n) => return Err(Error::Unsupported(format!("compression type {n}"))),
        };
        if self.refcount_order > 6 {
            return Err(Error::malformed(
                "header",
                format!("refcounts of 2^{} bits", self.refcount_order),
            ));
        }
        if self.extended_l2() && (1u64 << self.cluster_bits) / SUBCLUSTERS < 512 {
            return Err(Error::malformed(
                "header",
                "subclusters smaller than 512 bytes",
            ));
        }
        if self.autoclear & autoclear::BITMAPS != 0 && self.bitmaps.is_none() {
            return Err(Error::malformed(
                "header",
                "the bitmaps bit is set without a bitmaps extension",
            ));
        }
        if self.autoclear & autoclear::RAW_DATA_FILE != 0 {
            if !self.external_data() {
                return Err(Error::malformed(
                    "header",
                    "the raw data file bit is set without a data file",
                ));
            }
            if self.backing_name.is_some() {
                return Err(Error::malformed(
                    "header",
                    "a raw data file and a backing file exclude each other",
                ));
            }
        }
        if self.external_data() && self.snapshot_count != 0 {
            return Err(Error::malformed(
                "header",
                "an image with a data file cannot have internal snapshots",
            ));
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<()> {
        let layout = self.layout();
        let aligned = [
            ("L1 table", self.l1_offset),
            ("refcount table", self.refcount_table_offset),
            (
                "snapshot table",
                if self.snapshot_count == 0 {
                    0
                } else {
                    self.snapshots_offset
                },
            ),
        ];
        for (what, offset) in aligned {
            if !layout.aligned(offset) || offset >= 1 << 63 {
                return Err(Error::malformed(
                    what,
                    format!("its offset {offset:#x} is not that of a cluster"),
                ));
            }
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(Error::malformed(
                "L1 table",
                format!("{} entries are more than 32 MiB", self.l1_size),
            ));
        }
        if layout.l1_entries(self.size) > u64::from(self.l1_size) {
            let why = format!(
                "{} entries do not cover a disk of {} bytes",
                self.l1_size, self.size
            );
            return Err(Error::malformed("L1 table", why));
        }
        if self.l1_size > 0 && self.l1_offset == 0 {
            return Err(Error::malformed("L1 table", "it overlaps the header"));
        }
        let clusters = u64::from(self.refcount_table_clusters);
        if clusters == 0 || self.refcount_table_offset == 0 {
            return Err(Error::malformed("refcount table", "there is none"));
        }
        if clusters << self.cluster_bits > MAX_REFCOUNT_TABLE_BYTES.max(layout.cluster_size()) {
            return Err(Error::malformed(
                "refcount table",
                format!("{clusters} clusters are more than 8 MiB"),
            ));
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::malformed(
                "snapshot table",
                format!("{} snapshots", self.snapshot_count),
            ));
        }
        Ok(())
    }

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

/// Name of incompatible feature `bit` in the image's own table, or its number.
fn feature_name(table: &[u8], bit: u32) -> String {
    for entry in table.chunks_exact(48) {
        if u32::from(entry[0]) == 0 && u32::from(entry[1]) == bit {
            let name = entry[2..].split(|b| *b == 0).next().unwrap_or_default();
            return format!("{bit} ({})", String::from_utf8_lossy(name).escape_debug());
        }
    }
    bit.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    fn sample() -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: 1 << 30,
            l1_size: 2,
            l1_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            backing_name: Some(b"base.img".to_vec()),
            backing_format: Some("raw".into()),
            data_name: None,
            bitmaps: None,
            unknown_extensions: vec![],
        }
    }

    fn read(bytes: Vec<u8>) -> Result<Header> {
        Header::read(&MemStorage::new(bytes))
    }

    #[test]
    fn round_trip() {
        for version in [2, 3] {
            let h = Header {
                version,
                ..sample()
            };
            assert_eq!(read(h.encode().unwrap()).unwrap(), h);
        }
    }

    #[test]
    fn encryption_is_refused_by_name() {
        for (method, name) in [(1, "AES"), (2, "LUKS"), (7, "method 7")] {
            let mut b = sample().encode().unwrap();
            b[35] = method;
            let e = read(b).unwrap_err();
            assert!(
                matches!(&e, Error::Unsupported(s) if s.contains(name)),
                "{e}"
            );
        }
        let mut b = sample().encode().unwrap();
        b[112..116].copy_from_slice(&extension::ENCRYPTION.to_be_bytes());
        assert!(matches!(read(b), Err(Error::Unsupported(s)) if s.contains("LUKS")));
    }

    #[test]
    fn unknown_incompatible_features_are_named() {
        let h = Header {
            backing_name: None,
            backing_format: None,
            incompatible: (1 << 40) | (1 << 9),
            ..sample()
        };
        let mut b = h.encode().unwrap();
        b.truncate(112);
        let mut table = vec![0u8, 40];
        table.extend_from_slice(b"time travel");
        table.resize(48, 0);
        b.extend_from_slice(&extension::FEATURE_NAMES.to_be_bytes());
        b.extend_from_slice(&48u32.to_be_bytes());
        b.extend_from_slice(&table);
        let e = read(b).unwrap_err().to_string();
        assert_eq!(e, "unsupported: incompatible features 9, 40 (time travel)");
    }

    #[test]
    fn every_truncation_and_bit_flip_is_an_error_or_a_header() {
        let whole = sample().encode().unwrap();
        for n in 0..whole.len() {
            let _ = read(whole[..n].to_vec());
            for bit in 0..8 {
                let mut b = whole.clone();
                b[n] ^= 1 << bit;
                if let Ok(h) = read(b) {
                    assert!(h.cluster_bits <= 21 && u64::from(h.l1_size) * 8 <= MAX_L1_BYTES);
                }
            }
        }
    }

    #[test]
    fn mutable_fields_are_where_encode_puts_them() {
        let h = sample();
        let (whole, part) = (h.encode().unwrap(), h.mutable_fields());
        assert_eq!(whole[24..24 + part.len()], part[..]);
        assert_eq!(part.len(), 72);
    }
}
