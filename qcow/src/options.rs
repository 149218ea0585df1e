//! How an image is opened and created.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::header::Compression;

/// How an image is opened. Following other files is off until asked for.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub(crate) write: bool,
    pub(crate) follow_backing: bool,
    pub(crate) follow_data_file: bool,
    pub(crate) probe_backing: bool,
    pub(crate) backing_dir: Option<PathBuf>,
    pub(crate) l2_cache: usize,
    pub(crate) refcount_cache: usize,
    pub(crate) unpacked_cache: usize,
    pub(crate) punch_holes: bool,
    pub(crate) for_repair: bool,
    pub(crate) ignore_backing: bool,
    pub(crate) snapshot: Option<String>,
    pub(crate) direct: bool,
    pub(crate) direct_block: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            write: false,
            follow_backing: false,
            follow_data_file: false,
            probe_backing: false,
            backing_dir: None,
            l2_cache: 8 << 20,
            refcount_cache: 1 << 20,
            unpacked_cache: 4 << 20,
            punch_holes: true,
            for_repair: false,
            ignore_backing: false,
            snapshot: None,
            direct: false,
            direct_block: 1,
        }
    }
}

impl OpenOptions {
    /// Read-only, following no other file, caches of 8 MiB for L2 tables, 1 MiB for refcounts and 4 MiB for
    /// compressed clusters. All but the last are for each image of a chain.
    pub fn new() -> Self {
        OpenOptions::default()
    }

    /// Whether the image may be written.
    #[must_use]
    pub fn write(mut self, yes: bool) -> Self {
        self.write = yes;
        self
    }

    /// Whether the backing file that the image names is opened (read-only), and its own, and so on.
    /// Without this, an image with a backing file is refused.
    #[must_use]
    pub fn follow_backing(mut self, yes: bool) -> Self {
        self.follow_backing = yes;
        self
    }

    /// Whether the external data file that the image names is opened. Without this, an image that has one is refused.
    #[must_use]
    pub fn follow_data_file(mut self, yes: bool) -> Self {
        self.follow_data_file = yes;
        self
    }

    /// Whether a backing file whose format the image does not name may be taken for qcow2 because it looks like it.
    /// Off, such a file is refused: a guest can make a raw disk look like qcow2.
    #[must_use]
    pub fn probe_backing(mut self, yes: bool) -> Self {
        self.probe_backing = yes;
        self
    }

    /// Directory from which relative names are taken, for an image that is not opened by its path.
    #[must_use]
    pub fn backing_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.backing_dir = Some(dir.into());
        self
    }

    /// Bytes of L2 tables kept in memory. At least four tables are.
    #[must_use]
    pub fn l2_cache(mut self, bytes: usize) -> Self {
        self.l2_cache = bytes;
        self
    }

    /// Bytes of refcount blocks kept in memory. At least four blocks are.
    #[must_use]
    pub fn refcount_cache(mut self, bytes: usize) -> Self {
        self.refcount_cache = bytes;
        self
    }

    /// Bytes of compressed clusters that are kept in memory as they are unpacked, so that small reads of one cluster unpack it once.
    /// All images of a chain share them. At least one cluster is kept; 0 keeps none. Memory is taken as it fills.
    #[must_use]
    pub fn unpacked_cache(mut self, bytes: usize) -> Self {
        self.unpacked_cache = bytes;
        self
    }

    /// Whether clusters that become free are punched out of the image file (on unless turned off).
    #[must_use]
    pub fn punch_holes(mut self, yes: bool) -> Self {
        self.punch_holes = yes;
        self
    }

    /// Opens the disk as it was at an internal snapshot, by id or else by name, for reading only.
    #[must_use]
    pub fn snapshot(mut self, id_or_name: &str) -> Self {
        self.snapshot = Some(id_or_name.to_owned());
        self
    }

    /// Whether files are opened with `O_DIRECT`, past the page cache: the image, its data file and its whole chain of backing files.
    /// Each must lie on a file system that can do that. Off unless turned on.
    #[must_use]
    pub fn direct(mut self, yes: bool) -> Self {
        self.direct = yes;
        self
    }

    /// Direct I/O in blocks of at least so many bytes, a power of two, even where a file takes smaller ones.
    #[must_use]
    pub fn direct_block(mut self, bytes: u64) -> Self {
        self.direct_block = bytes;
        self
    }

    /// Opens an image to look at its structure or to repair it: corrupt and dirty images too, and without its backing file, so that
    /// what is not allocated reads as zeros.
    pub(crate) fn for_repair(mut self) -> Self {
        self.for_repair = true;
        self.ignore_backing = true;
        self
    }
}

