//! Copying a whole disk into another file, and committing an image into its backing file.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::backing::{self, Backing};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::OFFSET;
use crate::map::ExtentKind;
use crate::options::{CreateOptions, OpenOptions};
use crate::read::Source;
use crate::resize::Shrink;
use crate::storage::{FileStorage, Storage};

/// How bytes of a disk are kept in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// This crate's subject.
    Qcow2,
}

/// Called with bytes done and bytes in all, from one thread at a time.
pub type Progress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// A copy to be made.
#[derive(Clone, Debug)]
pub struct Convert {
    source_format: Format,
    open: OpenOptions,
    target: Option<CreateOptions>,
    compress: bool,
    threads: usize,
    replace: bool,
}

impl Convert {
    /// From an image of `source_format`, to a raw file.
    pub fn new(source_format: Format) -> Self {
        Convert {
            source_format,
            open: OpenOptions::new(),
            target: None,
            compress: false,
            threads: 2,
            replace: false,
        }
    }

    /// How a qcow2 source is opened; it decides whether its backing file is followed.
    #[must_use]
    pub fn open(mut self, options: OpenOptions) -> Self {
        self.open = options.write(false);
        self
    }

    /// Makes the target a qcow2 image. Its size becomes that of the source.
    #[must_use]
    pub fn to_qcow2(mut self, options: CreateOptions) -> Self {
        self.target = Some(options);
        self
    }

    /// Compresses the clusters of a qcow2 target.
    #[must_use]
    pub fn compress(mut self, yes: bool) -> Self {
        self.compress = yes;
        self
    }

    /// Threads that copy: at least one.
    #[must_use]
    pub fn threads(mut self, n: usize) -> Self {
        self.threads = n.max(1);
        self
    }

    /// Whether an existing target is replaced.
    #[must_use]
    pub fn replace(mut self, yes: bool) -> Self {
        self.replace = yes;
        self
    }

    /// Makes the copy. What is zero in the source takes no room in the target.
    ///
    /// # Errors
    /// Those of opening the source, creating the target, reading and writing. The target is unfinished then.
    pub fn run(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let (source, target) = (source.as_ref(), target.as_ref());
        let source = match self.source_format {
            Format::Qcow2 => Disk::Qcow2(Box::new(Image::open(source, &self.open)?)),
            Format::Raw => {
                let file = File::open(source).map_err(|e| Error::Open {
                    path: source.to_owned(),
                    source: e,
                })?;
                Disk::Raw(FileStorage::new(file))
            }
        };
        let length = source.len()?;
        let target = match &self.target {
            Some(options) => {
                let options = CreateOptions {
                    size: length,
                    ..options.clone().replace(self.replace)
                };
                Disk::Qcow2(Box::new(Image::create(target, &options)?))
            }
            None => {
                let mut how = File::options();
                how.read(true).write(true);
                if self.replace {
                    how.create(true).truncate(true)
                } else {
                    how.create_new(true)
                };
                let file = how.open(target).map_err(|e| Error::Open {
                    path: target.to_owned(),
                    source: e,
                })?;
                let storage = FileStorage::new(file);
                storage
                    .set_len(length)
                    .map_err(Error::io("growing", "target file", length))?;
                Disk::Raw(storage)
            }
        };
        self.copy(&source, &target, length, progress)?;
        match target {
            Disk::Qcow2(image) => image.close(),
            Disk::Raw(storage) => storage
                .flush()
                .map_err(Error::io("flushing", "target file", 0)),
        }
    }

    fn copy(
        &self,
        source: &Disk,
        target: &Disk,
        length: u64,
        progress: Progress<'_>,
    ) -> Result<()> {
        // Whole clusters of the target, about 2 MiB.
        let step = match target {
            Disk::Qcow2(image) => image.cluster_size().max(CHUNK),
            Disk::Raw(_) => CHUNK,
        };
        let compress = self.compress && self.target.is_some();
        let next = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        let shared = Mutex::new((0u64, progress));
        let work = || -> Result<()> {
            let mut buf = Vec::new();
            loop {
                let at = next.fetch_add(step, Ordering::Relaxed);
                if at >= length || stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let n = step.min(length - at);
                let result = copy_step(source, target, at, n, compress, &mut buf);
                if result.is_err() {
                    stop.store(true, Ordering::Relaxed);
                    return result;
                }
                let mut shared = shared.lock().unwrap_or_else(|e| e.into_inner());
                shared.0 += n;
                let done = shared.0;
                (shared.1)(done, length);
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads).map(|_| scope.spawn(work)).collect();
            let mut result = work();
            for other in others {
                let theirs = other
                    .join()
                    .unwrap_or_else(|_| Err(Error::Invalid("a copying thread panicked".into())));
                result = result.and(theirs);
            }
            result
        })
    }
}

/// Bytes that are copied at a time, if clusters are smaller.
const CHUNK: u64 = 2 << 20;

enum Disk {
    Raw(FileStorage),
    Qcow2(Box<Image>),
}

impl Disk {
    fn len(&self) -> Result<u64> {
        match self {
            Disk::Qcow2(image) => Ok(image.len()),
            Disk::Raw(storage) => storage
                .len()
                .map_err(Error::io("measuring", "source file", 0)),
        }
    }
}

