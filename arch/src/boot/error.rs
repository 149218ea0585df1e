//! What can be wrong with a payload. Each error and its causes make one line that names the file.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a guest cannot be started from its payload.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel is no good.
    #[error("kernel {path:?}")]
    Kernel {
        /// Its name.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: KernelError,
    },
    /// The initramfs cannot be read.
    #[error("reading initramfs {path:?}")]
    ReadInitramfs {
        /// Its name.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The initramfs has no bytes.
    #[error("initramfs {0:?} is empty")]
    EmptyInitramfs(PathBuf),
    /// The initramfs has no place.
    #[error(
        "initramfs {path:?} of {size} bytes does not fit into guest memory beside the kernel: give the guest more memory"
    )]
    InitramfsTooBig {
        /// Its name.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The command line is longer than the guest takes.
    #[error("the command line has {len} bytes, more than the {most} that kernel {path:?} takes")]
    CmdlineTooLong {
        /// The kernel's name.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
        /// Longest that is allowed, without the terminating NUL.
        most: u64,
    },
    /// The command line holds a character that a kernel cannot read.
    #[error(
        "the command line for kernel {path:?} has {character:?} at byte {at}: only ASCII characters other than NUL are allowed"
    )]
    CmdlineCharacter {
        /// The kernel's name.
        path: PathBuf,
        /// The character.
        character: char,
        /// Its place in bytes from the start.
        at: usize,
    },
    /// Guest memory has no room for a structure at its fixed address.
    #[error("guest memory has no {what} at {address:#x}: give the guest more memory")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Where, guest-physical.
        address: u64,
    },
}

/// What is wrong with a kernel image.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error("reading it")]
    Read(#[source] io::Error),
    /// Neither of the two formats.
    #[error("it is neither an ELF image nor a bzImage")]
    UnknownFormat,
    /// The file ends too early.
    #[error("it is truncated: its {what} ends at byte {end}, the file at {len}")]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Where the part should end.
        end: u64,
        /// Size of the file.
        len: u64,
    },
    /// An ELF image that cannot be booted.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A bzImage that cannot be booted.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// A part of the image has no place in guest memory.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// What is wrong with an ELF image.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ElfError {
    /// 32-bit image.
    #[error("it is not a 64-bit ELF image (class {0})")]
    Class(u8),
    /// Big-endian image.
    #[error("it is not a little-endian ELF image (data encoding {0})")]
    Encoding(u8),
    /// For another machine.
    #[error("it is for another machine (ELF machine {0}), not for x86-64")]
    Machine(u16),
    /// An object file, a core dump and the like.
    #[error("it is not an executable (ELF type {0})")]
    Type(u16),
    /// Program headers of a size that ELF-64 doesn't have.
    #[error("its program headers have {0} bytes each instead of 56")]
    ProgramHeaderSize(u16),
    /// Nothing to load.
    #[error("it has no segment to load")]
    NoSegment,
    /// More bytes in the file than in memory.
    #[error(
        "its segment {index} has more bytes in the file ({file:#x}) than in memory ({memory:#x})"
    )]
    SegmentSize {
        /// Which program header.
        index: usize,
        /// `p_filesz`.
        file: u64,
        /// `p_memsz`.
        memory: u64,
    },
    /// Notes that no kernel has.
    #[error("its notes take {0} bytes, which is too much")]
    NotesTooBig(u64),
    /// A PVH note that is not a number of 4 or 8 bytes.
    #[error("its PVH note has {0} bytes instead of 4 or 8")]
    PvhNote(u32),
    /// No entry point.
    #[error("it has no entry point")]
    NoEntry,
    /// Entry where nothing is loaded.
    #[error("its entry point {0:#x} lies outside of what its segments load")]
    EntryOutside(u64),
}

/// What is wrong with a bzImage.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BzImageError {
    /// A zImage, loaded below 1 MiB.
    #[error("it is a zImage, to be loaded below 1 MiB, not a bzImage")]
    ZImage,
    /// An old protocol.
    #[error("its boot protocol {}.{:02} is older than 2.12, the first with a 64-bit entry", .0 >> 8, .0 & 0xff)]
    Protocol(u16),
    /// A 32-bit kernel.
    #[error("it has no 64-bit entry point: it is a 32-bit kernel")]
    No64Bit,
    /// An alignment that is not a power of two, or an address that doesn't have it.
    #[error(
        "its preferred address {address:#x} and its alignment {alignment:#x} do not go together"
    )]
    Alignment {
        /// `pref_address`.
        address: u64,
        /// `kernel_alignment`.
        alignment: u32,
    },
}

/// Where a part of a kernel cannot go.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlaceError {
    /// End past the 64-bit address space.
    #[error(
        "its segment {index} at {start:#x} with {size:#x} bytes runs past the end of the address space"
    )]
    Wraps {
        /// Which program header.
        index: usize,
        /// Guest-physical address.
        start: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Two parts in one place.
    #[error("its segments at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
    /// No RAM there.
    #[error(
        "it needs guest memory from {start:#x} to {end:#x}, which is not all RAM: give the guest more memory"
    )]
    OutsideRam {
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// The VMM's own structures are there.
    #[error(
        "its segment from {start:#x} to {end:#x} lies on boot structures and firmware tables below 1 MiB"
    )]
    LowStructures {
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// Above what the first page tables map.
    #[error(
        "it reaches up to {0:#x}, past the first GiB, which is all that a 64-bit entry can have mapped"
    )]
    Unmapped(u64),
}
