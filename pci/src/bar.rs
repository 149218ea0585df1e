//! Base address registers (PCI Local Bus 3.0 §6.2.5.1): the kinds, and what one says at a moment.

use crate::registers;

/// Base address registers of a type 0 header.
pub const BARS: usize = 6;

/// The BARs of a function, by index. The upper half of a 64-bit one is no BAR of its own: `None`.
pub type Bars = [Option<Bar>; BARS];

/// The largest I/O BAR in bytes (PCI Local Bus 3.0 §6.2.5.1).
const MAX_IO: u64 = 256;
/// The smallest BARs in bytes: below lie the bits that tell the kind.
const MIN_IO: u64 = 4;
const MIN_MEMORY: u64 = 16;

/// Bits 0 to 3 of a BAR.
const IO: u32 = 1;
const MEMORY_64BIT: u32 = 2 << 1;
const PREFETCHABLE: u32 = 1 << 3;

/// Which of the two address spaces a BAR lies in.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum AddressSpace {
    /// Ports.
    Io,
    /// Memory.
    Memory,
}

/// The form of a BAR.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB; one register.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes the next register too.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    /// Where such a BAR lies.
    #[must_use]
    pub fn space(self) -> AddressSpace {
        match self {
            Self::Io => AddressSpace::Io,
            Self::Memory32 { .. } | Self::Memory64 { .. } => AddressSpace::Memory,
        }
    }

    /// Whether it takes two registers.
    #[must_use]
    pub fn is_64bit(self) -> bool {
        matches!(self, Self::Memory64 { .. })
    }

    /// Whether a BAR of this kind can be `size` bytes: a power of two, for I/O of 4 to 256 bytes, for memory from 16
    /// bytes to 2 GiB or, with 64 bits, to 2^63 bytes.
    #[must_use]
    pub fn can_be(self, size: u64) -> bool {
        let (min, max) = match self {
            Self::Io => (MIN_IO, MAX_IO),
            Self::Memory32 { .. } => (MIN_MEMORY, 1 << 31),
            Self::Memory64 { .. } => (MIN_MEMORY, 1 << 63),
        };
        size.is_power_of_two() && (min..=max).contains(&size)
    }

    /// The read-only low bits.
    pub(crate) fn bits(self) -> u32 {
        let prefetch = |prefetchable| if prefetchable { PREFETCHABLE } else { 0 };
        match self {
            Self::Io => IO,
            Self::Memory32 { prefetchable } => prefetch(prefetchable),
            Self::Memory64 { prefetchable } => MEMORY_64BIT | prefetch(prefetchable),
        }
    }
}

/// One BAR, and what its registers say at the moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bar {
    /// Index of its (first) register.
    pub index: usize,
    /// Its form.
    pub kind: BarKind,
    /// Bytes; a power of two.
    pub size: u64,
    /// The address in the register, a multiple of the size. 0 until someone writes one; anything while the guest asks for
    /// the size.
    pub address: u64,
    /// Whether the command register lets the function answer in this address space.
    pub decoded: bool,
}

impl Bar {
    /// Offset in configuration space of its (first) register.
    #[must_use]
    pub fn register(&self) -> u16 {
        registers::bar_register(self.index)
    }

    /// Last address, or `None` where the range would wrap.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.address.checked_add(self.size.checked_sub(1)?)
    }
}
