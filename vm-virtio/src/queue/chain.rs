//! One descriptor chain, read from guest memory once and checked (virtio 1.2 §2.7.4, §2.7.5).

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, GuestMemory, Permissions};

use super::area::Area;
use super::cursor::{Reader, Writer};
use super::fault::Fault;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// The most buffers in a chain with an indirect table, where the queue is not larger: as many as one system call takes.
/// The specification allows the queue's size, but drivers do not keep to it with indirect tables.
pub const MAX_INDIRECT: u16 = 1024;

/// A piece of guest memory that belongs to a chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Buffer {
    /// Where it starts. The whole of it was in memory when the chain was popped.
    pub address: GuestAddress,
    /// Bytes, at least 1.
    pub len: u32,
}

/// A descriptor chain. It owns no guest memory and borrows nothing, so that a device may keep it while a request is in
/// flight; reused for [`pop`](super::DeviceQueue::pop) after [`pop`](super::DeviceQueue::pop), it allocates nothing.
///
/// Its buffers were checked: first all that the device reads, then all that it writes, none empty, each in memory,
/// less than 4 GiB together.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    buffers: Vec<Buffer>,
    /// How many of `buffers` the device reads.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

/// The descriptors of a queue.
pub(super) struct Table<'a, M: GuestMemory> {
    pub area: Area<'a, M>,
    pub size: u16,
    /// INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

impl Chain {
    /// No buffers yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of its first descriptor, by which it is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers that the device reads, in order.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// The buffers that the device writes, in order.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Bytes that the device can read.
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device can write.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Reads what the driver gave, from the start.
    pub fn reader<'a, M: GuestMemory>(&'a self, memory: &'a M) -> Reader<'a, M> {
        Reader::new(memory, self.readable(), self.readable_len as usize)
    }

    /// Writes what the driver gets, from the start.
    pub fn writer<'a, M: GuestMemory>(&'a self, memory: &'a M) -> Writer<'a, M> {
        Writer::new(memory, self.writable(), self.writable_len as usize)
    }

    /// Fills itself with the chain that starts at descriptor `head` of `table`.
    pub(super) fn fill<'a, M: GuestMemory>(
        &mut self,
        memory: &'a M,
        table: &Table<'a, M>,
        head: u16,
    ) -> Result<(), Fault> {
        *self = Self {
            head,
            buffers: std::mem::take(&mut self.buffers),
            ..Self::default()
        };
        self.buffers.clear();

        let mut indirect = None;
        let mut size = u32::from(table.size);
        let mut limit = size;
        let mut index = head;
        let mut seen = 0;
        loop {
            if u32::from(index) >= size {
                return Err(Fault::Index { index, size });
            }
            if seen == limit {
                return Err(Fault::Endless { head, limit });
            }
            seen += 1;
            let area = indirect.as_ref().unwrap_or(&table.area);
            let at = usize::from(index) * DESCRIPTOR as usize;
            let descriptor: Descriptor = area.read(at).map_err(|source| Fault::Memory {
                what: "descriptor table",
                source,
            })?;
            if descriptor.refers_to_indirect_table() {
                check_indirect(&descriptor, table.indirect, head, indirect.is_some())?;
                let bytes = descriptor.len() as usize;
                let (start, access) = (descriptor.addr(), Permissions::Read);
                indirect = Some(Area::new(memory, start, bytes, access));
                size = descriptor.len() / DESCRIPTOR;
                limit = u32::from(table.size.max(MAX_INDIRECT));
                index = 0;
                continue;
            }
            self.push(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// Adds the buffer of `descriptor`.
    fn push<M: GuestMemory>(&mut self, memory: &M, descriptor: &Descriptor) -> Result<(), Fault> {
        let head = self.head;
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return Err(Fault::Empty { head });
        }
        self.readable_len
            .checked_add(self.writable_len)
            .and_then(|sum| sum.checked_add(len))
            .ok_or(Fault::TooLong { head })?;
        let access = if descriptor.is_write_only() {
            self.writable_len += len;
            Permissions::Write
        } else if self.writable_len == 0 {
            self.readable += 1;
            self.readable_len += len;
            Permissions::Read
        } else {
            return Err(Fault::Order { head });
        };
        if address.checked_add(u64::from(len)).is_none()
            || !memory.check_range(address, len as usize, access)
        {
            return Err(Fault::OutOfRange {
                head,
                address: address.0,
                len,
            });
        }
        self.buffers.push(Buffer { address, len });
        Ok(())
    }
}

/// The rules of §2.7.5.3.1.
fn check_indirect(
    descriptor: &Descriptor,
    negotiated: bool,
    head: u16,
    in_indirect: bool,
) -> Result<(), Fault> {
    let what = if !negotiated {
        "is there though the feature was not negotiated"
    } else if in_indirect {
        "refers to another one"
    } else if descriptor.has_next() {
        "is not the last descriptor"
    } else if descriptor.len() == 0 || !descriptor.len().is_multiple_of(DESCRIPTOR) {
        "has a length that is no multiple of a descriptor's"
    } else if descriptor
        .addr()
        .checked_add(u64::from(descriptor.len()))
        .is_none()
    {
        "goes past the end of the address space"
    } else {
        return Ok(());
    };
    Err(Fault::Indirect { head, what })
}
