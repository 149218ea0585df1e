//! Making a new image.
//!
//! ```text
//! cluster 0   header, extensions, backing file name
//! then        refcount table, refcount blocks, L1 table
//! ```

use std::fs::File;
use std::path::Path;

use crate::backing;
use crate::error::{Error, Result};
use crate::header::{Compression, Header, autoclear, compatible, incompatible};
use crate::image::Image;
use crate::layout::Layout;
use crate::options::{CreateOptions, OpenOptions};
use crate::refcount::{self, word_bytes};
use crate::storage::{FileStorage, Storage};

impl Image {
    /// Makes an image at `path`, and opens it for writing.
    ///
    /// A backing file must exist, and so that it can be read; it is followed. A data file is made.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options that do not fit together, [`Error::Open`] if the file exists and is not to be replaced, [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<Image> {
        let path = path.as_ref();
        options.check()?;
        let dir = path.parent().map(Path::to_owned);
        let make = |path: &Path| {
            let mut how = File::options();
            how.read(true).write(true);
            if options.replace {
                how.create(true).truncate(true)
            } else {
                how.create_new(true)
            };
            how.open(path).map_err(|source| Error::Open {
                path: path.to_owned(),
                source,
            })
        };
        // What can fail fails before anything is replaced.
        encode(options)?;
        let followed = options
            .backing
            .as_ref()
            .map(|(p, _)| p)
            .filter(|p| p.as_os_str() == path.as_os_str());
        if followed.is_some() {
            return Err(Error::Invalid(format!(
                "{} cannot be its own backing file",
                path.display()
            )));
        }
        let storage = FileStorage::new(make(path)?);
        write(&storage, options)?;
        if let Some(data) = &options.data_file {
            let data = backing::resolve(data.as_os_str().as_encoded_bytes(), dir.as_deref())?;
            make(&data)?.set_len(options.size).map_err(Error::io(
                "growing",
                "data file",
                options.size,
            ))?;
        }
        drop(storage);
        let open = OpenOptions::new()
            .write(true)
            .follow_backing(true)
            .follow_data_file(true);
        Image::open(path, &open)
    }

    /// Makes an image in `storage`, which is cut to nothing first, and opens it for writing. It names no other file.
    ///
    /// # Errors
    /// As [`Image::create`].
    pub fn create_storage(storage: Box<dyn Storage>, options: &CreateOptions) -> Result<Image> {
        options.check()?;
        if options.backing.is_some() || options.data_file.is_some() {
            return Err(Error::Invalid(
                "an image without a path cannot name other files".into(),
            ));
        }
        write(storage.as_ref(), options)?;
        Image::open_storage(storage, &OpenOptions::new().write(true))
    }
}

/// Writes an empty image.
fn write(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let (header, bytes) = encode(options)?;
    let layout = header.layout();
    let size = layout.cluster_size();
    let put = |bytes: &[u8], at: u64| {
        storage
            .write_at(bytes, at)
            .map_err(Error::io("writing", "image file", at))
    };
    let grow = |length| {
        storage
            .set_len(length)
            .map_err(Error::io("growing", "image file", length))
    };
    let flush = || {
        storage
            .flush()
            .map_err(Error::io("flushing", "image file", 0))
    };
    grow(0)?;
    let places = Places::new(&layout, options.size);
    grow(places.end * size)?;
    let blocks: Vec<u64> = (0..places.blocks)
        .map(|i| (places.first_block + i) * size)
        .collect();
    put(
        &word_bytes(&blocks, places.table_clusters * size),
        places.table * size,
    )?;
    for (i, offset) in blocks.iter().enumerate() {
        let mut block = vec![0; size as usize];
        let first = i as u64 * layout.block_entries();
        for cluster in first..places.end.min(first + layout.block_entries()) {
            refcount::set(&mut block, layout.refcount_order, cluster - first, 1);
        }
        put(&block, *offset)?;
    }
    // The header comes last: without it there is no image.
    flush()?;
    put(&bytes, 0)?;
    flush()
}

/// Cluster numbers of the tables of an empty image.
struct Places {
    table: u64,
    table_clusters: u64,
    first_block: u64,
    blocks: u64,
    l1: u64,
    end: u64,
}

impl Places {
    fn new(layout: &Layout, disk: u64) -> Places {
        let l1_clusters = layout.clusters(layout.l1_entries(disk) * 8);
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let end = 1 + table_clusters + blocks + l1_clusters;
            let needed_blocks = end.div_ceil(layout.block_entries());
            let needed_table = layout.clusters(needed_blocks * 8);
            if needed_blocks <= blocks && needed_table <= table_clusters {
                let first_block = 1 + table_clusters;
                return Places {
                    table: 1,
                    table_clusters,
                    first_block,
                    blocks,
                    l1: first_block + blocks,
                    end,
                };
            }
            blocks = blocks.max(needed_blocks);
            table_clusters = table_clusters.max(needed_table);
        }
    }
}

/// The header of the new image, and its bytes.
fn encode(options: &CreateOptions) -> Result<(Header, Vec<u8>)> {
    let mut header = Header {
        version: options.version,
        cluster_bits: options.cluster_size.trailing_zeros(),
        size: options.size,
        l1_size: 0,
        l1_offset: 0,
        refcount_table_offset: 0,
        refcount_table_clusters: 0,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: options.refcount_bits.trailing_zeros(),
        compression: options.compression,
        backing_name: None,
        backing_format: None,
        data_name: None,
        bitmaps: None,
        unknown_extensions: Vec::new(),
    };
    let mut bit = |yes: bool, bit: u64| header.incompatible |= if yes { bit } else { 0 };
    bit(options.extended_l2, incompatible::EXTENDED_L2);
    bit(options.data_file.is_some(), incompatible::DATA_FILE);
    bit(
        options.compression == Compression::Zstd,
        incompatible::COMPRESSION_TYPE,
    );
    if options.lazy_refcounts {
        header.compatible = compatible::LAZY_REFCOUNTS;
    }
    if options.raw_data_file {
        header.autoclear = autoclear::RAW_DATA_FILE;
    }
    if let Some((path, format)) = &options.backing {
        header.backing_name = Some(path.as_os_str().as_encoded_bytes().to_vec());
        header.backing_format = Some(format.clone());
    }
    header.data_name = options
        .data_file
        .as_ref()
        .map(|p| p.as_os_str().as_encoded_bytes().to_vec());
    let layout = header.layout();
    if layout.l1_entries(options.size) * 8 > 32 << 20 {
        let limit = (4u64 << 20).saturating_mul(layout.l2_span());
        return Err(Error::Invalid(format!(
            "{} bytes; clusters of this size allow for {limit}",
            options.size
        )));
    }
    let places = Places::new(&layout, options.size);
    header.l1_size = layout.l1_entries(options.size) as u32;
    header.l1_offset = places.l1 << layout.cluster_bits;
    header.refcount_table_offset = places.table << layout.cluster_bits;
    header.refcount_table_clusters = places.table_clusters as u32;
    let bytes = header.encode()?;
    Ok((header, bytes))
}
