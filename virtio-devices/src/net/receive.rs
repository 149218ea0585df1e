//! Packets to the driver (virtio 1.2 §5.1.6.3, §5.1.6.4): the kernel puts each straight into the driver's buffers, several of
//! them where the driver lets the device merge them.
//!
//! ```text
//!   pop as many chains as a packet is likely to need ──> read a packet ──> use those that it fills, together ──┐
//!        ^                                                   │   └─ none: put the others back                  │
//!        │                                                 v                                                 │
//!        │                      it is longer than all there are: kept aside until there is room              │
//!        └───────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Where packets come without a break, and each is likely to fit in one buffer, many are read in one system call, a buffer each. What does not
//! go as expected there, such as a longer one, is put aside together with all that came after it, and its buffers are put back.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io::ErrorKind;

use block_util::LimiterTimer;
use log::debug;
use net_util::{MAX_PACKET_LEN, ReceiveBatch, VNET_HEADER_LEN};
use vm_memory::GuestMemory;
use vm_memory::bitmap::Bitmap;
use vm_virtio::{Chain, DeviceQueue, Fault, QueueError, VirtioInterrupt};

use super::backend::PacketQueue;
use super::config::{Facts, GUEST_CSUM, MRG_RXBUF};
use crate::pieces::{MOST, Pieces};

/// Packets before it is the turn of others.
const TURN: usize = 256;

/// The most packets that are read together.
const BURST: usize = 32;

/// Where `num_buffers` is in the header (§5.1.6).
const NUM_BUFFERS: usize = 10;

/// Pieces of memory after which no further chain is taken; there is room for those of one more.
const ENOUGH_PIECES: usize = MOST / 2;

/// Room that there is for a packet at least, where the driver gives it, even if those before were shorter.
const LEAST_ROOM: usize = 4096;

/// Why receiving has stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Progress {
    /// No packet waits.
    Empty,
    /// There may be more, after the others had their turn.
    TurnOver,
    /// The driver gives no buffers; it will notify of new ones.
    Starved,
    /// As many came as are allowed; a timer tells when more are.
    Limited,
    /// The host's end has failed.
    Failed,
}

/// A chain that was popped and is not used yet.
struct Held {
    chain: Chain,
    pieces: usize,
    room: usize,
}

/// What reading many packets together takes.
struct Burst {
    batch: ReceiveBatch,
    /// What of each packet goes past its buffer, [`MAX_PACKET_LEN`] bytes for each. Where nothing does, the kernel has given it no memory.
    past: Box<[u8]>,
    /// A buffer, and memory past it, for each.
    places: Pieces,
    /// Where those of each end.
    ends: Vec<usize>,
    results: Vec<Result<usize, ErrorKind>>,
}

impl Burst {
    /// None where the kernel can't.
    fn new() -> Option<Self> {
        let batch = ReceiveBatch::new()
            .inspect_err(|e| debug!("packets are received one by one: {e}"))
            .ok()?;
        Some(Self {
            batch,
            past: vec![0; BURST * MAX_PACKET_LEN].into(),
            places: Pieces::default(),
            ends: Vec::with_capacity(BURST),
            results: Vec::with_capacity(BURST),
        })
    }
}

/// What one queue needs to receive.
pub(super) struct Receiver {
    mergeable: bool,
    /// The driver understands the flags of checksums.
    checksums: bool,
    /// The longest packet that may come, with its header.
    longest: usize,
    /// Room that there is to be for a packet: popping chains for the longest is work lost where those that come are short.
    expected: usize,
    /// The longest packet since that was chosen.
    seen: usize,
    held: VecDeque<Held>,
    spare: Vec<Chain>,
    /// Of all that are held, in order.
    pieces: Pieces,
    /// Bytes of them.
    room: usize,
    /// Those of one packet.
    used: Vec<(u16, u32)>,
    /// What of a packet goes past all buffers; then all of it.
    aside: Box<[u8]>,
    /// There is a packet aside of so many bytes.
    waiting: Option<usize>,
    /// Packets that came after it, and wait, too.
    behind: VecDeque<Vec<u8>>,
    burst: Option<Burst>,
    /// Packets that came since there was none.
    streak: usize,
    limit: Option<LimiterTimer>,
}