/// How an image is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    pub(crate) size: u64,
    pub(crate) version: u32,
    pub(crate) cluster_size: u64,
    pub(crate) refcount_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<(PathBuf, String)>,
    pub(crate) data_file: Option<PathBuf>,
    pub(crate) raw_data_file: bool,
    pub(crate) replace: bool,
}

impl CreateOptions {
    /// A disk of `size` bytes: version 3, clusters of 64 KiB, refcounts of 16 bits. An existing file is not replaced.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            raw_data_file: false,
            replace: false,
        }
    }

    /// Version of the format: 2 or 3.
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    #[must_use]
    pub fn cluster_size(mut self, bytes: u64) -> Self {
        self.cluster_size = bytes;
        self
    }

    /// Width of a refcount: 1, 2, 4, 8, 16, 32 or 64. Internal snapshots need more than 1.
    #[must_use]
    pub fn refcount_bits(mut self, bits: u32) -> Self {
        self.refcount_bits = bits;
        self
    }

    /// Divides each cluster into 32 subclusters that are allocated on their own. Clusters of 16 KiB and more.
    #[must_use]
    pub fn extended_l2(mut self, yes: bool) -> Self {
        self.extended_l2 = yes;
        self
    }

    /// Postpones refcount updates; after a kill the image has to be repaired, which happens as it is opened.
    #[must_use]
    pub fn lazy_refcounts(mut self, yes: bool) -> Self {
        self.lazy_refcounts = yes;
        self
    }

    /// How compressed clusters are compressed.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Reads what is not written from `path`, a file of format "raw" or "qcow2". A relative path counts from the new image's directory.
    #[must_use]
    pub fn backing(mut self, path: impl AsRef<Path>, format: &str) -> Self {
        self.backing = Some((path.as_ref().to_owned(), format.to_owned()));
        self
    }

    /// Puts guest data into `path`, which is made. A relative path counts from the new image's directory here, as that of a backing file
    /// does; QEMU takes it from the directory that it runs in, so an absolute path suits both.
    #[must_use]
    pub fn data_file(mut self, path: impl AsRef<Path>) -> Self {
        self.data_file = Some(path.as_ref().to_owned());
        self
    }

    /// Keeps the data file a raw image of the disk at any time.
    #[must_use]
    pub fn raw_data_file(mut self, yes: bool) -> Self {
        self.raw_data_file = yes;
        self
    }

    /// Whether an existing file is replaced.
    #[must_use]
    pub fn replace(mut self, yes: bool) -> Self {
        self.replace = yes;
        self
    }

    /// Checks what can be checked without any file.
    pub(crate) fn check(&self) -> Result<()> {
        let fail = |why: String| Err(Error::Invalid(why));
        if !(2..=3).contains(&self.version) {
            return fail(format!("version {}; 2 and 3 exist", self.version));
        }
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return fail(format!(
                "a cluster size of {}; powers of two from 512 to 2 MiB are possible",
                self.cluster_size
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return fail(format!(
                "refcounts of {} bits; 1, 2, 4, 8, 16, 32 and 64 are possible",
                self.refcount_bits
            ));
        }
        if self.version == 2 {
            let needs_3 = [
                (self.refcount_bits != 16, "refcounts of other than 16 bits"),
                (self.extended_l2, "subclusters"),
                (self.lazy_refcounts, "lazy refcounts"),
                (self.compression == Compression::Zstd, "zstd"),
                (self.data_file.is_some(), "a data file"),
            ];
            if let Some((_, what)) = needs_3.iter().find(|n| n.0) {
                return fail(format!("version 2 does not have {what}"));
            }
        }
        if self.extended_l2 && self.cluster_size < 16384 {
            return fail("subclusters need clusters of at least 16 KiB".into());
        }
        if self.raw_data_file && (self.data_file.is_none() || self.backing.is_some()) {
            return fail("a raw data file needs a data file, and no backing file".into());
        }
        if let Some((_, format)) = &self.backing
            && !matches!(format.as_str(), "raw" | "qcow2")
        {
            return fail(format!(
                "backing format {format:?}; raw and qcow2 are possible"
            ));
        }
        Ok(())
    }
}
