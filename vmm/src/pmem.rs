//! From a `PmemConfig` to a file of the host that is open, locked, as large as it should be, and mapped.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use block_util::{DiskError, LockMode, lock_file};
use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

use crate::config::{PMEM_ALIGNMENT, PmemConfig};
use crate::memory_manager;

/// Why a file cannot be persistent memory.
#[derive(Debug, Error)]
pub enum PmemSetupError {
    /// It does not open.
    #[error("opening {path:?}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its size cannot be found out or changed.
    #[error("the size of {path:?}")]
    Size {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{0:?} is neither a file, a block device nor a directory")]
    Kind(PathBuf),
    /// It is to be made, and nobody says how large.
    #[error("{0:?} is made, so size is needed: a multiple of 2M")]
    NoSize(PathBuf),
    /// Its size does not do.
    #[error("{path:?} has {len} bytes, which is no multiple of 2M; size=S uses a part of it")]
    Alignment {
        /// Its path.
        path: PathBuf,
        /// Its size.
        len: u64,
    },
    /// It is too small, and must stay as it is.
    #[error("{path:?} has only {len} bytes of the {size} that are asked for, and does not grow")]
    Small {
        /// Its path.
        path: PathBuf,
        /// Its size.
        len: u64,
        /// The size wanted.
        size: u64,
    },
    /// Another VM has it.
    #[error(transparent)]
    Lock(#[from] DiskError),
    /// It cannot be mapped.
    #[error("mapping {path:?}")]
    Map {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: MmapRegionError,
    },
    /// Equal pages cannot be merged.
    #[error("letting the host merge pages of {path:?}")]
    Merge {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A file of the host, ready to be the guest's.
pub struct PmemFile {
    /// The file.
    pub file: File,
    /// Its bytes in this process's memory: shared with the file, or, where writes are discarded, private.
    pub mapping: MmapRegion,
    /// How it was before.
    pub before: Before,
}

/// Takes back what was done to a file, when dropped, unless the VM is to [`keep`](Self::keep) it.
pub struct Before(Option<Undo>);

enum Undo {
    Remove(PathBuf),
    Shrink(File, u64),
}

impl Before {
    /// The file is the guest's now.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Before {
    fn drop(&mut self) {
        let undone = match self.0.take() {
            None => Ok(()),
            Some(Undo::Remove(path)) => std::fs::remove_file(path),
            Some(Undo::Shrink(file, len)) => file.set_len(len),
        };
        if let Err(e) = undone {
            log::warn!("a file of --pmem is not as it was before: {e}");
        }
    }
}

/// Opens, locks and maps the file of `config`. A directory gets an unnamed file, and what is not there or too small is made or
/// grows, where the size is told.
///
/// # Errors
/// [`PmemSetupError`]; the file is as it was before.
pub fn open(config: &PmemConfig) -> Result<PmemFile, PmemSetupError> {
    let (file, mut before) = open_file(config)?;
    let size = fit(config, &file, &mut before)?;
    let path = || config.file.clone();
    let map_error = |source| PmemSetupError::Map {
        path: path(),
        source,
    };
    let clone = file.try_clone().map_err(|source| PmemSetupError::Open {
        path: path(),
        source,
    })?;
    let flags = if config.discard_writes {
        libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    };
    let length = usize::try_from(size)
        .map_err(|_| map_error(MmapRegionError::Mmap(io::ErrorKind::OutOfMemory.into())))?;
    let mapping = MmapRegionBuilder::new(length)
        .with_file_offset(FileOffset::new(clone, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags | libc::MAP_NORESERVE)
        .build()
        .map_err(map_error)?;
    if config.mergeable {
        memory_manager::merge(&mapping).map_err(|source| PmemSetupError::Merge {
            path: path(),
            source,
        })?;
    }
    Ok(PmemFile {
        file,
        mapping,
        before,
    })
}

/// The file, locked: for this VM alone, or, where it stays as it is, with others that leave it so.
fn open_file(config: &PmemConfig) -> Result<(File, Before), PmemSetupError> {
    let path = &config.file;
    let mut options = OpenOptions::new();
    options.read(true).write(!config.discard_writes);
    let failed = |source| PmemSetupError::Open {
        path: path.clone(),
        source,
    };
    if path.is_dir() {
        need_size(config)?;
        options.write(true).custom_flags(libc::O_TMPFILE);
        // Nobody else can open it.
        return Ok((options.open(path).map_err(failed)?, Before(None)));
    }
    // A FIFO without another end is not waited for.
    options.custom_flags(libc::O_NONBLOCK);
    let (file, before) = match options.open(path) {
        Ok(file) => (file, Before(None)),
        Err(e) if e.kind() == io::ErrorKind::NotFound && !config.discard_writes => {
            need_size(config)?;
            let file = options.create_new(true).open(path).map_err(failed)?;
            (file, Before(Some(Undo::Remove(path.clone()))))
        }
        Err(e) => return Err(failed(e)),
    };
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(PmemSetupError::Kind(path.clone()));
    }
    let mode = if config.discard_writes {
        LockMode::Shared
    } else {
        LockMode::Exclusive
    };
    lock_file(&file, path, mode)?;
    Ok((file, before))
}

fn need_size(config: &PmemConfig) -> Result<(), PmemSetupError> {
    match config.size {
        Some(_) => Ok(()),
        None => Err(PmemSetupError::NoSize(config.file.clone())),
    }
}

/// Bytes to map, all of which the file has.
fn fit(config: &PmemConfig, file: &File, before: &mut Before) -> Result<u64, PmemSetupError> {
    let path = &config.file;
    let failed = |source| size_error(path, source);
    // Of a block device too.
    let len = (&*file).seek(SeekFrom::End(0)).map_err(failed)?;
    let Some(size) = config.size else {
        if len == 0 || !len.is_multiple_of(PMEM_ALIGNMENT) {
            let path = path.clone();
            return Err(PmemSetupError::Alignment { path, len });
        }
        return Ok(len);
    };
    if size > len {
        let is_file = file.metadata().map_err(failed)?.is_file();
        if !is_file || (config.discard_writes && !path.is_dir()) {
            let path = path.clone();
            return Err(PmemSetupError::Small { path, len, size });
        }
        file.set_len(size).map_err(failed)?;
        if before.0.is_none() && !path.is_dir() {
            let file = file.try_clone().map_err(failed)?;
            before.0 = Some(Undo::Shrink(file, len));
        }
    }
    Ok(size)
}

fn size_error(path: &Path, source: io::Error) -> PmemSetupError {
    PmemSetupError::Size {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use vm_memory::{Bytes, VolatileMemory};

    use super::*;

    const MIB: u64 = 1 << 20;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, len: u64) -> PathBuf {
            let path = self.0.path().join("pmem");
            File::create(&path).unwrap().set_len(len).unwrap();
            path
        }
    }

    fn config(file: &Path, size: Option<u64>) -> PmemConfig {
        PmemConfig {
            file: file.into(),
            size,
            ..PmemConfig::default()
        }
    }

    fn refused(config: &PmemConfig) -> String {
        crate::error_chain(&open(config).err().unwrap())
    }

    fn write(pmem: &PmemFile, value: u64) {
        let all = pmem.mapping.as_volatile_slice();
        all.write_obj(value, 0).unwrap();
    }

    fn first(path: &Path) -> u64 {
        let bytes = fs::read(path).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    }

    #[test]
    fn what_is_written_is_in_the_file_or_not() {
        let place = Place::new();
        let path = place.file(2 * MIB);
        let pmem = open(&config(&path, None)).unwrap();
        assert_eq!(pmem.mapping.size() as u64, 2 * MIB);
        write(&pmem, 0x1122);
        assert_eq!(first(&path), 0x1122);
        drop(pmem);
        let discard = PmemConfig {
            discard_writes: true,
            ..config(&path, None)
        };
        // Two at once.
        let (pmem, _other) = (open(&discard).unwrap(), open(&discard).unwrap());
        write(&pmem, 7);
        assert_eq!(first(&path), 0x1122);
        // But none that writes.
        assert!(refused(&config(&path, None)).contains("another process uses"));
    }

    #[test]
    fn two_vms_do_not_share_one() {
        let place = Place::new();
        let path = place.file(2 * MIB);
        let _pmem = open(&config(&path, None)).unwrap();
        assert!(refused(&config(&path, None)).contains("another process uses"));
    }

    #[test]
    fn a_file_is_made_or_grows_and_is_as_before_where_the_vm_does_not_start() {
        let place = Place::new();
        let path = place.0.path().join("pmem");
        drop(open(&config(&path, Some(4 * MIB))).unwrap());
        assert!(!path.exists());
        open(&config(&path, Some(4 * MIB))).unwrap().before.keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 * MIB);

        drop(open(&config(&path, Some(6 * MIB))).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 * MIB);
        open(&config(&path, Some(6 * MIB))).unwrap().before.keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), 6 * MIB);

        // A part of it.
        let pmem = open(&config(&path, Some(2 * MIB))).unwrap();
        assert_eq!(pmem.mapping.size() as u64, 2 * MIB);
        pmem.before.keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), 6 * MIB);
    }

    #[test]
    fn a_directory_gets_a_file_that_nobody_sees() {
        let place = Place::new();
        for discard_writes in [false, true] {
            let config = PmemConfig {
                discard_writes,
                ..config(place.0.path(), Some(2 * MIB))
            };
            let pmem = open(&config).unwrap();
            write(&pmem, 1);
            assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn files_that_do_not_do() {
        let place = Place::new();
        let path = place.file(3 * MIB);
        assert!(refused(&config(&path, None)).contains("no multiple of 2M"));
        assert!(refused(&config(&place.file(0), None)).contains("0 bytes"));
        let small = PmemConfig {
            discard_writes: true,
            ..config(&path, Some(4 * MIB))
        };
        assert!(refused(&small).contains("does not grow"));
        let absent = place.0.path().join("absent");
        assert!(refused(&config(&absent, None)).contains("size is needed"));
        let absent = PmemConfig {
            discard_writes: true,
            ..config(&absent, Some(4 * MIB))
        };
        assert!(refused(&absent).contains("No such file"));
        assert!(refused(&config(place.0.path(), None)).contains("size is needed"));
        assert!(refused(&config(Path::new("/dev/null"), None)).contains("neither"));
        let deep = place.0.path().join("no/such");
        assert!(refused(&config(&deep, Some(2 * MIB))).contains("No such file"));
    }
}