impl Receiver {
    /// From `end`, as fast as `limit` allows. `waiting` are packets that waited for buffers when the device was stopped.
    pub fn new(
        end: Option<&dyn PacketQueue>,
        facts: &Facts,
        features: u64,
        waiting: impl Iterator<Item = Vec<u8>>,
        limit: Option<LimiterTimer>,
    ) -> Self {
        let mergeable = features & MRG_RXBUF != 0;
        // With a limit each packet is asked for by itself; without merging none could wait for more buffers.
        let burst = end
            .filter(|end| mergeable && limit.is_none() && end.takes_batches())
            .and_then(|_| Burst::new());
        Self {
            mergeable,
            checksums: features & GUEST_CSUM != 0,
            longest: facts.longest_packet(features),
            expected: 0,
            seen: 0,
            held: VecDeque::new(),
            spare: Vec::new(),
            pieces: Pieces::default(),
            room: 0,
            used: Vec::new(),
            aside: vec![0; MAX_PACKET_LEN].into(),
            waiting: None,
            behind: waiting.collect(),
            burst,
            streak: 0,
            limit,
        }
    }

    /// What tells that the limit allows more.
    pub fn limit(&self) -> Option<&LimiterTimer> {
        self.limit.as_ref()
    }

    /// It told.
    pub fn limit_passed(&mut self) {
        if let Some(Err(error)) = self.limit.as_mut().map(LimiterTimer::on_timer) {
            debug!("the timer of a rate limiter: {error}");
        }
    }

    /// The packets that wait for buffers, in their order.
    pub fn waiting(&self) -> impl Iterator<Item = &[u8]> {
        let first = self.waiting.and_then(|len| self.aside.get(..len));
        first
            .into_iter()
            .chain(self.behind.iter().map(Vec::as_slice))
    }

    /// Receives what waits. Nothing stays popped.
    pub fn receive<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<Progress, QueueError> {
        let progress = self.turn(queue, memory, end);
        self.put_back(queue);
        // Packets before a fault are complete.
        queue.signal(memory, interrupt)?;
        progress
    }

    /// Puts what is held back into the queue.
    fn put_back(&mut self, queue: &mut DeviceQueue) {
        while let Some(held) = self.held.pop_back() {
            queue.undo_pop();
            self.spare.push(held.chain);
        }
        self.pieces.clear();
        self.room = 0;
    }

