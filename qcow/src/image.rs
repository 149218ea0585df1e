//! An open image: opening, closing, and being alone with it.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};

use crate::backing::{self, Backing, Chain};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::header::{Compression, Header};
use crate::layout::{Layout, OFFSET};
use crate::meta::Meta;
use crate::options::OpenOptions;
use crate::refcount::{Refcounts, read_words};
use crate::snapshot_table;
use crate::storage::{FileStorage, Storage};
use crate::tickets::Tickets;
use crate::unpacked::Unpacked;

/// Tries to get the lock before it counts as held for long: a few microseconds.
const SPINS: usize = 100;

/// A qcow2 image: a disk of [`Image::len`] bytes that is read and written at any offset, by any number of threads.
///
/// Data is durable after [`Image::flush`]. Dropping an image flushes it too, but cannot say whether that failed; [`Image::close`] can.
#[derive(Debug)]
pub struct Image {
    pub(crate) meta: Mutex<Meta>,
    /// Signalled when `meta` changes in a way that others wait for.
    pub(crate) changed: Condvar,
    pub(crate) tickets: Arc<Tickets>,
    pub(crate) unpacked: Unpacked,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) data: Option<Arc<dyn Storage>>,
    pub(crate) backing: Option<Backing>,
    pub(crate) layout: Layout,
    pub(crate) size: AtomicU64,
    pub(crate) raw_data: bool,
    pub(crate) compression: Compression,
    /// Opened without the files that it depends on.
    pub(crate) structure_only: bool,
}

