//! A hostile driver for any virtio device (virtio 1.2 §2): what the targets `block`, `rng`, `console` and the other devices share.
//!
//! A target says what its device can be asked, what happens on the host's side and how to see that the device works; the rest is here:
//!
//! ```text
//! struct Entropy;
//!
//! impl Subject for Entropy {
//!     type Ask = u16;                                          // any type that `arbitrary` makes
//!     type Event = ();                                         // what the host does meanwhile
//!     fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> { ... }
//!     fn request(&self, room: &u16) -> (u16, Request) { ... }  // queue, bytes to read, room to write
//!     fn alive(&mut self, guest: &mut Guest) { assert_eq!(guest.ask(0, &...).len(), 8) }
//! }
//!
//! fuzz_target!(|case: Case<u16, ()>| run(&case, &mut Entropy));
//! ```
//!
//! Holds every device to this, whatever the driver does:
//!
//! * no panic, no endless loop (libFuzzer's time limit);
//! * it writes only to memory that a descriptor let it write, and to its used rings;
//! * what it puts into a used ring was available, once, and it wrote no more than there was room for;
//! * a driver that did nothing wrong is never told NEEDS_RESET, and gets its answers with no more notifications than were asked for;
//! * a paused device does nothing; one that is saved goes on elsewhere; after a reset it works.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{Ordering, fence};

use arbitrary::Arbitrary;
use vm_memory::{Bytes, GuestAddress};
use vm_virtio::testing::{
    Descriptor, DriverQueue, Guest, INDIRECT, MEMORY_SIZE, NEXT, Request, SEAM, TestMemory, WRITE,
};
use vm_virtio::{Half, QueueAddress, VirtioDevice, feature, status};

use crate::show;

/// Indirect tables are from here to [`RINGS`].
const TABLES: u64 = 0x2000;
/// Queues are from here on.
const RINGS: u64 = 0x1_0000;
/// Buffers are from here to [`ARENA_END`], the first of them across the seam.
const ARENA: u64 = SEAM - 0x800;
const ARENA_END: u64 = ARENA + ARENA_SIZE as u64;
const ARENA_SIZE: usize = 0x2_0000;
/// A byte that nobody has written.
const UNTOUCHED: u8 = 0xa5;
/// The most entries of a queue here.
const MOST_ENTRIES: u16 = 64;
/// Descriptors of a chain that is made here.
const MOST_BUFFERS: usize = 32;

/// One type of device, for [`run`].
pub trait Subject {
    /// What a driver that does nothing wrong asks.
    type Ask: Debug;
    /// What happens on the host's side.
    type Event: Debug;

    /// A new device, equal to those before; they are gone.
    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>>;

    /// The driver has negotiated `features`, and will set up the queues.
    fn negotiated(&mut self, features: u64) {
        let _ = features;
    }

    /// The queue for `ask`, what the device reads and how much it may write.
    fn request(&self, ask: &Self::Ask) -> (u16, Request);

    /// Whether the device uses the chain of `ask` without an event of the host.
    fn answers(&self, ask: &Self::Ask) -> bool {
        let _ = ask;
        true
    }

    /// Panics if `answer`, which is what the device wrote, is wrong for `ask`. No other request was with the device, and none that
    /// broke rules since [`settled`](Self::settled).
    fn check(&mut self, ask: &Self::Ask, answer: &[u8]) {
        let _ = (ask, answer);
    }

    /// Something happens on the host's side.
    fn event(&mut self, event: &Self::Event) {
        let _ = event;
    }

    /// The device is paused or was reset, so that nothing happens. Panics if the host's side is not as it may be. What
    /// requests did that were not checked one by one is to be taken for given here.
    fn settled(&mut self) {}

    /// Panics if the device, which has just been reset and started with all features, does not work.
    fn alive(&mut self, guest: &mut Guest);
}

/// What one driver does to a device whose requests are `A`, and the host's side with events `E`.
#[derive(Arbitrary, Debug)]
pub struct Case<A, E> {
    start: Start,
    steps: Vec<Step<A, E>>,
}

