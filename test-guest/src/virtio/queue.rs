//! The driver's side of a split virtqueue (virtio 1.2 §2.7), with EVENT_IDX and indirect descriptors.

use core::sync::atomic::{Ordering, fence};

use crate::dma;
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason};

/// Descriptor flag: another follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: points at a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Most descriptors in one indirect table of ours.
pub const TABLE_ENTRIES: u64 = 32;
/// Most entries that a ring of ours has.
pub const MAX_SIZE: u16 = 256;

/// One piece of memory of a request.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes it.
    pub writable: bool,
}

impl Segment {
    /// Memory that the device reads.
    pub const fn readable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            writable: false,
        }
    }

    /// Memory that the device writes.
    pub const fn writable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            writable: true,
        }
    }
}

/// Something that the device has used.
#[derive(Clone, Copy)]
pub struct Used {
    /// First descriptor of the chain.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// A queue in memory and the driver's place in it.
pub struct Queue {
    /// Number at the device.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Where to notify; 0 until the transport has set it.
    pub doorbell: u64,
    event_idx: bool,
    tables: u64,
    lengths: u64,
    free: u16,
    free_count: u16,
    next_available: u16,
    notified: u16,
    last_used: u16,
}

impl Queue {
    /// Lays a queue out in fresh memory, with the least alignment that each part needs.
    pub fn new(index: u16, size: u16, event_idx: bool) -> Outcome<Self> {
        let n = u64::from(size);
        let queue = Self {
            index,
            size,
            descriptors: dma::take(16 * n, 16)?,
            available: dma::take(6 + 2 * n, 2)?,
            used: dma::take(6 + 8 * n, 4)?,
            doorbell: 0,
            event_idx,
            tables: dma::take(16 * TABLE_ENTRIES * n, 16)?,
            lengths: dma::take(2 * n, 2)?,
            free: 0,
            free_count: size,
            next_available: 0,
            notified: 0,
            last_used: 0,
        };
        for i in 0..size {
            write(queue.descriptor(i) + 14, i + 1);
        }
        Ok(queue)
    }

    /// Address of a descriptor.
    pub fn descriptor(&self, index: u16) -> u64 {
        self.descriptors + u64::from(index) * 16
    }

    /// Address of the indirect table that belongs to a descriptor.
    pub fn table(&self, index: u16) -> u64 {
        self.tables + u64::from(index) * 16 * TABLE_ENTRIES
    }

    /// The head that the next chain gets; `None` when the queue is full.
    pub fn next_head(&self) -> Option<u16> {
        (self.free_count > 0).then_some(self.free)
    }

    /// Makes a chain of the segments, in the ring or in an indirect table; its head, or `None` when there is no room.
    pub fn add(&mut self, segments: &[Segment], indirect: bool) -> Option<u16> {
        let count = segments.len() as u16;
        let needed = if indirect { 1 } else { count };
        let fits = !indirect || u64::from(count) <= TABLE_ENTRIES;
        if count == 0 || needed > self.free_count || !fits {
            return None;
        }
        let head = self.free;
        if indirect {
            let table = self.table(head);
            for (i, s) in segments.iter().enumerate() {
                let next = if i + 1 < segments.len() {
                    i as u16 + 1
                } else {
                    0
                };
                put(
                    table + i as u64 * 16,
                    s.address,
                    s.length,
                    flags(s, next != 0),
                    next,
                );
            }
            self.free = read(self.descriptor(head) + 14);
            put(
                self.descriptor(head),
                table,
                u32::from(count) * 16,
                INDIRECT,
                self.free,
            );
        } else {
            for (i, s) in segments.iter().enumerate() {
                let at = self.descriptor(self.free);
                let next: u16 = read(at + 14);
                put(
                    at,
                    s.address,
                    s.length,
                    flags(s, i + 1 < segments.len()),
                    next,
                );
                self.free = next;
            }
        }
        self.free_count -= needed;
        write(self.lengths + u64::from(head) * 2, needed);
        self.offer(head);
        Some(head)
    }

    /// Puts a chain into the available ring, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        write(self.available + 4 + slot * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        fence(Ordering::SeqCst);
        write(self.available + 2, self.next_available);
    }

    /// Tells the device of what is new, unless it said that it needn't know; whether it was told.
    pub fn kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.notified, self.next_available);
        let wanted = if self.event_idx {
            let event: u16 = read(self.used + 4 + u64::from(self.size) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            read::<u16>(self.used) & 1 == 0
        };
        if wanted {
            self.ring();
        }
        self.notified = new;
        wanted
    }

    /// Tells the device, in any case.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        write(self.doorbell, self.index);
    }

    /// Asks for an interrupt with the next chain that is used, or for none.
    pub fn ask_for_interrupt(&self, wanted: bool) {
        if self.event_idx {
            let event = self.last_used.wrapping_sub(u16::from(!wanted));
            write(self.available + 4 + u64::from(self.size) * 2, event);
        } else {
            write(self.available, u16::from(!wanted));
        }
        fence(Ordering::SeqCst);
    }

    /// How many chains the device has used that aren't taken yet.
    pub fn used_count(&self) -> u16 {
        read::<u16>(self.used + 2).wrapping_sub(self.last_used)
    }

    /// True when there is such a chain.
    pub fn has_used(&self) -> bool {
        self.used_count() != 0
    }

    /// Takes the next used chain; fails when the device returned one that it hadn't got.
    pub fn take(&mut self) -> Outcome<Option<Used>> {
        let Some(used) = self.take_raw() else {
            return Ok(None);
        };
        let cell = self.lengths + u64::from(used.head) * 2;
        let count: u16 = if used.head < self.size { read(cell) } else { 0 };
        if count == 0 {
            return Err(Reason(
                "the device used a chain that it hadn't got",
                u64::from(used.head),
                u64::from(self.size),
            ));
        }
        write(cell, 0u16);
        let mut last = used.head;
        for _ in 1..count {
            last = read(self.descriptor(last) + 14);
        }
        write(self.descriptor(last) + 14, self.free);
        self.free = used.head;
        self.free_count += count;
        Ok(Some(used))
    }

    /// Takes the next used entry as it is, of a chain that `offer` put there.
    pub fn take_raw(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = self.used + 4 + u64::from(self.last_used % self.size) * 8;
        self.last_used = self.last_used.wrapping_add(1);
        Some(Used {
            head: read::<u32>(at).min(0xffff) as u16,
            length: read(at + 4),
        })
    }
}

fn flags(s: &Segment, next: bool) -> u16 {
    let write = if s.writable { WRITE } else { 0 };
    write | if next { NEXT } else { 0 }
}

/// Writes a descriptor.
pub fn put(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    write(at, address);
    write(at + 8, length);
    write(at + 12, flags);
    write(at + 14, next);
}
