//! Reading a header, and refusing it by name.

use super::*;
use crate::error::{Error, Result};
use crate::layout::SUBCLUSTERS;
use crate::storage::Storage;

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
