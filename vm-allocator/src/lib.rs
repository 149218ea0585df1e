//! Address ranges, interrupt lines and ids: given out, taken back, never overlapping.
//!
//! An allocator only keeps the books; what is mapped or wired where is its user's.
//!
//! ```
//! use vm_allocator::{AddressAllocator, IdAllocator};
//!
//! # fn main() -> Result<(), vm_allocator::AllocatorError> {
//! let mut window = AddressAllocator::new(0xc000_0000, 0x1000_0000)?;
//! let bar = window.allocate(0x1_0000, 0x1_0000)?;
//! assert_eq!(bar, 0xc000_0000);
//! let top = window.allocate_from_top(0x1000, 0x1000)?;
//! assert_eq!(top, 0xcfff_f000);
//! window.allocate_at(0xc800_0000, 0x1000)?;
//! window.free(bar)?;
//! assert_eq!(window.allocate(0x1000, 0x1000)?, bar);
//!
//! let mut slots = IdAllocator::new(1, 31);
//! assert_eq!(slots.allocate()?, 1);
//! slots.free(1)?;
//! # Ok(()) }
//! ```

mod address;
mod id;

pub use address::AddressAllocator;
pub use id::{IdAllocator, IrqAllocator};

use thiserror::Error;

/// What can go wrong in giving out and taking back.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum AllocatorError {
    /// A range of no bytes, or one that ends past the last address.
    #[error("{size:#x} bytes at {base:#x} are no range")]
    Range {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// An alignment that is no power of two.
    #[error("{0:#x} is no alignment: it must be a power of two")]
    Alignment(u64),
    /// No gap is large enough.
    #[error("no {size:#x} free bytes, aligned to {alignment:#x}, between {first:#x} and {last:#x}")]
    NoAddress {
        /// Bytes wanted.
        size: u64,
        /// Alignment wanted.
        alignment: u64,
        /// First address there is to give.
        first: u64,
        /// Last address there is to give.
        last: u64,
    },
    /// The range is not the allocator's to give.
    #[error("{size:#x} bytes at {base:#x} are not within {first:#x} to {last:#x}")]
    Outside {
        /// First address wanted.
        base: u64,
        /// Bytes wanted.
        size: u64,
        /// First address there is to give.
        first: u64,
        /// Last address there is to give.
        last: u64,
    },
    /// Part of the range is taken.
    #[error("{size:#x} bytes at {base:#x} overlap what is taken at {other:#x}")]
    Taken {
        /// First address wanted.
        base: u64,
        /// Bytes wanted.
        size: u64,
        /// First address of a range that is taken.
        other: u64,
    },
    /// No range starts there.
    #[error("no range at {0:#x} was given out")]
    NotGivenOut(u64),
    /// Every id is taken.
    #[error("all numbers from {first} to {last} are taken")]
    NoId {
        /// First id there is to give.
        first: u32,
        /// Last id there is to give.
        last: u32,
    },
    /// The id is not the allocator's to give.
    #[error("{id} is not within {first} to {last}")]
    IdOutside {
        /// The id wanted.
        id: u32,
        /// First id there is to give.
        first: u32,
        /// Last id there is to give.
        last: u32,
    },
    /// The id is taken.
    #[error("{0} is taken")]
    IdTaken(u32),
    /// The id was not given out.
    #[error("{0} was not given out")]
    IdNotGivenOut(u32),
}