impl Image {
    /// Opens the image at `path`.
    ///
    /// A dirty image that is opened for writing is repaired first, as the format demands.
    ///
    /// # Errors
    /// What [`Header::read`] refuses; [`Error::NotAllowed`] for an image that names files which `options` do not allow to follow;
    /// [`Error::MarkedCorrupt`] for writing to a corrupt image.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Image> {
        let path = path.as_ref();
        let storage = FileStorage::open(path, options.write, options)?;
        let mut chain = Chain::new(options);
        backing::enter(&mut chain, storage.file(), path)?;
        let dir = options
            .backing_dir
            .clone()
            .or_else(|| path.parent().map(Path::to_owned));
        Image::open_chain(Box::new(storage), options, dir.as_deref(), &chain)
    }

    /// Opens the image in `storage`. Relative names of other files need [`OpenOptions::backing_dir`].
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_storage(storage: Box<dyn Storage>, options: &OpenOptions) -> Result<Image> {
        Image::open_chain(
            storage,
            options,
            options.backing_dir.as_deref(),
            &Chain::new(options),
        )
    }

    pub(crate) fn open_chain(
        storage: Box<dyn Storage>,
        options: &OpenOptions,
        dir: Option<&Path>,
        chain: &Chain,
    ) -> Result<Image> {
        let storage: Arc<dyn Storage> = Arc::from(storage);
        let header = Header::read(storage.as_ref())?;
        if options.write && header.corrupt() && !options.for_repair {
            return Err(Error::MarkedCorrupt);
        }
        let data = open_data_file(&header, options, dir)?;
        let backing = Backing::open(&header, options, dir, chain)?;
        let (layout, raw_data) = (header.layout(), header.raw_data_file());
        let compression = header.compression;
        let dirty = header.dirty();
        let mut meta = load(
            Arc::clone(&storage),
            data.clone(),
            header,
            options,
            backing.is_some(),
            chain.unpacked(),
        )?;
        if let Some(name) = &options.snapshot {
            meta.view_snapshot(name)?;
        }
        let size = meta.header.size;
        let image = Image {
            tickets: Arc::clone(&meta.tickets),
            unpacked: meta.unpacked.clone(),
            meta: Mutex::new(meta),
            changed: Condvar::new(),
            storage,
            data,
            backing,
            layout,
            size: AtomicU64::new(size),
            raw_data,
            compression,
            structure_only: options.for_repair,
        };
        if dirty && options.write && !options.for_repair {
            let repaired = image.repair_dirty();
            if repaired.is_err() {
                // Closing it must not call it clean.
                image.lock().stop();
            }
            repaired?;
        }
        Ok(image)
    }

    /// Size of the virtual disk in bytes.
    pub fn len(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether the virtual disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.layout.cluster_size()
    }

    /// Whether writes are accepted.
    pub fn is_writable(&self) -> bool {
        self.lock().writable
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.lock().header.clone()
    }

    /// Makes all finished writes durable, data and metadata.
    ///
    /// # Errors
    /// [`Error::Io`]: what was written since the last flush may be lost.
    pub fn flush(&self) -> Result<()> {
        {
            let mut meta = self.lock();
            if let Some(reason) = meta.stop_reason() {
                return Err(reason);
            }
            if meta.writable && meta.is_dirty() {
                return meta.flush_all();
            }
        }
        // Without the lock: there is only data to flush.
        let data = self
            .data
            .as_ref()
            .map_or(Ok(()), |d| d.flush())
            .map_err(Error::io("flushing", "data file", 0));
        let image = self
            .storage
            .flush()
            .map_err(Error::io("flushing", "image file", 0));
        let result = data.and(image);
        if result.is_err() {
            self.lock().stop();
        }
        result
    }

    /// Flushes and closes the image.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn close(self) -> Result<()> {
        self.finish()
    }

    fn finish(&self) -> Result<()> {
        let mut meta = self.exclusive();
        match meta.stop_reason() {
            Some(reason) => Err(reason),
            None if meta.writable && !self.structure_only => meta.clean(),
            None => Ok(()),
        }
    }

    // A thread that panicked in here has changed the caches at most half: they are not written any more.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(|poisoned| {
            let mut meta = poisoned.into_inner();
            meta.stop();
            meta
        })
    }

    pub(crate) fn wait<'a>(&self, mut meta: MutexGuard<'a, Meta>) -> MutexGuard<'a, Meta> {
        meta.waiters += 1;
        let mut meta = self.changed.wait(meta).unwrap_or_else(|poisoned| {
            let mut meta = poisoned.into_inner();
            meta.stop();
            meta
        });
        meta.waiters -= 1;
        meta
    }

    /// The lock, once no one waits to be alone.
    pub(crate) fn enter(&self) -> MutexGuard<'_, Meta> {
        let mut meta = self.lock();
        while meta.exclusive_waiters > 0 {
            meta = self.wait(meta);
        }
        meta
    }

    /// The lock, with no operation under way.
    pub(crate) fn exclusive(&self) -> MutexGuard<'_, Meta> {
        let mut meta = self.lock();
        meta.exclusive_waiters += 1;
        self.tickets.watch();
        while !self.tickets.is_empty() {
            meta = self.wait(meta);
        }
        self.tickets.unwatch();
        meta.exclusive_waiters -= 1;
        self.changed.notify_all();
        meta
    }

    /// The lock, if that takes no longer than another's look at the tables, and no one waits to be alone.
    pub(crate) fn try_enter(&self) -> Option<MutexGuard<'_, Meta>> {
        for _ in 0..SPINS {
            match self.meta.try_lock() {
                Ok(meta) => return (meta.exclusive_waiters == 0).then_some(meta),
                Err(TryLockError::Poisoned(_)) => return None,
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        None
    }

    /// Ends the operation with `ticket`, which has left the metadata alone since it began.
    pub(crate) fn leave(&self, ticket: u64) {
        if self.tickets.end(ticket) {
            // Who watches either holds the lock or waits for the signal.
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Gives up the lock and wakes who waits for a change. With nobody there, that is no system call.
    pub(crate) fn wake(&self, meta: MutexGuard<'_, Meta>) {
        let waiters = meta.waiters;
        drop(meta);
        if waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Checks that `length` bytes at `offset` are on the disk.
    pub(crate) fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        if self.structure_only {
            return Err(Error::Invalid(
                "the image was opened for a check, not for its data".into(),
            ));
        }
        let size = self.len();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange {
                offset,
                length,
                size,
            }),
        }
    }

    /// The file that holds guest data.
    pub(crate) fn data_storage(&self) -> &dyn Storage {
        self.data.as_ref().unwrap_or(&self.storage).as_ref()
    }

    pub(crate) fn data_file_name(&self) -> &'static str {
        if self.data.is_some() {
            "data file"
        } else {
            "image file"
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Who wants to know calls close().
        let _ = self.finish();
    }
}

