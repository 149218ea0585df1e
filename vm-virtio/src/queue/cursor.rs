//! Reading and writing along the buffers of a chain: by value for headers, by slice for data, without a copy.

use vm_memory::bitmap::BS;
use vm_memory::{
    Address, ByteValued, Bytes, GuestMemory, GuestMemoryError, Permissions, VolatileSlice,
};

use super::chain::Buffer;
use super::fault::Fault;

/// A slice of guest memory.
pub type Slice<'a, M> = VolatileSlice<'a, BS<'a, <M as GuestMemory>::Bitmap>>;

/// A place in a list of buffers.
#[derive(Debug)]
struct Cursor<'a, M> {
    memory: &'a M,
    /// The first is the one that the cursor is in.
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are behind.
    offset: u32,
    /// Bytes ahead.
    left: usize,
    /// Bytes behind.
    done: usize,
}

// By hand: `M` need not be Clone.
impl<M> Clone for Cursor<'_, M> {
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

impl<'a, M: GuestMemory> Cursor<'a, M> {
    /// The next piece of at most `most` bytes within one buffer, and moves past it.
    fn step(&mut self, most: usize) -> Option<Buffer> {
        let first = self.buffers.first()?;
        let wanted = most.min(self.left);
        let ahead = first.len - self.offset;
        let len = u32::try_from(wanted).unwrap_or(u32::MAX).min(ahead);
        if len == 0 {
            return None;
        }
        let address = first.address.unchecked_add(u64::from(self.offset));
        if len == ahead {
            self.buffers = self.buffers.get(1..).unwrap_or_default();
            self.offset = 0;
        } else {
            self.offset += len;
        }
        self.left -= len as usize;
        self.done += len as usize;
        Some(Buffer { address, len })
    }

    fn check(&self, wanted: usize) -> Result<(), Fault> {
        if wanted > self.left {
            return Err(Fault::Short {
                wanted,
                left: self.left,
            });
        }
        Ok(())
    }

    fn skip(&mut self, mut count: usize) -> Result<(), Fault> {
        self.check(count)?;
        while count > 0 {
            match self.step(count) {
                Some(piece) => count -= piece.len as usize,
                None => break,
            }
        }
        Ok(())
    }

    /// Gives `each` the slices of the next `count` bytes, and moves past them.
    fn slices(
        &mut self,
        count: usize,
        access: Permissions,
        mut each: impl FnMut(Slice<'a, M>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.check(count)?;
        let mut left = count;
        while left > 0 {
            let Some(piece) = self.step(left) else { break };
            left -= piece.len as usize;
            let slices = self
                .memory
                .get_slices(piece.address, piece.len as usize, access)
                .map_err(in_buffer)?;
            for slice in slices {
                each(slice.map_err(in_buffer)?)?;
            }
        }
        Ok(())
    }
}

fn in_buffer(source: GuestMemoryError) -> Fault {
    Fault::Memory {
        what: "buffer",
        source,
    }
}

/// Reads along the readable buffers of a chain.
#[derive(Debug)]
pub struct Reader<'a, M>(Cursor<'a, M>);

impl<M> Clone for Reader<'_, M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<'a, M: GuestMemory> Reader<'a, M> {
    pub(super) fn new(memory: &'a M, buffers: &'a [Buffer], left: usize) -> Self {
        Self(Cursor {
            memory,
            buffers,
            offset: 0,
            left,
            done: 0,
        })
    }

    /// Bytes that are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Bytes that were read or skipped.
    #[must_use]
    pub fn done(&self) -> usize {
        self.0.done
    }

    /// Fills `bytes`. Nothing is read where fewer are left: [`Fault::Short`].
    pub fn read(&mut self, mut bytes: &mut [u8]) -> Result<(), Fault> {
        self.0.slices(bytes.len(), Permissions::Read, |slice| {
            let left = bytes.len();
            let (now, later) = std::mem::take(&mut bytes).split_at_mut(slice.len().min(left));
            slice.copy_to(now);
            bytes = later;
            Ok(())
        })
    }

    /// Reads one value, in the byte order of the guest, which is little-endian.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, Fault> {
        let mut value = T::default();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }

    /// Moves past `count` bytes.
    pub fn skip(&mut self, count: usize) -> Result<(), Fault> {
        self.0.skip(count)
    }

    /// Gives `each` the next `count` bytes as slices of guest memory, in order, and moves past them. A device makes
    /// the iovecs of its system call out of them: the data are not copied.
    pub fn slices(
        &mut self,
        count: usize,
        each: impl FnMut(Slice<'a, M>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.0.slices(count, Permissions::Read, each)
    }
}

/// Writes along the writable buffers of a chain.
#[derive(Debug)]
pub struct Writer<'a, M>(Cursor<'a, M>);

impl<M> Clone for Writer<'_, M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<'a, M: GuestMemory> Writer<'a, M> {
    pub(super) fn new(memory: &'a M, buffers: &'a [Buffer], left: usize) -> Self {
        Self(Cursor {
            memory,
            buffers,
            offset: 0,
            left,
            done: 0,
        })
    }

    /// Bytes that are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Bytes that were written or skipped.
    #[must_use]
    pub fn done(&self) -> usize {
        self.0.done
    }

    /// Writes `bytes`. Nothing is written where there is less room: [`Fault::Short`].
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        self.0.slices(bytes.len(), Permissions::Write, |slice| {
            let (now, later) = bytes.split_at(slice.len().min(bytes.len()));
            slice.write_slice(now, 0).map_err(|e| in_buffer(e.into()))?;
            bytes = later;
            Ok(())
        })
    }

    /// Writes one value, in the byte order of the guest, which is little-endian.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> Result<(), Fault> {
        self.write(value.as_slice())
    }

    /// Moves past `count` bytes, which stay as they are.
    pub fn skip(&mut self, count: usize) -> Result<(), Fault> {
        self.0.skip(count)
    }

    /// As [`Reader::slices`], of memory to write to. Who writes through a pointer marks the slice's bitmap.
    pub fn slices(
        &mut self,
        count: usize,
        each: impl FnMut(Slice<'a, M>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.0.slices(count, Permissions::Write, each)
    }
}
