//! Where RAM comes from: anonymous memory, or a memfd that other processes can map; of ordinary or huge pages.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

use super::MemoryError;
use crate::config::MemoryConfig;

/// A supply of host memory of the kind that `--memory` asks for, to be mapped in pieces.
pub struct HostMemory<'a> {
    config: &'a MemoryConfig,
    /// Of shared memory.
    file: Option<File>,
}

impl<'a> HostMemory<'a> {
    /// A supply of `size` bytes.
    ///
    /// # Errors
    /// [`MemoryError::Create`].
    pub fn new(config: &'a MemoryConfig, size: u64) -> Result<Self, MemoryError> {
        let file = if config.shared {
            Some(memfd(config.hugepages, size)?)
        } else {
            None
        };
        Ok(Self { config, file })
    }

    /// Maps `size` bytes of it, from `offset` on.
    ///
    /// # Errors
    /// [`MemoryError::Map`], [`MemoryError::HugePages`], [`MemoryError::Create`].
    pub fn map(&self, offset: u64, size: u64) -> Result<MmapRegion, MemoryError> {
        let hugepages = self.config.hugepages;
        // Ordinary pages are found when the guest touches them. Huge pages are set aside at once: a
        // host that has too few says so here, and not by a signal when the guest touches one.
        let mut flags = if hugepages { 0 } else { libc::MAP_NORESERVE };
        let length = usize::try_from(size).map_err(|_| {
            MemoryError::Arrange(format!("{size} bytes are more than this host addresses"))
        })?;
        let mut builder = MmapRegionBuilder::new(length)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_hugetlbfs(hugepages);
        match &self.file {
            Some(file) => {
                let file = file.try_clone().map_err(|source| MemoryError::Create {
                    size,
                    kind: "shared",
                    source,
                })?;
                builder = builder.with_file_offset(FileOffset::new(file, offset));
                flags |= libc::MAP_SHARED;
            }
            None => {
                flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                if hugepages {
                    flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
                }
            }
        }
        let mapping = builder
            .with_mmap_flags(flags)
            .build()
            .map_err(|source| match source {
                MmapRegionError::Mmap(source) if hugepages => {
                    MemoryError::HugePages { size, source }
                }
                source => MemoryError::Map { size, source },
            })?;
        if self.config.mergeable {
            merge(&mapping).map_err(|source| MemoryError::Create {
                size,
                kind: "mergeable",
                source,
            })?;
        }
        Ok(mapping)
    }
}

/// An unnamed file of `size` bytes, of huge pages if the user wants them.
#[allow(unsafe_code)]
fn memfd(hugepages: bool, size: u64) -> Result<File, MemoryError> {
    let kind = if hugepages { "huge-page" } else { "shared" };
    let failed = |source| MemoryError::Create { size, kind, source };
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if hugepages {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    let name = CString::default();
    // SAFETY: the name is a valid C string, and the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(failed)?;
    // Whoever else has it, such as a vhost-user back end, cannot take pages from under our feet.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the descriptor is open; the call takes a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Lets the host merge equal pages of `mapping` (KSM).
///
/// # Errors
/// What the kernel says.
#[allow(unsafe_code)]
pub fn merge(mapping: &MmapRegion) -> io::Result<()> {
    let (start, length) = (mapping.as_ptr().cast(), mapping.size());
    // SAFETY: the range is a whole mapping of ours; the advice changes no content.
    if unsafe { libc::madvise(start, length, libc::MADV_MERGEABLE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