fn open_data_file(
    header: &Header,
    options: &OpenOptions,
    dir: Option<&Path>,
) -> Result<Option<Arc<dyn Storage>>> {
    if !header.external_data() || options.for_repair {
        return Ok(None);
    }
    let Some(name) = &header.data_name else {
        return Err(Error::Unsupported(
            "the image has a data file but does not name it".into(),
        ));
    };
    let shown = String::from_utf8_lossy(name).into_owned();
    if !options.follow_data_file {
        return Err(Error::NotAllowed {
            kind: "data file",
            name: shown,
        });
    }
    let storage = backing::resolve(name, dir)
        .and_then(|path| FileStorage::open(&path, options.write, options));
    let storage = storage.map_err(|e| Error::Chain {
        kind: "data file",
        name: shown,
        source: Box::new(e),
    })?;
    Ok(Some(Arc::new(storage)))
}

/// Reads the tables that stay in memory, and checks them.
pub(crate) fn load(
    storage: Arc<dyn Storage>,
    data: Option<Arc<dyn Storage>>,
    header: Header,
    options: &OpenOptions,
    backed: bool,
    unpacked: Unpacked,
) -> Result<Meta> {
    let layout = header.layout();
    let file_end = storage
        .len()
        .map_err(Error::io("measuring", "image file", 0))?;
    let within = |what: &'static str, offset: u64, bytes: u64| match offset.checked_add(bytes) {
        Some(end) if end <= file_end.next_multiple_of(layout.cluster_size()) => Ok(()),
        _ => Err(Error::malformed(
            what,
            format!("{bytes} bytes at {offset:#x} reach past the end of the file"),
        )),
    };
    within("L1 table", header.l1_offset, u64::from(header.l1_size) * 8)?;
    let table_bytes = u64::from(header.refcount_table_clusters) << layout.cluster_bits;
    if !options.for_repair {
        within("refcount table", header.refcount_table_offset, table_bytes)?;
    }
    let l1 = read_words(
        storage.as_ref(),
        header.l1_offset,
        u64::from(header.l1_size),
    )?;
    let refs = Refcounts::read(
        storage.as_ref(),
        layout,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        options.refcount_cache,
    )?;
    let snapshots = snapshot_table::read(storage.as_ref(), &header)?;
    for s in &snapshots {
        within("snapshot's L1 table", s.l1_offset, u64::from(s.l1_size) * 8)?;
    }
    let mut meta = Meta {
        l2: Cache::new(options.l2_cache, layout.cluster_size() as usize),
        writable: options.write,
        stopped: false,
        backed,
        l1_dirty: Default::default(),
        tables: Default::default(),
        ranges: Vec::new(),
        pending: Vec::new(),
        tickets: Default::default(),
        next_ticket: 0,
        busy: Default::default(),
        exclusive_waiters: 0,
        waiters: 0,
        punch_holes: options.punch_holes,
        unpacked,
        compressed_tail: None,
        storage,
        data,
        header,
        layout,
        l1,
        refs,
        snapshots,
        file_end,
    };
    meta.refresh_ranges();
    if options.write && !options.for_repair {
        note_tables(&mut meta)?;
    }
    Ok(meta)
}

/// Notes where L2 tables and refcount blocks are, so that no write ever goes there.
pub(crate) fn note_tables(meta: &mut Meta) -> Result<()> {
    meta.tables.clear();
    for (i, &offset) in meta.refs.table.iter().enumerate().filter(|(_, o)| **o != 0) {
        if !meta.layout.aligned(offset) || offset >= meta.file_end || !meta.tables.insert(offset) {
            let why =
                format!("entry {i} is {offset:#x}: not aligned, past the end, or there twice");
            return Err(Error::malformed("refcount table", why));
        }
    }
    for (i, entry) in meta.l1.iter().enumerate() {
        let offset = entry & OFFSET;
        if !meta.layout.aligned(offset) {
            return Err(Error::malformed(
                "L1 table",
                format!("entry {i} is {offset:#x}: not aligned"),
            ));
        }
        if offset != 0 {
            meta.tables.insert(offset);
        }
    }
    Ok(())
}
