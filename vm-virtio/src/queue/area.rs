//! A ring in guest memory, looked up once for a batch of accesses: a lookup costs more than what is then read or written.

use std::sync::atomic::Ordering;

use vm_memory::{
    Address, AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryError,
    Permissions, VolatileMemory,
};

use super::cursor::Slice;

/// A range of guest memory that is accessed piece by piece.
pub(super) struct Area<'a, M: GuestMemory> {
    memory: &'a M,
    start: GuestAddress,
    /// Where it is, unless it is spread over several places of the host's memory, or not all of it is there.
    slice: Option<Slice<'a, M>>,
}

impl<'a, M: GuestMemory> Area<'a, M> {
    /// `len` bytes at `start`. Whether they are there shows when they are accessed.
    pub fn new(memory: &'a M, start: GuestAddress, len: usize, access: Permissions) -> Self {
        let first = memory.get_slices(start, len, access).ok();
        let slice = first
            .and_then(|mut slices| slices.next()?.ok())
            .filter(|slice| slice.len() == len);
        Self {
            memory,
            start,
            slice,
        }
    }

    fn at(&self, offset: usize) -> Result<GuestAddress, GuestMemoryError> {
        self.start
            .checked_add(offset as u64)
            .ok_or(GuestMemoryError::GuestAddressOverflow)
    }

    /// What is `offset` bytes from the start, read at once.
    pub fn load<T: AtomicAccess>(
        &self,
        offset: usize,
        order: Ordering,
    ) -> Result<T, GuestMemoryError> {
        match &self.slice {
            Some(slice) => slice.load(offset, order).map_err(Into::into),
            None => self.memory.load(self.at(offset)?, order),
        }
    }

    /// What is `offset` bytes from the start.
    pub fn read<T: ByteValued>(&self, offset: usize) -> Result<T, GuestMemoryError> {
        match &self.slice {
            Some(slice) => Ok(slice.get_ref::<T>(offset)?.load()),
            None => self.memory.read_obj(self.at(offset)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn in_one_piece_or_two_it_reads_the_same_and_nothing_past_memory() {
        let one = [(GuestAddress(0), 0x3000)];
        let two = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x2000)];
        for regions in [&one[..], &two[..]] {
            let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(regions).unwrap();
            for at in 0..0x600u64 {
                memory.write_obj(at, GuestAddress(8 * at)).unwrap();
            }
            let area = Area::new(&memory, GuestAddress(0xff0), 0x100, Permissions::Read);
            assert_eq!(area.slice.is_some(), regions.len() == 1);
            for offset in [0, 8, 16, 0xf8] {
                let wanted = 0x1fe + offset as u64 / 8;
                assert_eq!(area.read::<u64>(offset).unwrap(), wanted);
                assert_eq!(area.load::<u64>(offset, Ordering::Acquire).unwrap(), wanted);
            }
            // Not all of it is there; what is can be read.
            let area = Area::new(&memory, GuestAddress(0x2ff0), 0x20, Permissions::Read);
            assert_eq!(area.read::<u64>(8).unwrap(), 0x5ff);
            assert!(area.read::<u64>(16).is_err());
            assert!(area.load::<u64>(16, Ordering::Relaxed).is_err());
            let area = Area::new(&memory, GuestAddress(u64::MAX), 0x20, Permissions::Read);
            assert!(area.read::<u64>(8).is_err());
        }
    }
}
