//! The address windows of a bus: where BARs may lie, and where free room is.

use std::ops::RangeInclusive;

use vm_allocator::{AddressAllocator, AllocatorError};

use crate::bar::{AddressSpace, Bar, BarKind};

/// Where the BARs of a bus may lie, which is what the guest is told; first and last address of each. Nothing but BARs of
/// that bus should be there.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Windows {
    /// Ports.
    pub io: Option<RangeInclusive<u64>>,
    /// Memory below 4 GiB.
    pub memory32: Option<RangeInclusive<u64>>,
    /// Memory above it.
    pub memory64: Option<RangeInclusive<u64>>,
}

impl Windows {
    /// Whether all of `bar` lies in one window of its space.
    #[must_use]
    pub fn contain(&self, bar: &Bar) -> bool {
        let Some(last) = bar.last() else {
            return false;
        };
        self.of(bar.kind.space())
            .any(|window| window.contains(&bar.address) && window.contains(&last))
    }

    /// Free addresses for `wanted`, the largest first, each a multiple of its size, clear of all in `taken`. A 64-bit BAR
    /// goes above 4 GiB if there is room. In the order of `wanted`.
    ///
    /// # Errors
    /// [`AllocatorError::NoAddress`] or, where there is no such window, [`AllocatorError::Range`].
    pub fn place(&self, wanted: &[Bar], taken: &[Bar]) -> Result<Vec<u64>, AllocatorError> {
        let mut io = room(self.io.as_ref(), AddressSpace::Io, taken)?;
        let mut low = room(self.memory32.as_ref(), AddressSpace::Memory, taken)?;
        let mut high = room(self.memory64.as_ref(), AddressSpace::Memory, taken)?;
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(wanted[index].size));
        let mut addresses = vec![0; wanted.len()];
        for index in order {
            let size = wanted[index].size;
            let from = |window: &mut Option<AddressAllocator>| match window {
                Some(window) => window.allocate(size, size),
                None => Err(AllocatorError::Range { base: 0, size }),
            };
            addresses[index] = match wanted[index].kind {
                BarKind::Io => from(&mut io),
                BarKind::Memory32 { .. } => from(&mut low),
                BarKind::Memory64 { .. } => from(&mut high).or_else(|_| from(&mut low)),
            }?;
        }
        Ok(addresses)
    }

    fn of(&self, space: AddressSpace) -> impl Iterator<Item = &RangeInclusive<u64>> {
        let windows = match space {
            AddressSpace::Io => [self.io.as_ref(), None],
            AddressSpace::Memory => [self.memory32.as_ref(), self.memory64.as_ref()],
        };
        windows.into_iter().flatten()
    }
}

/// What is free of `window`.
fn room(
    window: Option<&RangeInclusive<u64>>,
    space: AddressSpace,
    taken: &[Bar],
) -> Result<Option<AddressAllocator>, AllocatorError> {
    let Some(window) = window else {
        return Ok(None);
    };
    let (base, last) = (*window.start(), *window.end());
    let size = last.checked_sub(base).and_then(|more| more.checked_add(1));
    let size = size.ok_or(AllocatorError::Range { base, size: 0 })?;
    let mut room = AddressAllocator::new(base, size)?;
    // Those that answer come first: one that does not may say anything, even the address of another.
    for decoded in [true, false] {
        for bar in taken {
            if bar.decoded == decoded && bar.kind.space() == space {
                let _ = room.allocate_at(bar.address, bar.size);
            }
        }
    }
    Ok(Some(room))
}