/// How a driver starts the device.
#[derive(Arbitrary, Debug)]
struct Start {
    /// Features not wanted.
    without: u64,
    /// A feature wanted whether it is offered or not.
    extra: Option<u8>,
    /// Logarithm of the entries of each queue; the largest possible for those that are missing.
    log_sizes: Vec<u8>,
    /// Queues not enabled, as bits.
    disabled: u8,
    /// An address of a queue is this instead.
    address: Option<(u8, u8, u64)>,
}

#[derive(Arbitrary, Debug)]
enum Step<A, E> {
    /// Asks, as drivers do, and waits for the answer where there must be one.
    Ask(A, Framing),
    /// Offers a request, and does not wait.
    Offer(A, Framing),
    /// Offers a request in which something is wrong.
    Broken(A, Framing, Vec<(u8, Damage)>),
    /// Offers a chain of anything.
    Chain(u8, bool, Vec<Hostile>),
    /// Offers a head that perhaps is none.
    Head(u8, u16),
    /// Moves the available index.
    Index(u8, u16),
    UsedEvent(u8, u16),
    Interrupts(u8, bool),
    Kick(u8),
    TakeUsed(u8),
    ReadConfig(u16, u8),
    WriteConfig(u16, Vec<u8>),
    Generation,
    /// Writes to registers that must not change any more, or any value to the status but a reset.
    Registers(u16, u32),
    Status(u8),
    Pause,
    Resume,
    Move,
    Reset(Start),
    Event(E),
}

/// How a request is cut into buffers.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Framing {
    piece: u16,
    indirect: bool,
}

/// What is wrong with a descriptor.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Damage {
    Address(Place),
    Len(u32),
    Longer(u8),
    Flags(u16),
    Next(u16),
    Direction,
    Gone,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Arena(u16),
    Low(u16),
    BeforeEnd(u16),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Hostile {
    place: Place,
    len: Length,
    flags: u8,
    next: Option<u16>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Length {
    Some(u16),
    Any(u32),
}

impl Place {
    fn address(self) -> u64 {
        match self {
            Self::Arena(offset) => ARENA + u64::from(offset),
            Self::Low(address) => u64::from(address),
            Self::BeforeEnd(distance) => MEMORY_SIZE - u64::from(distance),
            Self::Any(address) => address,
        }
    }
}

/// A chain that is with the device.
#[derive(Debug)]
struct Offered {
    descriptors: Vec<u16>,
    /// Bytes that the device may write, where that is known.
    room: Option<u64>,
    /// Where the answer will be.
    answer: u64,
}

/// What the driver knows of a queue.
#[derive(Debug)]
struct Side {
    free: Vec<u16>,
    with_device: BTreeMap<u16, Offered>,
    used: u16,
    unkicked: u16,
    /// Only chains were offered whose head is one, each once.
    exact: bool,
}

struct Driver<'a, S> {
    subject: &'a mut S,
    /// None only while it moves.
    guest: Option<Guest>,
    sides: Vec<Side>,
    /// What the arena holds as far as the driver wrote it, and where the device may have written.
    shadow: Vec<u8>,
    writable: Vec<bool>,
    next_buffer: u64,
    next_table: u64,
    /// The driver did nothing wrong since the reset.
    clean: bool,
    /// A chain may go on in descriptors that are not its own.
    loose: bool,
    /// The device may have been allowed to write anywhere, or to write the rings.
    wild: bool,
    paused: bool,
}

/// Does to `subject`'s device what `case` says. Panics where the device does what it may not.
pub fn run<S: Subject>(case: &Case<S::Ask, S::Event>, subject: &mut S) {
    let guest = Guest::new(subject.device());
    let mut driver = Driver {
        subject,
        guest: Some(guest),
        sides: Vec::new(),
        shadow: vec![UNTOUCHED; ARENA_SIZE],
        writable: vec![false; ARENA_SIZE],
        next_buffer: ARENA,
        next_table: TABLES,
        clean: true,
        loose: false,
        wild: false,
        paused: false,
    };
    show(&case.start);
    driver.start(&case.start);
    for step in &case.steps {
        show(step);
        driver.step(step);
    }
    driver.finish();
}

