//! From a kernel file, an initramfs and a command line to a guest that can start: ELF by PVH or by the 64-bit Linux
//! protocol, bzImage. PVH firmware is an ELF kernel like any other.
//!
//! ```
//! use std::io::Write;
//! use std::path::Path;
//!
//! use arch::boot::{Payload, load};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)])?;
//! let mut kernel = tempfile::tempfile()?;
//! kernel.write_all(b"#!/bin/sh")?;
//! let error = load(
//!     &memory,
//!     Payload {
//!         kernel: &mut kernel,
//!         kernel_name: Path::new("script"),
//!         initramfs: None,
//!         cmdline: "console=ttyS0",
//!     },
//! )
//! .unwrap_err();
//! assert_eq!(error.to_string(), r#"kernel "script""#);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bzimage;
mod elf;
mod error;
mod image;
mod loaded;
mod note;
mod place;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

pub use self::error::{BootError, BzImageError, ElfError, KernelError, PlaceError};
use self::image::{Image, Plan, Segment};
pub use self::loaded::{Loaded, Protocol};
use self::place::Ram;
use crate::layout::{CMDLINE_START, HIGH_RAM_START};

/// What the guest is to run.
#[derive(Debug)]
pub struct Payload<'a> {
    /// An ELF image or a bzImage: a regular file or a block device.
    pub kernel: &'a mut File,
    /// Its name in errors.
    pub kernel_name: &'a Path,
    /// Initial RAM file system and its name in errors.
    pub initramfs: Option<(&'a mut File, &'a Path)>,
    /// Kernel command line, ASCII, at most 64 KiB with its NUL; a bzImage may take less.
    pub cmdline: &'a str,
}

/// Checks the whole payload, then copies kernel, initramfs and command line into guest memory.
/// [`Loaded::write_boot_data`] writes the rest.
///
/// # Errors
/// See [`BootError`]. Guest memory is untouched unless a file changes or fails while it is copied.
pub fn load<M: GuestMemoryBackend>(memory: &M, payload: Payload<'_>) -> Result<Loaded, BootError> {
    let Payload {
        kernel,
        kernel_name,
        mut initramfs,
        cmdline,
    } = payload;
    let ram = Ram::of(memory);
    let kernel_error = |source| BootError::Kernel {
        path: kernel_name.into(),
        source,
    };
    if !ram.contains(0, HIGH_RAM_START) {
        return Err(BootError::Memory {
            what: "first MiB of RAM",
            address: 0,
        });
    }
    let plan = plan(kernel, &ram).map_err(kernel_error)?;
    check_cmdline(cmdline, kernel_name, plan.cmdline_limit)?;
    let initramfs_place = match &initramfs {
        Some((file, name)) => Some(place_initramfs(file, name, &plan, &ram)?),
        None => None,
    };

    for segment in &plan.segments {
        copy(memory, kernel, segment).map_err(|e| kernel_error(KernelError::Read(e)))?;
    }
    if let (Some((file, name)), Some((address, size))) = (&mut initramfs, initramfs_place) {
        let whole = Segment {
            offset: 0,
            file_size: size,
            address,
            memory_size: size,
        };
        copy(memory, file, &whole).map_err(|source| BootError::ReadInitramfs {
            path: name.to_path_buf(),
            source,
        })?;
    }
    loaded::write_cmdline(memory, cmdline)?;
    Ok(Loaded {
        protocol: plan.protocol,
        entry: plan.entry,
        initramfs: initramfs_place,
        cmdline_address: CMDLINE_START,
        // Checked to be below 64 KiB.
        cmdline_size: cmdline.len() as u32,
        setup_header: plan.setup_header,
    })
}

fn plan(kernel: &File, ram: &Ram) -> Result<Plan, KernelError> {
    let image = Image::new(kernel)?;
    let has = |offset: usize, magic: &[u8]| {
        if image.len() < (offset + magic.len()) as u64 {
            return Ok(false);
        }
        let bytes = image.read("magic number", offset as u64, magic.len())?;
        Ok::<_, KernelError>(bytes == magic)
    };
    if has(0, elf::MAGIC)? {
        elf::plan(&image, ram)
    } else if has(bzimage::MAGIC_OFFSET, bzimage::MAGIC)? {
        bzimage::plan(&image, ram)
    } else {
        Err(KernelError::UnknownFormat)
    }
}

fn check_cmdline(cmdline: &str, kernel: &Path, most: u64) -> Result<(), BootError> {
    if cmdline.len() as u64 > most {
        return Err(BootError::CmdlineTooLong {
            path: kernel.into(),
            len: cmdline.len(),
            most,
        });
    }
    match cmdline
        .char_indices()
        .find(|(_, c)| !c.is_ascii() || *c == '\0')
    {
        Some((at, character)) => Err(BootError::CmdlineCharacter {
            path: kernel.into(),
            character,
            at,
        }),
        None => Ok(()),
    }
}

/// Address and size in bytes.
fn place_initramfs(
    file: &File,
    name: &Path,
    plan: &Plan,
    ram: &Ram,
) -> Result<(u64, u64), BootError> {
    let size = image::size(file).map_err(|source| BootError::ReadInitramfs {
        path: name.into(),
        source,
    })?;
    if size == 0 {
        return Err(BootError::EmptyInitramfs(name.into()));
    }
    let address = ram
        .highest(size, plan.initramfs_limit, plan.span)
        .ok_or_else(|| BootError::InitramfsTooBig {
            path: name.into(),
            size,
        })?;
    Ok((address, size))
}

fn copy<M: GuestMemoryBackend>(memory: &M, file: &mut File, segment: &Segment) -> io::Result<()> {
    file.seek(SeekFrom::Start(segment.offset))?;
    memory
        .read_exact_volatile_from(
            GuestAddress(segment.address),
            file,
            segment.file_size as usize,
        )
        .map_err(io_error)?;
    clear(
        memory,
        segment.address.saturating_add(segment.file_size),
        segment.end(),
    )
}

/// Zeroes memory; pages that are zero already are not written to, so that fresh ones stay unbacked.
fn clear<M: GuestMemoryBackend>(memory: &M, mut start: u64, end: u64) -> io::Result<()> {
    const CHUNK: usize = 0x1000;
    let mut chunk = [0; CHUNK];
    while start < end {
        let len = (end - start).min(CHUNK as u64 - start % CHUNK as u64);
        let bytes = chunk.get_mut(..len as usize).unwrap_or_default();
        let address = GuestAddress(start);
        memory.read_slice(bytes, address).map_err(io_error)?;
        if bytes.iter().any(|byte| *byte != 0) {
            bytes.fill(0);
            memory.write_slice(bytes, address).map_err(io_error)?;
        }
        start += len;
    }
    Ok(())
}

fn io_error(error: GuestMemoryError) -> io::Error {
    match error {
        GuestMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}