fn copy_step(
    source: &Disk,
    target: &Disk,
    at: u64,
    n: u64,
    compress: bool,
    buf: &mut Vec<u8>,
) -> Result<()> {
    buf.resize(n as usize, 0);
    match source {
        Disk::Qcow2(image) => {
            let mut empty = true;
            image.map(at, n, |e| {
                empty &= matches!(e.kind, ExtentKind::Zero | ExtentKind::Unallocated);
                Ok(())
            })?;
            if empty {
                return Ok(());
            }
            image.read_at(buf, at)?;
        }
        Disk::Raw(storage) => {
            storage
                .read_at(buf, at)
                .map_err(Error::io("reading", "source file", at))?;
        }
    }
    match target {
        Disk::Qcow2(image) => {
            let size = image.cluster_size() as usize;
            each_run(buf, size, |from, part| {
                let offset = at + from as u64;
                if compress {
                    image.write_compressed_at(part, offset)
                } else {
                    image.write_at(part, offset)
                }
            })
        }
        Disk::Raw(storage) => each_run(buf, 4096, |from, part| {
            let offset = at + from as u64;
            storage
                .write_at(part, offset)
                .map_err(Error::io("writing", "target file", offset))
        }),
    }
}

/// Calls `write` for the runs of blocks that are not zero.
fn each_run(
    buf: &[u8],
    block: usize,
    mut write: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut start = None;
    for (i, part) in buf.chunks(block).enumerate() {
        let zero = part.iter().all(|b| *b == 0);
        match (zero, start) {
            (false, None) => start = Some(i * block),
            (true, Some(from)) => {
                write(from, &buf[from..i * block])?;
                start = None;
            }
            _ => {}
        }
    }
    start.map_or(Ok(()), |from| write(from, &buf[from..]))
}

/// Writes what the image at `path` has into its backing file, and empties the image. A kill on the way loses nothing: what was copied is
/// in both. The backing file grows to the image's size if it is smaller.
///
/// # Errors
/// [`Error::Invalid`] without a backing file, those of opening both for writing, [`Error::Io`].
pub fn commit(path: impl AsRef<Path>, options: &OpenOptions, progress: Progress<'_>) -> Result<()> {
    let path = path.as_ref();
    let options = options.clone().write(true).follow_backing(true);
    let image = Image::open(path, &options)?;
    let header = image.header();
    let Some(name) = header.backing_name else {
        return Err(Error::Invalid(format!(
            "{} has no backing file to commit to",
            path.display()
        )));
    };
    let format = match &image.backing {
        Some(Backing::Qcow2(_)) => Format::Qcow2,
        _ => Format::Raw,
    };
    let base_path = backing::resolve(&name, path.parent())?;
    let base = match format {
        Format::Qcow2 => Disk::Qcow2(Box::new(Image::open(&base_path, &options)?)),
        Format::Raw => {
            let file = File::options().read(true).write(true).open(&base_path);
            Disk::Raw(FileStorage::new(file.map_err(|source| Error::Open {
                path: base_path,
                source,
            })?))
        }
    };
    let size = image.len();
    if base.len()? < size {
        match &base {
            Disk::Qcow2(base) => base.resize(size, Shrink::IfFree)?,
            Disk::Raw(base) => {
                base.set_len(size)
                    .map_err(Error::io("growing", "backing file", size))?;
            }
        }
    }
    let mut at = 0;
    let mut buf = Vec::new();
    while at < size {
        let n = CHUNK.min(size - at);
        let segments = image.enter().resolve(at, n, usize::MAX)?;
        for s in segments.iter().filter(|s| s.source != Source::Backing) {
            buf.resize(s.length as usize, 0);
            image.read_at(&mut buf, s.guest)?;
            match &base {
                Disk::Qcow2(base) if s.source == Source::Zero => {
                    base.write_zeroes(s.guest, s.length)?;
                }
                Disk::Qcow2(base) => base.write_at(&buf, s.guest)?,
                Disk::Raw(base) => base.write_at(&buf, s.guest).map_err(Error::io(
                    "writing",
                    "backing file",
                    s.guest,
                ))?,
            }
        }
        at += n;
        progress(at, size);
    }
    match base {
        Disk::Qcow2(base) => base.close()?,
        Disk::Raw(base) => base
            .flush()
            .map_err(Error::io("flushing", "backing file", 0))?,
    }
    image.make_empty()?;
    image.close()
}

impl Image {
    /// Gives up everything that the image has on its own.
    fn make_empty(&self) -> Result<()> {
        let mut meta = self.exclusive();
        let bits = meta.layout.cluster_bits;
        for i in 0..meta.l1.len() {
            meta.prepare_write()?;
            let Some((offset, _)) = meta.l2_offset(i as u64)? else {
                continue;
            };
            let mut table = vec![0; meta.layout.cluster_size() as usize];
            meta.flush_all()?;
            meta.storage.read_at(&mut table, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            let references = meta.references_of(&table)?;
            meta.l1[i] &= !OFFSET & !crate::layout::COPIED;
            meta.l1_dirty.insert(i);
            for clusters in references {
                for cluster in clusters {
                    meta.release(cluster << bits)?;
                }
            }
            meta.release(offset)?;
            meta.write_back()?;
        }
        Ok(())
    }
}
