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

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(address: u64, size: u64, decoded: bool) -> Bar {
        Bar {
            index: 0,
            kind: BarKind::Memory32 {
                prefetchable: false,
            },
            size,
            address,
            decoded,
        }
    }

    #[test]
    fn all_of_a_bar_must_be_in_one_window() {
        let windows = Windows {
            memory32: Some(0x1000..=0x2fff),
            memory64: Some(0x3000..=0x47ff),
            ..Windows::default()
        };
        for (address, size, contained) in [
            (0x1000, 0x1000, true),
            (0x2000, 0x1000, true),
            (0x2000, 0x2000, false),
            (0x4000, 0x800, true),
            (0x4000, 0x1000, false),
            (0, 0x2000, false),
            (u64::MAX - 0xf, 0x10, false),
            (u64::MAX - 0xf, 0x20, false),
        ] {
            let there = windows.contain(&bar(address, size, true));
            assert_eq!(there, contained, "{size:#x} at {address:#x}");
        }
        let ports = Bar {
            kind: BarKind::Io,
            ..bar(0x1000, 0x10, true)
        };
        assert!(!windows.contain(&ports), "no window of ports");
    }

    #[test]
    fn of_two_at_one_place_the_one_that_answers_counts() {
        let windows = Windows {
            memory32: Some(0x1_0000..=0x1_ffff),
            ..Windows::default()
        };
        let taken = [bar(0x1_0000, 0x100, false), bar(0x1_0000, 0x4000, true)];
        let wanted = [bar(0, 0x1000, false)];
        assert_eq!(windows.place(&wanted, &taken), Ok(vec![0x1_4000]));
    }

    #[test]
    fn no_window_and_windows_that_are_none() {
        let wanted = [bar(0, 0x1000, false)];
        let none = Err(AllocatorError::Range {
            base: 0,
            size: 0x1000,
        });
        assert_eq!(Windows::default().place(&wanted, &[]), none);
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = Windows {
            io: Some(5..=4),
            ..Windows::default()
        };
        assert!(backwards.place(&[], &[]).is_err());
        let everything = Windows {
            io: Some(0..=u64::MAX),
            ..Windows::default()
        };
        assert!(everything.place(&[], &[]).is_err());
    }
}