    fn turn<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
    ) -> Result<Progress, QueueError> {
        queue.disable_notification(memory)?;
        // Falls slowly, rises at once.
        self.expected = (self.expected / 2)
            .max(2 * self.seen)
            .clamp(LEAST_ROOM.min(self.longest), self.longest);
        let before = std::mem::take(&mut self.seen);
        let mut left = TURN;
        while left > 0 {
            left -= 1;
            if self.limit.as_ref().is_some_and(LimiterTimer::is_waiting) {
                return Ok(Progress::Limited);
            }
            if self.waiting.is_none()
                && let Some(packet) = self.behind.pop_front()
            {
                self.wait(&packet);
            }
            let width = self.width(left + 1);
            if width > 1 && self.gather_burst(queue, memory, width, before)? {
                left = left.saturating_sub(self.held.len().min(BURST) - 1);
                if let Some(progress) = self.read_burst(queue, memory, end)? {
                    return Ok(progress);
                }
                continue;
            }
            let wanted = self.waiting.unwrap_or(self.expected);
            self.gather(queue, memory, wanted)?;
            let enough = match self.waiting {
                Some(len) => self.room >= len,
                None => !self.held.is_empty(),
            };
            if !enough {
                if self.is_hopeless(queue) {
                    debug!("a packet is longer than all of a queue's buffers, and dropped");
                    self.waiting = None;
                } else if queue.enable_notification(memory)? {
                    queue.disable_notification(memory)?;
                } else {
                    return Ok(Progress::Starved);
                }
                continue;
            }
            if let Some(len) = self.waiting.take() {
                self.put(memory, len).map_err(|fault| queue.error(fault))?;
                self.finish(queue, memory, len)?;
                continue;
            }
            match self.read(end) {
                Ok(0) => return Ok(Progress::Failed),
                Ok(len) if len < VNET_HEADER_LEN => debug!("a packet without a header is dropped"),
                Ok(len) if len <= self.room => {
                    self.streak += 1;
                    self.finish(queue, memory, len)?;
                }
                Ok(len) => {
                    let put_aside = self.set_aside(memory);
                    put_aside.map_err(|fault| queue.error(fault))?;
                    if self.mergeable {
                        self.waiting = Some(len);
                        self.expected = self.longest;
                    } else {
                        // §5.1.6.3.1 has the driver give buffers that are long enough.
                        debug!("a packet is longer than the driver's buffer, and dropped");
                    }
                }
                Err(ErrorKind::WouldBlock) => {
                    self.streak = 0;
                    return Ok(Progress::Empty);
                }
                Err(ErrorKind::Interrupted) => {}
                Err(error) => {
                    debug!("receiving packets: {error}");
                    return Ok(Progress::Failed);
                }
            }
        }
        Ok(Progress::TurnOver)
    }

    /// How many packets to read together: what finds none costs something as well, so half as many as came without a break.
    fn width(&self, most: usize) -> usize {
        if self.burst.is_none() || self.waiting.is_some() {
            return 1;
        }
        (self.streak / 2).min(BURST).min(most)
    }

    /// Holds `width` chains, or as many as there are. False if packets as long as those of late, `before` this turn and in it, would not fit
    /// in one; or if there is no second.
    fn gather_burst<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        width: usize,
        before: usize,
    ) -> Result<bool, QueueError> {
        let recent = self.seen.max(before);
        while self.held.len() < width && self.pieces.len() < ENOUGH_PIECES {
            let held = self.room;
            self.gather(queue, memory, held + 1)?;
            if self.room == held {
                break;
            }
            if self.held.back().is_some_and(|last| last.room < recent) {
                return Ok(false);
            }
        }
        Ok(self.held.len() > 1 && self.held.iter().all(|held| held.room >= recent))
    }

    /// Reads a packet into each chain that is held. None if there may be more; nothing is held then.
    fn read_burst<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
    ) -> Result<Option<Progress>, QueueError> {
        let Some(mut burst) = self.burst.take() else {
            return Ok(None);
        };
        let read = self.read_places(&mut burst, end);
        let took = self.take_results(&burst, queue, memory);
        self.put_back(queue);
        if read {
            self.burst = Some(burst);
        }
        took
    }

    /// False if the kernel could not do that; nothing was read then.
    fn read_places(&self, burst: &mut Burst, end: &dyn PacketQueue) -> bool {
        burst.places.clear();
        burst.ends.clear();
        burst.results.clear();
        let mut start = 0;
        for (held, past) in self.held.iter().zip(burst.past.chunks_mut(MAX_PACKET_LEN)) {
            let own = self.pieces.as_slice().get(start..start + held.pieces);
            start += held.pieces;
            burst.places.copy(own.unwrap_or_default());
            burst.places.push_own(past);
            burst.ends.push(burst.places.len());
        }
        let mut start = 0;
        let places = burst.ends.iter().map(|end| {
            let place = burst.places.as_slice().get(start..*end);
            start = *end;
            place.unwrap_or_default()
        });
        let results = &mut burst.results;
        // SAFETY: the pieces were found in guest memory during this turn, whose mapping the caller of it borrows; nobody makes
        // references to them. Those past them are memory of our own, to which there is no other reference. No two overlap, unless the
        // driver gave the same memory twice, which is the kernel's to write twice.
        let read = unsafe {
            burst.batch.read_packets(end.as_raw_fd(), places, |result| {
                results.push(result.map_err(|error| error.kind()));
            })
        };
        read.inspect_err(|e| debug!("packets are received one by one from now on: {e}"))
            .is_ok()
    }

    /// Gives the driver the packets that were read, up to the first for which there is more to do than that.
    fn take_results<M: GuestMemory>(
        &mut self,
        burst: &Burst,
        queue: &mut DeviceQueue,
        memory: &M,
    ) -> Result<Option<Progress>, QueueError> {
        let mut stopped = None;
        let mut fault = None;
        let mut straight = true;
        let mut given = 0;
        self.used.clear();
        for (number, (result, past)) in burst
            .results
            .iter()
            .zip(burst.past.chunks(MAX_PACKET_LEN))
            .enumerate()
        {
            let Some(held) = self.held.get(number) else {
                break;
            };
            match *result {
                Ok(0) => stopped = Some(Progress::Failed),
                Ok(len) if len < VNET_HEADER_LEN => debug!("a packet without a header is dropped"),
                Ok(len) if straight && len <= held.room => {
                    let complete = mark(held, memory, len)
                        .and_then(|()| complete_header(held, memory, self.checksums, 1));
                    if let Err(wrong) = complete {
                        fault = Some(wrong);
                        break;
                    }
                    self.used.push((held.chain.head(), len as u32));
                    self.seen = self.seen.max(len);
                    given += 1;
                    continue;
                }
                Ok(len) => match taken_out(held, memory, len, past) {
                    Ok(packet) => {
                        self.behind.push_back(packet);
                        self.seen = self.seen.max(len);
                    }
                    Err(wrong) => {
                        fault = Some(wrong);
                        break;
                    }
                },
                Err(ErrorKind::WouldBlock) => stopped = stopped.or(Some(Progress::Empty)),
                Err(ErrorKind::Interrupted) => {}
                Err(error) => {
                    debug!("receiving packets: {error}");
                    stopped = Some(Progress::Failed);
                }
            }
            // The buffers of this one go back, and those after it must, too.
            straight = false;
        }
        queue.add_used_together(memory, &self.used)?;
        self.streak += given;
        for held in self.held.drain(..given) {
            self.spare.push(held.chain);
        }
        if let Some(fault) = fault {
            return Err(queue.error(fault));
        }
        if stopped == Some(Progress::Empty) {
            self.streak = 0;
            if !self.behind.is_empty() {
                stopped = None;
            }
        }
        Ok(stopped)
    }

    /// Puts a packet aside, where there is none.
    fn wait(&mut self, packet: &[u8]) {
        for (to, from) in self.aside.iter_mut().zip(packet) {
            *to = *from;
        }
        self.waiting = Some(packet.len().min(self.aside.len()));
    }

    /// Pops chains until there is room for `wanted` bytes, if there are as many.
    fn gather<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        wanted: usize,
    ) -> Result<(), QueueError> {
        while self.room < wanted
            && self.pieces.len() < ENOUGH_PIECES
            && (self.mergeable || self.held.is_empty())
        {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(memory, &mut chain)? {
                self.spare.push(chain);
                break;
            }
            self.hold(memory, chain).map_err(|fault| {
                queue.undo_pop();
                queue.error(fault)
            })?;
        }
        Ok(())
    }

    fn hold<M: GuestMemory>(&mut self, memory: &M, chain: Chain) -> Result<(), Fault> {
        let room = chain.writable_len() as usize;
        if room < VNET_HEADER_LEN {
            return Err(Fault::Short {
                wanted: VNET_HEADER_LEN,
                left: room,
            });
        }
        let before = self.pieces.len();
        chain.writer(memory).slices(room, |slice| {
            // One is for what goes past all buffers.
            if self.pieces.len() + 1 >= MOST {
                return Err(Fault::Request("a buffer for packets is in too many pieces"));
            }
            self.pieces.push(&slice);
            Ok(())
        })?;
        self.room += room;
        self.held.push_back(Held {
            pieces: self.pieces.len() - before,
            chain,
            room,
        });
        Ok(())
    }

    /// The packet aside does not fit in as many buffers as the driver can give.
    fn is_hopeless(&self, queue: &DeviceQueue) -> bool {
        let buffers = |held: &Held| held.chain.readable().len() + held.chain.writable().len();
        let given: usize = self.held.iter().map(buffers).sum();
        self.waiting.is_some()
            && (given >= usize::from(queue.size()) || self.pieces.len() >= ENOUGH_PIECES)
    }

    /// Reads a packet into all that is held, and past it aside.
    fn read(&mut self, end: &dyn PacketQueue) -> Result<usize, ErrorKind> {
        let start = self.room.min(self.aside.len());
        let (_, past) = self.aside.split_at_mut(start);
        self.pieces.push_own(past);
        // SAFETY: the pieces were found in guest memory during this turn, whose mapping the caller of it borrows; nobody makes
        // references to them. The last is memory of our own, to which there is no other reference.
        let read = unsafe { end.read_packet(self.pieces.as_slice()) };
        self.pieces.pop();
        read.map_err(|error| error.kind())
    }

    /// Takes the part of a packet that went into buffers out of them: they are not used.
    fn set_aside<M: GuestMemory>(&mut self, memory: &M) -> Result<(), Fault> {
        let mut aside = &mut *self.aside;
        for held in &self.held {
            held.chain.writer(memory).slices(held.room, |slice| {
                slice.bitmap().mark_dirty(0, slice.len());
                let (part, rest) = std::mem::take(&mut aside).split_at_mut(slice.len());
                slice.copy_to(part);
                aside = rest;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Puts the packet of `len` bytes that is aside into what is held.
    fn put<M: GuestMemory>(&mut self, memory: &M, len: usize) -> Result<(), Fault> {
        let mut rest = self.aside.get(..len).unwrap_or_default();
        for held in &self.held {
            let (part, later) = rest.split_at(held.room.min(rest.len()));
            held.chain.writer(memory).write(part)?;
            rest = later;
        }
        Ok(())
    }

    /// Gives the driver the packet of `len` bytes that is in what is held.
    fn finish<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        len: usize,
    ) -> Result<(), QueueError> {
        if let Some(limit) = &mut self.limit {
            limit.charge(len as u64).map_err(|error| {
                debug!("the timer of a rate limiter: {error}");
                queue.error(Fault::Request("the timer of the limit cannot be set"))
            })?;
        }
        self.seen = self.seen.max(len);
        self.used.clear();
        let mut left = len;
        let (mut pieces, mut room) = (0, 0);
        for held in &self.held {
            if left == 0 {
                break;
            }
            let part = left.min(held.room);
            mark(held, memory, part).map_err(|fault| queue.error(fault))?;
            self.used.push((held.chain.head(), part as u32));
            left -= part;
            pieces += held.pieces;
            room += held.room;
        }
        if let Some(first) = self.held.front() {
            // No more than are held, which are no more than the queue has entries.
            let count = self.used.len() as u16;
            complete_header(first, memory, self.checksums, count)
                .map_err(|fault| queue.error(fault))?;
        }
        queue.add_used_together(memory, &self.used)?;
        for held in self.held.drain(..self.used.len().min(self.held.len())) {
            self.spare.push(held.chain);
        }
        self.pieces.remove_first(pieces);
        self.room -= room;
        Ok(())
    }
}

/// Says that the kernel wrote the first `len` bytes of a chain, through pointers, which told nobody.
fn mark<M: GuestMemory>(held: &Held, memory: &M, len: usize) -> Result<(), Fault> {
    held.chain.writer(memory).slices(len, |slice| {
        slice.bitmap().mark_dirty(0, slice.len());
        Ok(())
    })
}

/// Of the header, what the kernel does not know (§5.1.6.4.1).
fn complete_header<M: GuestMemory>(
    first: &Held,
    memory: &M,
    checksums: bool,
    count: u16,
) -> Result<(), Fault> {
    let mut writer = first.chain.writer(memory);
    if checksums {
        writer.skip(NUM_BUFFERS)?;
    } else {
        writer.write(&[0])?;
        writer.skip(NUM_BUFFERS - 1)?;
    }
    writer.write(&count.to_le_bytes())
}

/// A packet of `len` bytes, of which those that do not fit in its chain are in `past`.
fn taken_out<M: GuestMemory>(
    held: &Held,
    memory: &M,
    len: usize,
    past: &[u8],
) -> Result<Vec<u8>, Fault> {
    let mut packet = Vec::with_capacity(len);
    held.chain
        .writer(memory)
        .slices(len.min(held.room), |slice| {
            slice.bitmap().mark_dirty(0, slice.len());
            let start = packet.len();
            packet.resize(start + slice.len(), 0);
            slice.copy_to(packet.get_mut(start..).unwrap_or_default());
            Ok(())
        })?;
    let rest = past.get(..len - packet.len().min(len));
    packet.extend_from_slice(rest.unwrap_or_default());
    Ok(packet)
}
