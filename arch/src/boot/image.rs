//! A kernel image as the loaders see it: reads by offset, checked against the file's size, and the plan that a
//! loader makes before anything is written to guest memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;

use super::Protocol;
use super::error::KernelError;

/// A file whose size was taken once. A file that changes later gives errors or nonsense in the guest, no more.
pub(super) struct Image<'a> {
    file: &'a File,
    len: u64,
}

impl<'a> Image<'a> {
    /// Takes the size of a regular file or block device.
    pub(super) fn new(file: &'a File) -> Result<Self, KernelError> {
        let len = size(file).map_err(KernelError::Read)?;
        Ok(Self { file, len })
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Checks that `len` bytes at `offset`, the image's `what`, are in the file.
    pub(super) fn check(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), KernelError> {
        let end = offset.saturating_add(len);
        if end > self.len {
            return Err(KernelError::Truncated {
                what,
                end,
                len: self.len,
            });
        }
        Ok(())
    }

    /// Reads the image's `what`. The caller bounds `len`.
    pub(super) fn read(
        &self,
        what: &'static str,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, KernelError> {
        self.check(what, offset, len as u64)?;
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(KernelError::Read)?;
        Ok(bytes)
    }
}

/// Size in bytes of a regular file or block device.
pub(super) fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Bytes of the file and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Offset in the file.
    pub(super) offset: u64,
    /// Bytes in the file.
    pub(super) file_size: u64,
    /// Guest-physical address.
    pub(super) address: u64,
    /// Bytes in memory; those past `file_size` are zero.
    pub(super) memory_size: u64,
}

impl Segment {
    /// End in memory, exclusive. The loaders have checked that it does not wrap.
    pub(super) fn end(&self) -> u64 {
        self.address.saturating_add(self.memory_size)
    }
}

/// All that a boot needs to know of an image.
#[derive(Debug)]
pub(super) struct Plan {
    /// How the kernel is entered.
    pub(super) protocol: Protocol,
    /// Guest-physical address of its first instruction.
    pub(super) entry: u64,
    /// What is copied, sorted by address, without overlap, all of it RAM.
    pub(super) segments: Vec<Segment>,
    /// The kernel's own memory above 1 MiB, where no initramfs may lie; the end is exclusive.
    pub(super) span: (u64, u64),
    /// End (exclusive) of what may hold an initramfs.
    pub(super) initramfs_limit: u64,
    /// Longest command line in bytes, without its NUL.
    pub(super) cmdline_limit: u64,
    /// A bzImage's header.
    pub(super) setup_header: Option<setup_header>,
}
