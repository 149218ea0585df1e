//! One virtqueue as its driver sees it (virtio 1.2 §2.7.13, §2.7.14), well-behaved or not.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split;
use vm_memory::{Bytes, GuestAddress};

use super::TestMemory;
use crate::{Half, QueueAddress, QueueV1};

/// The chain goes on at `next`.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The device writes the buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A descriptor, with whatever in it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub address: u64,
    /// Bytes of it.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// A buffer that the device reads.
    #[must_use]
    pub fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            ..Self::default()
        }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub fn writable(address: u64, len: u32) -> Self {
        Self {
            flags: WRITE,
            ..Self::readable(address, len)
        }
    }

    /// With `flags` too, and with `next`.
    #[must_use]
    pub fn with(self, flags: u16, next: u16) -> Self {
        Self {
            flags: self.flags | flags,
            next,
            ..self
        }
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Used {
    /// First descriptor of the chain.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// A virtqueue in the hands of its driver.
#[derive(Debug)]
pub struct DriverQueue {
    memory: TestMemory,
    base: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of each chain that is with the device, by head.
    chains: Vec<Vec<u16>>,
    available: u16,
    used: u16,
}

impl DriverQueue {
    /// A queue of `size` entries, with its rings at `base`, a multiple of 16. Clears them.
    #[must_use]
    pub fn new(memory: &TestMemory, base: u64, size: u16, event_idx: bool) -> Self {
        let bytes = usize::try_from(Self::bytes(size)).unwrap();
        memory
            .write_slice(&vec![0; bytes], GuestAddress(base))
            .unwrap();
        Self {
            memory: memory.clone(),
            base,
            size,
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            available: 0,
            used: 0,
        }
    }

    /// Bytes that a queue of `size` entries takes.
    #[must_use]
    pub fn bytes(size: u16) -> u64 {
        // Descriptors, both rings with their event fields, and up to 2 bytes between them.
        26 * u64::from(size) + 16
    }

    /// Address of the descriptor table.
    #[must_use]
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// Address of the used ring.
    #[must_use]
    pub fn used_ring(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The values of the address registers.
    #[must_use]
    pub fn registers(&self) -> [(QueueAddress, Half, u32); 6] {
        let both = |which, address: u64| {
            [
                (which, Half::Low, address as u32),
                (which, Half::High, (address >> 32) as u32),
            ]
        };
        let [a, b] = both(QueueAddress::Descriptors, self.descriptors());
        let [c, d] = both(QueueAddress::Available, self.available());
        let [e, f] = both(QueueAddress::Used, self.used_ring());
        [a, b, c, d, e, f]
    }

    /// The queue as it is at the start, for a [`DeviceQueue`](crate::DeviceQueue) without registers.
    #[must_use]
    pub fn state(&self) -> QueueV1 {
        QueueV1 {
            size: self.size,
            ready: true,
            descriptors: self.descriptors(),
            available: self.available(),
            used: self.used_ring(),
            ..QueueV1::default()
        }
    }

    /// Starts at `index` instead of 0 on both sides, to see indexes wrap. Before anything is offered.
    pub fn start_at(&mut self, index: u16) {
        (self.available, self.used) = (index, index);
        self.store(self.available() + 2, index);
        self.store(self.used_ring() + 2, index);
        if self.event_idx {
            self.set_used_event(index);
        }
    }

    fn store(&self, address: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    fn load(&self, address: u64) -> u16 {
        u16::from_le(
            self.memory
                .load(GuestAddress(address), Ordering::Acquire)
                .unwrap(),
        )
    }

    /// Writes descriptor `index` of the table at `table`, and checks nothing.
    pub fn write_table(&self, table: u64, index: u16, descriptor: Descriptor) {
        let raw = RawDescriptor::from(split::Descriptor::new(
            descriptor.address,
            descriptor.len,
            descriptor.flags,
            descriptor.next,
        ));
        let address = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_obj(raw, address).unwrap();
    }

    /// Writes descriptor `index` of the queue, and checks nothing.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write_table(self.descriptors(), index, descriptor);
    }

    /// Makes the chain that starts at `head` available, and checks nothing.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.available % self.size);
        self.store(slot, head);
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// Sets the index of the available ring, and checks nothing.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.store(self.available() + 2, index);
    }

    /// Makes a chain of `buffers` available, linked in their order. None if there are too few free descriptors. Gives its head.
    pub fn add(&mut self, buffers: &[Descriptor]) -> Option<u16> {
        if buffers.is_empty() || self.free.len() < buffers.len() {
            return None;
        }
        let indexes = self.free.split_off(self.free.len() - buffers.len());
        for (place, (&index, buffer)) in indexes.iter().zip(buffers).enumerate() {
            let descriptor = match indexes.get(place + 1) {
                Some(&next) => buffer.with(NEXT, next),
                None => *buffer,
            };
            self.write_descriptor(index, descriptor);
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = indexes;
        self.offer(head);
        Some(head)
    }

    /// As [`add`](Self::add), by an indirect table that it writes at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Descriptor]) -> Option<u16> {
        let count = u16::try_from(buffers.len()).unwrap();
        for (index, buffer) in (0..).zip(buffers) {
            let descriptor = if index + 1 < count {
                buffer.with(NEXT, index + 1)
            } else {
                *buffer
            };
            self.write_table(table, index, descriptor);
        }
        self.add(&[Descriptor {
            address: table,
            len: 16 * u32::from(count),
            flags: INDIRECT,
            next: 0,
        }])
    }

    /// The index that the device has in the used ring.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.load(self.used_ring() + 2)
    }

    /// The next used chain, if there is one. Its descriptors are free again.
    ///
    /// # Panics
    /// If the chain was not with the device.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.event_idx {
            // "Interrupt me after the next": then look.
            self.set_used_event(self.used);
            fence(Ordering::SeqCst);
        }
        if self.used_index() == self.used {
            return None;
        }
        let element = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        let read = |address| -> u32 { self.memory.read_obj(GuestAddress(address)).unwrap() };
        let used = Used {
            head: u32::from_le(read(element)),
            len: u32::from_le(read(element + 4)),
        };
        self.used = self.used.wrapping_add(1);
        let chain = std::mem::take(&mut self.chains[used.head as usize]);
        assert!(
            !chain.is_empty(),
            "chain {} is used, but it was not with the device",
            used.head
        );
        self.free.extend(chain);
        if self.event_idx {
            self.set_used_event(self.used);
            fence(Ordering::SeqCst);
        }
        Some(used)
    }

    /// With EVENT_IDX: wants an interrupt when the used index goes past `index`.
    pub fn set_used_event(&self, index: u16) {
        self.store(self.available() + 4 + 2 * u64::from(self.size), index);
    }

    /// Without EVENT_IDX: wants interrupts, or not.
    pub fn set_interrupts(&self, wanted: bool) {
        let flags = if wanted {
            0
        } else {
            VRING_AVAIL_F_NO_INTERRUPT as u16
        };
        self.store(self.available(), flags);
    }

    /// Whether the device wants to be notified of the last `count` chains (§2.7.10).
    #[must_use]
    pub fn wants_kick(&self, count: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(self.used_ring() + 4 + 8 * u64::from(self.size));
            self.available.wrapping_sub(event).wrapping_sub(1) < count
        } else {
            self.load(self.used_ring()) & VRING_USED_F_NO_NOTIFY as u16 == 0
        }
    }
}