impl<S: Subject> Driver<'_, S> {
    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("it does not move now")
    }

    /// From a reset on.
    fn start(&mut self, start: &Start) {
        // What was written to anywhere does not matter any more.
        let arena = vec![UNTOUCHED; ARENA_SIZE];
        let memory = self.guest().memory.clone();
        memory
            .write_slice(&arena, GuestAddress(ARENA))
            .expect("the arena is memory");
        self.shadow = arena;
        self.writable.fill(false);
        (self.next_buffer, self.next_table) = (ARENA, TABLES);
        (self.clean, self.loose, self.wild, self.paused) = (true, false, false, false);
        self.sides.clear();

        let guest = self.guest();
        guest.queues.clear();
        let offered = guest.core.registers().offered_features();
        let wanted = offered & !start.without | feature::VERSION_1;
        let extra = start.extra.map_or(0, |bit| 1 << (bit % 64));
        let accepted = guest.negotiate(wanted | extra);
        let acceptable = extra & !offered == 0 && self.required() & !(wanted | extra) == 0;
        assert_eq!(accepted, acceptable, "features {wanted:#x} + {extra:#x}");

        let guest = self.guest.as_mut().expect("it does not move now");
        let registers = guest.core.registers_mut();
        self.subject.negotiated(registers.features());
        let event_idx = registers.features() & feature::EVENT_IDX != 0;
        let mut base = RINGS;
        let mut sound = true;
        for index in 0..registers.queue_count() {
            registers.select_queue(index);
            let max = registers.queue_max_size().min(MOST_ENTRIES);
            let log = start.log_sizes.get(usize::from(index));
            let size = log.map_or(max, |log| (1 << (log % 7)).min(max));
            registers.write_queue_size(size);
            assert_eq!(registers.queue_size(), size, "queue {index}");
            let queue = DriverQueue::new(&memory, base, size, event_idx);
            for (which, half, value) in queue.registers() {
                registers.write_queue_address(which, half, value);
            }
            if let Some((which, part, address)) = start.address
                && u16::from(which) == index
            {
                sound = false;
                let part = match part % 3 {
                    0 => QueueAddress::Descriptors,
                    1 => QueueAddress::Available,
                    _ => QueueAddress::Used,
                };
                registers.write_queue_address(part, Half::Low, address as u32);
                registers.write_queue_address(part, Half::High, (address >> 32) as u32);
            }
            let enabled = start.disabled & 1_u8.checked_shl(index.into()).unwrap_or(0) == 0;
            registers.write_queue_ready(enabled);
            guest.queues.push(queue);
            self.sides.push(Side {
                free: if enabled {
                    (0..size).rev().collect()
                } else {
                    Vec::new()
                },
                with_device: BTreeMap::new(),
                used: 0,
                unkicked: 0,
                exact: true,
            });
            base = (base + DriverQueue::bytes(size)).next_multiple_of(64);
        }
        (self.clean, self.wild) = (sound && accepted, !sound);
        self.guest().driver_ok();
    }

    /// Features without which the device accepts none.
    fn required(&mut self) -> u64 {
        let offered = self.guest().core.registers().offered_features();
        feature::VERSION_1 | offered & feature::ACCESS_PLATFORM
    }

    fn step(&mut self, step: &Step<S::Ask, S::Event>) {
        match step {
            Step::Ask(ask, framing) => self.ask(ask, *framing),
            Step::Offer(ask, framing) => drop(self.offer(ask, *framing)),
            Step::Broken(ask, framing, damage) => self.offer_broken(ask, *framing, damage),
            Step::Chain(queue, indirect, hostile) => self.offer_hostile(*queue, *indirect, hostile),
            Step::Head(queue, head) => {
                if let Some(index) = self.queue(*queue) {
                    (self.clean, self.sides[index].exact) = (false, false);
                    self.guest().queues[index].offer(*head);
                }
            }
            Step::Index(queue, to) => {
                if let Some(index) = self.queue(*queue) {
                    (self.clean, self.sides[index].exact) = (false, false);
                    self.guest().queues[index].set_available_index(*to);
                }
            }
            Step::UsedEvent(queue, to) => {
                if let Some(index) = self.queue(*queue) {
                    // Without EVENT_IDX this is past the ring, in memory that no one else has.
                    self.guest().queues[index].set_used_event(*to);
                }
            }
            Step::Interrupts(queue, wanted) => {
                if let Some(index) = self.queue(*queue) {
                    self.guest().queues[index].set_interrupts(*wanted);
                }
            }
            Step::Kick(queue) => {
                if let Some(index) = self.queue(*queue) {
                    self.sides[index].unkicked = 0;
                    self.guest().kick(index as u16);
                }
            }
            Step::TakeUsed(queue) => {
                if let Some(index) = self.queue(*queue) {
                    while self.take_used(index).is_some() {}
                }
            }
            Step::ReadConfig(offset, len) => {
                let mut data = vec![0xee; usize::from(len % 17)];
                let core = &self.guest().core;
                core.read_config(u64::from(*offset), &mut data);
                let ours = core.config_len().saturating_sub(usize::from(*offset));
                let past = data.get(ours..).unwrap_or_default();
                assert!(
                    past.iter().all(|byte| *byte == 0),
                    "past the end: {data:x?}"
                );
            }
            Step::WriteConfig(offset, data) => {
                self.guest().core.write_config(u64::from(*offset), data);
            }
            Step::Generation => {
                self.guest().core.config_generation();
            }
            Step::Registers(select, value) => self.write_registers(*select, *value),
            Step::Status(value) if *value != 0 => {
                self.guest().write_status(*value);
                // It may have started, which ends a pause.
                self.paused &= !self.guest().core.is_active();
            }
            Step::Status(_) => {}
            Step::Pause => self.pause(),
            Step::Resume => self.resume(),
            Step::Move => {
                self.pause();
                let guest = self.guest.take().expect("it does not move yet");
                self.guest = Some(guest.moved_to(|| self.subject.device()));
                self.paused = true;
            }
            Step::Reset(start) => {
                self.reset();
                self.start(start);
            }
            Step::Event(event) => self.subject.event(event),
        }
        let status = self.guest().core.registers().status();
        assert!(
            !self.clean || status & status::NEEDS_RESET == 0,
            "NEEDS_RESET, and the driver did nothing wrong"
        );
    }

    /// One of the device's queues.
    fn queue(&self, choice: u8) -> Option<usize> {
        usize::from(choice).checked_rem(self.sides.len())
    }

    fn write_registers(&mut self, select: u16, value: u32) {
        let core = &mut self.guest().core;
        let running = core.registers().is_running();
        if !running {
            // What a driver does meanwhile is for `start` to try.
            return;
        }
        let registers = core.registers_mut();
        registers.select_queue(select);
        let before = (
            registers.queue_size(),
            registers.queue_ready(),
            registers.features(),
        );
        registers.write_queue_size(value as u16);
        registers.write_queue_ready(value & 1 != 0);
        registers.write_queue_address(QueueAddress::Used, Half::Low, value);
        registers.select_driver_features(value & 3);
        registers.write_driver_features(value);
        let after = (
            registers.queue_size(),
            registers.queue_ready(),
            registers.features(),
        );
        assert_eq!(before, after, "registers change while the device runs");
    }

    /// Takes a buffer of `len` bytes, 16 bytes from the others.
    fn room(&mut self, len: usize) -> Option<u64> {
        let address = self.next_buffer;
        let end = address.checked_add(len as u64)?.checked_add(16)?;
        (end <= ARENA_END).then(|| {
            self.next_buffer = end.next_multiple_of(4);
            address
        })
    }

    /// The driver writes its memory.
    fn write(&mut self, address: u64, bytes: &[u8]) {
        let start = (address - ARENA) as usize;
        self.shadow[start..start + bytes.len()].copy_from_slice(bytes);
        let memory = self.guest().memory.clone();
        memory
            .write_slice(bytes, GuestAddress(address))
            .expect("the arena is memory");
    }

    /// The buffers of `ask`, where its answer will be, and its queue.
    fn buffers(&mut self, ask: &S::Ask, framing: Framing) -> Option<(usize, Vec<Descriptor>, u64)> {
        let (queue, request) = self.subject.request(ask);
        let queue = usize::from(queue);
        self.sides.get(queue)?;
        let asked = self.room(request.readable.len())?;
        let answer = self.room(request.writable as usize)?;
        self.write(asked, &request.readable);
        let readable = u32::try_from(request.readable.len()).ok()?;
        let piece = u32::from(framing.piece).max((readable + request.writable) / 20 + 1);
        let cut = |address: u64, len: u32, make: fn(u64, u32) -> Descriptor| {
            (0..len)
                .step_by(piece as usize)
                .map(move |offset| make(address + u64::from(offset), piece.min(len - offset)))
        };
        let buffers = cut(asked, readable, Descriptor::readable)
            .chain(cut(answer, request.writable, Descriptor::writable))
            .collect();
        Some((queue, buffers, answer))
    }

    /// Offers a request with nothing wrong. Its queue and head.
    fn offer(&mut self, ask: &S::Ask, framing: Framing) -> Option<(usize, u16)> {
        let (queue, buffers, answer) = self.buffers(ask, framing)?;
        let head = self.offer_buffers(queue, buffers, framing.indirect, answer)?;
        Some((queue, head))
    }

    fn offer_broken(&mut self, ask: &S::Ask, framing: Framing, damage: &[(u8, Damage)]) {
        let Some((queue, mut buffers, answer)) = self.buffers(ask, framing) else {
            return;
        };
        let mut hostile = Vec::new();
        for (place, damage) in damage {
            let Some(place) = usize::from(*place).checked_rem(buffers.len()) else {
                break;
            };
            let buffer = &mut buffers[place];
            match *damage {
                Damage::Address(to) => buffer.address = to.address(),
                Damage::Len(len) => buffer.len = len,
                Damage::Longer(by) => buffer.len = buffer.len.saturating_add(by.into()),
                Damage::Flags(flags) => hostile.push((place, flags, 0)),
                Damage::Next(next) => hostile.push((place, NEXT, next)),
                Damage::Direction => buffer.flags ^= WRITE,
                Damage::Gone => drop(buffers.remove(place)),
            }
        }
        self.offer_linked(queue, buffers, framing.indirect, answer, &hostile);
    }

    fn offer_hostile(&mut self, queue: u8, indirect: bool, hostile: &[Hostile]) {
        let Some(queue) = self.queue(queue) else {
            return;
        };
        let mut buffers = Vec::new();
        let mut links = Vec::new();
        for (place, hostile) in hostile.iter().enumerate() {
            buffers.push(Descriptor {
                address: hostile.place.address(),
                len: match hostile.len {
                    Length::Some(len) => len.into(),
                    Length::Any(len) => len,
                },
                flags: u16::from(hostile.flags) & (WRITE | INDIRECT),
                next: 0,
            });
            if let Some(next) = hostile.next {
                links.push((place, NEXT, next));
            }
        }
        self.offer_linked(queue, buffers, indirect, ARENA, &links);
    }

    fn offer_linked(
        &mut self,
        queue: usize,
        buffers: Vec<Descriptor>,
        indirect: bool,
        answer: u64,
        links: &[(usize, u16, u16)],
    ) {
        self.clean = false;
        self.loose |= !links.is_empty();
        let Some((head, written)) = self.link(queue, &buffers, indirect, links) else {
            return;
        };
        let room = links.is_empty().then(|| written_room(&buffers));
        self.put(queue, head, written, room, answer);
    }

    fn offer_buffers(
        &mut self,
        queue: usize,
        buffers: Vec<Descriptor>,
        indirect: bool,
        answer: u64,
    ) -> Option<u16> {
        let (head, written) = self.link(queue, &buffers, indirect, &[])?;
        self.put(queue, head, written, Some(written_room(&buffers)), answer);
        Some(head)
    }

    /// Writes `buffers` into free descriptors, or into a table if that is wanted and was negotiated. `links` are flags and next of
    /// some of them. Gives the head, and which descriptors of the queue it takes.
    fn link(
        &mut self,
        queue: usize,
        buffers: &[Descriptor],
        indirect: bool,
        links: &[(usize, u16, u16)],
    ) -> Option<(u16, Vec<u16>)> {
        let may = self.guest().core.registers().features() & feature::INDIRECT_DESC != 0;
        let indirect = indirect && may;
        let free = &mut self.sides[queue].free;
        let needed = if indirect { 1 } else { buffers.len() };
        if buffers.is_empty() || buffers.len() > MOST_BUFFERS || free.len() < needed {
            return None;
        }
        let table = self.next_table;
        if indirect {
            let end = table + 16 * buffers.len() as u64;
            if end > RINGS {
                return None;
            }
            self.next_table = end;
        }
        let taken = free.split_off(free.len() - needed);
        // What follows may be read while it is written.
        self.wild |= self.loose && links.is_empty();
        let places: Vec<u16> = if indirect {
            (0..buffers.len() as u16).collect()
        } else {
            taken.clone()
        };
        for (place, buffer) in buffers.iter().enumerate() {
            let mut buffer = match places.get(place + 1) {
                Some(next) => buffer.with(NEXT, *next),
                None => *buffer,
            };
            for (_, flags, next) in links.iter().filter(|link| link.0 == place) {
                buffer = Descriptor {
                    flags: *flags | buffer.flags & (WRITE | INDIRECT),
                    next: *next,
                    ..buffer
                };
            }
            self.allow(&buffer);
            let queue = &self.guest().queues[queue];
            match indirect {
                true => queue.write_table(table, places[place], buffer),
                false => queue.write_descriptor(places[place], buffer),
            }
        }
        let head = taken[0];
        if indirect {
            let len = 16 * buffers.len() as u32;
            let whole = Descriptor {
                flags: INDIRECT,
                ..Descriptor::readable(table, len)
            };
            self.guest().queues[queue].write_descriptor(head, whole);
        }
        Some((head, taken))
    }

    /// Takes note of where `descriptor` lets the device write.
    fn allow(&mut self, descriptor: &Descriptor) {
        let Descriptor {
            address,
            len,
            flags,
            ..
        } = *descriptor;
        if flags & INDIRECT != 0 {
            // What is there says where the device may write; it can be anything.
            self.wild = true;
        }
        if flags & WRITE == 0 {
            return;
        }
        let end = address.saturating_add(len.into());
        // Rings and tables end well before the arena.
        self.wild |= address < ARENA && end > TABLES;
        for place in address.max(ARENA)..end.min(ARENA_END) {
            self.writable[(place - ARENA) as usize] = true;
        }
    }

    fn put(
        &mut self,
        queue: usize,
        head: u16,
        descriptors: Vec<u16>,
        room: Option<u64>,
        answer: u64,
    ) {
        let side = &mut self.sides[queue];
        side.unkicked = side.unkicked.wrapping_add(1);
        let offered = Offered {
            descriptors,
            room,
            answer,
        };
        let before = side.with_device.insert(head, offered);
        assert!(before.is_none(), "the head was free");
        self.guest().queues[queue].offer(head);
    }

    /// The next used chain of a queue: head, and what the device wrote.
    fn take_used(&mut self, queue: usize) -> Option<(u16, Vec<u8>)> {
        let wild = self.wild;
        let guest = self.guest.as_ref().expect("it does not move now");
        let (ring, side) = (&guest.queues[queue], &mut self.sides[queue]);
        ring.set_used_event(side.used);
        fence(Ordering::SeqCst);
        if side.free.is_empty() && side.with_device.is_empty()
            || ring.used_index() == side.used
            || wild
        {
            return None;
        }
        let element = ring.used_ring() + 4 + 8 * u64::from(side.used % ring.size());
        let [head, len] = guest
            .memory
            .read_obj::<[u32; 2]>(GuestAddress(element))
            .expect("the ring is memory")
            .map(u32::from_le);
        assert!(
            head < u32::from(ring.size()),
            "head {head} is used, which is none"
        );
        let head = head as u16;
        side.used = side.used.wrapping_add(1);
        ring.set_used_event(side.used);
        fence(Ordering::SeqCst);
        if !side.exact {
            // The same head may be there several times.
            return Some((head, Vec::new()));
        }
        let offered = side.with_device.remove(&head);
        let offered = offered
            .unwrap_or_else(|| panic!("chain {head} is used, but the device did not have it"));
        side.free.extend(offered.descriptors);
        let Some(room) = offered.room else {
            return Some((head, Vec::new()));
        };
        assert!(
            u64::from(len) <= room,
            "{len} bytes written where there is room for {room}"
        );
        let mut answer = vec![0; len as usize];
        let read = guest
            .memory
            .read_slice(&mut answer, GuestAddress(offered.answer));
        // Of a chain that is not a request it may not be there.
        Some((head, read.map_or(Vec::new(), |()| answer)))
    }

    fn ask(&mut self, ask: &S::Ask, framing: Framing) {
        for queue in 0..self.sides.len() {
            while self.take_used(queue).is_some() {}
        }
        let quiet = self.sides.iter().all(|side| side.with_device.is_empty());
        let Some((queue, head)) = self.offer(ask, framing) else {
            return;
        };
        let waits = quiet && self.subject.answers(ask) && self.must_answer(queue);
        let guest = self.guest();
        guest.queues[queue].set_interrupts(true);
        let unkicked = self.sides[queue].unkicked;
        let guest = self.guest();
        if guest.queues[queue].wants_kick(unkicked) {
            guest.kick(queue as u16);
        }
        self.sides[queue].unkicked = 0;
        if !waits {
            return;
        }
        let interrupt = self.guest().interrupt.clone();
        let (used, answer) = interrupt.wait_for("an answer", || self.take_used(queue));
        assert_eq!(used, head, "another chain is used");
        self.subject.check(ask, &answer);
    }

    /// Whether a request that was just offered in `queue` must be answered.
    fn must_answer(&mut self, queue: usize) -> bool {
        let core = &self.guest().core;
        let works = core.is_active() && core.registers().status() & status::NEEDS_RESET == 0;
        works && self.clean && self.sides[queue].exact
    }

    fn pause(&mut self) {
        self.guest().core.pause().expect("pausing the device");
        self.paused = true;
        self.settle();
    }

    fn settle(&mut self) {
        let used = self.used_indexes();
        self.subject.settled();
        for queue in 0..self.sides.len() {
            // Somebody has to be late for a device that goes on.
            self.guest().kick(queue as u16);
        }
        assert_eq!(self.used_indexes(), used, "a paused device uses chains");
        for (queue, used) in used.into_iter().enumerate() {
            let side = &self.sides[queue];
            let taken = used.wrapping_sub(side.used);
            if side.exact && !self.wild {
                assert!(
                    usize::from(taken) <= side.with_device.len(),
                    "used more than was offered"
                );
            }
        }
    }

    fn used_indexes(&mut self) -> Vec<u16> {
        self.guest()
            .queues
            .iter()
            .map(DriverQueue::used_index)
            .collect()
    }

    fn resume(&mut self) {
        // What fails is in the status.
        let _ = self.guest().core.resume();
        self.paused = false;
    }

    fn reset(&mut self) {
        self.guest().reset();
        self.settle();
        self.check_memory();
        let registers = self.guest().core.registers();
        assert_eq!((registers.status(), registers.features()), (0, 0));
    }

    /// Buffers and what is between them hold what the driver wrote, but where the device may write.
    fn check_memory(&mut self) {
        if self.wild {
            return;
        }
        let mut now = vec![0; ARENA_SIZE];
        let memory = self.guest().memory.clone();
        memory
            .read_slice(&mut now, GuestAddress(ARENA))
            .expect("the arena is memory");
        let places = now.iter().zip(&self.shadow).zip(&self.writable);
        if let Some(offset) = places
            .into_iter()
            .position(|((now, then), may)| now != then && !may)
        {
            panic!(
                "the device wrote to {:#x}, which no descriptor let it",
                ARENA + offset as u64
            );
        }
    }

    /// The last reset, after which the device works.
    fn finish(mut self) {
        for queue in 0..self.sides.len() {
            while self.take_used(queue).is_some() {}
        }
        self.reset();
        let guest = self.guest.as_mut().expect("it does not move now");
        guest.start(u64::MAX);
        self.subject.alive(guest);
    }
}

/// Bytes that a chain lets the device write.
fn written_room(buffers: &[Descriptor]) -> u64 {
    let writable = buffers.iter().filter(|buffer| buffer.flags & WRITE != 0);
    writable.map(|buffer| u64::from(buffer.len)).sum()
}
