//! Address ranges, interrupt lines, ids: given out, taken back, never overlapping.
//!
//! ```
//! use vm_allocator::{AddressAllocator, IdAllocator};
//!
//! let mut window = AddressAllocator::new(0xc000_0000, 640 << 20)?;
//! let bar = window.allocate(0x4000, 0x4000)?;
//! window.allocate_at(0xd000_0000, 0x1000)?;
//! window.free(bar)?;
//!
//! let mut lines = IdAllocator::new(5, 23);
//! assert_eq!(lines.allocate()?, 5);
//! # Ok::<(), vm_allocator::AllocatorError>(())
//! ```

mod address;
mod id;

use thiserror::Error;

pub use address::AddressAllocator;
pub use id::IdAllocator;

/// Why nothing was given out or taken back.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum AllocatorError {
    /// A range of no bytes, or one that wraps.
    #[error("{size:#x} bytes at {base:#x} are no range")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Alignment that is no power of two.
    #[error("{0:#x} is no alignment: it must be a power of two")]
    Alignment(u64),
    /// Nothing big enough is free.
    #[error("{size:#x} bytes, aligned to {alignment:#x}, are not free any more")]
    Full {
        /// Bytes wanted.
        size: u64,
        /// Alignment wanted.
        alignment: u64,
    },
    /// The very range that was wanted is outside or in use.
    #[error("{size:#x} bytes at {base:#x} are not free")]
    Taken {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Nothing was given out there.
    #[error("nothing was given out at {0:#x}")]
    NotAllocated(u64),
    /// No id is left.
    #[error("all ids from {first} to {last} are in use")]
    NoId {
        /// Lowest.
        first: u32,
        /// Highest.
        last: u32,
    },
    /// The id that was wanted is outside or in use.
    #[error("id {0} is not free")]
    IdTaken(u32),
    /// The id was not given out.
    #[error("id {0} was not given out")]
    IdNotAllocated(u32),
}
