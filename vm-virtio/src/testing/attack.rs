//! Descriptor chains that break the rules, one at a time.

use super::MEMORY_SIZE;
use super::guest::{Guest, Request};
use super::ring::{Descriptor, INDIRECT, NEXT, WRITE};

/// Puts something hostile into a queue, perhaps made of a valid request.
type Attack = fn(&mut Guest, u16, &Request);

/// All of them, by name.
pub(super) const ATTACKS: &[(&str, Attack)] = &[
    ("a descriptor that is its own next", |guest, queue, _| {
        let at = guest.room(16);
        raw(guest, queue, &[Descriptor::readable(at, 16).with(NEXT, 0)]);
    }),
    ("a loop of two", |guest, queue, _| {
        let at = guest.room(16);
        let one = Descriptor::readable(at, 16);
        raw(guest, queue, &[one.with(NEXT, 1), one.with(NEXT, 0)]);
    }),
    ("a loop of writable buffers", |guest, queue, _| {
        let at = guest.room(16);
        let one = Descriptor::writable(at, 16);
        raw(guest, queue, &[one.with(NEXT, 1), one.with(NEXT, 0)]);
    }),
    ("a next past the table", |guest, queue, _| {
        let (at, size) = (guest.room(16), guest.queues[usize::from(queue)].size());
        raw(
            guest,
            queue,
            &[Descriptor::readable(at, 16).with(NEXT, size)],
        );
    }),
    ("a head past the table", |guest, queue, _| {
        let size = guest.queues[usize::from(queue)].size();
        guest.queues[usize::from(queue)].offer(size);
    }),
    ("a head of 65535", |guest, queue, _| {
        guest.queues[usize::from(queue)].offer(u16::MAX);
    }),
    ("more chains than entries", |guest, queue, _| {
        let ring = &mut guest.queues[usize::from(queue)];
        // One is used so far.
        ring.set_available_index(ring.size() + 2);
    }),
    ("an index that goes back", |guest, queue, _| {
        guest.queues[usize::from(queue)].set_available_index(0);
    }),
    ("an empty readable buffer", |guest, queue, _| {
        let at = guest.room(16);
        raw(guest, queue, &[Descriptor::readable(at, 0)]);
    }),
    ("an empty writable buffer", |guest, queue, request| {
        let mut buffers = valid(guest, request);
        buffers.push(Descriptor::writable(0x1000, 0));
        guest.queues[usize::from(queue)].add(&buffers);
    }),
    ("a readable buffer past memory", |guest, queue, _| {
        raw(guest, queue, &[Descriptor::readable(MEMORY_SIZE, 16)]);
    }),
    ("a writable buffer past memory", |guest, queue, request| {
        let mut buffers = valid(guest, request);
        for buffer in buffers.iter_mut().filter(|b| b.flags & WRITE != 0) {
            buffer.address = MEMORY_SIZE - 1 + u64::from(buffer.len == 1);
        }
        buffers.push(Descriptor::writable(MEMORY_SIZE, 16));
        guest.queues[usize::from(queue)].add(&buffers);
    }),
    ("a buffer across the end of memory", |guest, queue, _| {
        raw(guest, queue, &[Descriptor::readable(MEMORY_SIZE - 8, 16)]);
    }),
    ("a buffer across the end of all", |guest, queue, _| {
        raw(guest, queue, &[Descriptor::readable(u64::MAX - 8, 16)]);
    }),
    ("a buffer of 4 GiB less one", |guest, queue, _| {
        raw(guest, queue, &[Descriptor::writable(0, u32::MAX)]);
    }),
    ("buffers of 4 GiB together", |guest, queue, _| {
        // The same memory over and over.
        let len = (MEMORY_SIZE / 2) as u32;
        let one = Descriptor::readable(0, len);
        let table = guest.room(16 * 3000);
        let count = (1_u64 << 32).div_ceil(u64::from(len)) as u16 + 1;
        for index in 0..count {
            let buffer = one.with(NEXT, index + 1);
            guest.queues[usize::from(queue)].write_table(table, index, buffer);
        }
        raw(guest, queue, &[indirect(table, 16 * u32::from(count))]);
    }),
    ("a readable buffer after a writable", |guest, queue, _| {
        let at = guest.room(1024);
        let buffers = [
            Descriptor::writable(at, 512),
            Descriptor::readable(at + 512, 512),
        ];
        guest.queues[usize::from(queue)].add(&buffers);
    }),
    ("all directions wrong", |guest, queue, request| {
        let mut buffers = valid(guest, request);
        buffers.reverse();
        for buffer in &mut buffers {
            buffer.flags ^= WRITE;
        }
        guest.queues[usize::from(queue)].add(&buffers);
    }),
    ("nothing to read", |guest, queue, _| {
        let at = guest.room(64);
        raw(guest, queue, &[Descriptor::writable(at, 64)]);
    }),
    ("nothing to write", |guest, queue, _| {
        let at = guest.room(64);
        raw(guest, queue, &[Descriptor::readable(at, 64)]);
    }),
    ("a single byte to read", |guest, queue, _| {
        let at = guest.room(1);
        raw(guest, queue, &[Descriptor::readable(at, 1)]);
    }),
    ("a single byte to write", |guest, queue, _| {
        let at = guest.room(1);
        raw(guest, queue, &[Descriptor::writable(at, 1)]);
    }),
    ("a request cut short", |guest, queue, request| {
        let mut request = request.clone();
        request.readable.truncate(request.readable.len() / 2);
        request.writable = request.writable.div_ceil(2);
        let buffers = valid(guest, &request);
        guest.queues[usize::from(queue)].add(&buffers);
    }),
    (
        "an indirect table in an indirect table",
        |guest, queue, _| {
            let (table, inner) = (guest.room(64), guest.room(64));
            let ring = &guest.queues[usize::from(queue)];
            ring.write_table(inner, 0, Descriptor::readable(0x1000, 16));
            ring.write_table(table, 0, indirect(inner, 16));
            raw(guest, queue, &[indirect(table, 16)]);
        },
    ),
    (
        "an indirect table that refers to itself",
        |guest, queue, _| {
            let table = guest.room(64);
            guest.queues[usize::from(queue)].write_table(table, 0, indirect(table, 16));
            raw(guest, queue, &[indirect(table, 16)]);
        },
    ),
    ("an indirect table with a next", |guest, queue, _| {
        let table = guest.room(64);
        guest.queues[usize::from(queue)].write_table(table, 0, Descriptor::readable(0x1000, 16));
        raw(guest, queue, &[indirect(table, 16).with(NEXT, 1)]);
    }),
    ("an indirect table of no length", |guest, queue, _| {
        let table = guest.room(64);
        raw(guest, queue, &[indirect(table, 0)]);
    }),
    ("an indirect table of 24 bytes", |guest, queue, _| {
        let table = guest.room(64);
        raw(guest, queue, &[indirect(table, 24)]);
    }),
    ("an indirect table past memory", |guest, queue, _| {
        raw(guest, queue, &[indirect(MEMORY_SIZE, 16)]);
    }),
    ("an indirect table across the end", |guest, queue, _| {
        raw(guest, queue, &[indirect(u64::MAX - 15, 32)]);
    }),
    ("an indirect table of 4 GiB", |guest, queue, _| {
        let table = guest.room(64);
        guest.queues[usize::from(queue)].write_table(
            table,
            0,
            Descriptor::readable(0x1000, 16).with(NEXT, u16::MAX),
        );
        raw(guest, queue, &[indirect(table, !15)]);
    }),
    ("an indirect table with a loop", |guest, queue, _| {
        let table = guest.room(64);
        let one = Descriptor::readable(0x1000, 16);
        let ring = &guest.queues[usize::from(queue)];
        ring.write_table(table, 0, one.with(NEXT, 1));
        ring.write_table(table, 1, one.with(NEXT, 0));
        raw(guest, queue, &[indirect(table, 32)]);
    }),
    ("descriptors of all ones", |guest, queue, _| {
        let ones = Descriptor {
            address: u64::MAX,
            len: u32::MAX,
            flags: u16::MAX,
            next: u16::MAX,
        };
        raw(guest, queue, &[ones; 2]);
    }),
];

fn indirect(address: u64, len: u32) -> Descriptor {
    Descriptor {
        address,
        len,
        flags: INDIRECT,
        next: 0,
    }
}

/// Writes `descriptors` from number 0 on, and offers number 0.
fn raw(guest: &mut Guest, queue: u16, descriptors: &[Descriptor]) {
    let ring = &mut guest.queues[usize::from(queue)];
    for (index, descriptor) in (0..).zip(descriptors) {
        ring.write_descriptor(index, *descriptor);
    }
    ring.offer(0);
}

/// The buffers of a request with nothing wrong.
fn valid(guest: &mut Guest, request: &Request) -> Vec<Descriptor> {
    guest.buffers(request, u32::MAX).0
}
