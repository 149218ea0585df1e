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
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io::ErrorKind;

use block_util::LimiterTimer;
use log::debug;
use net_util::{MAX_PACKET_LEN, VNET_HEADER_LEN};
use vm_memory::GuestMemory;
use vm_memory::bitmap::Bitmap;
use vm_virtio::{Chain, DeviceQueue, Fault, QueueError, VirtioInterrupt};

use super::backend::PacketQueue;
use super::config::{Facts, GUEST_CSUM, MRG_RXBUF};
use crate::pieces::{MOST, Pieces};

/// Packets before it is the turn of others.
const TURN: usize = 64;

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
    /// The driver may think that notifications are wanted.
    notified: bool,
    limit: Option<LimiterTimer>,
}

impl Receiver {
    /// `waiting` is a packet that waited for buffers when the device was stopped.
    pub fn new(
        facts: &Facts,
        features: u64,
        waiting: Option<&[u8]>,
        limit: Option<LimiterTimer>,
    ) -> Self {
        let mut aside = vec![0; MAX_PACKET_LEN];
        for (to, from) in aside.iter_mut().zip(waiting.unwrap_or_default()) {
            *to = *from;
        }
        Self {
            mergeable: features & MRG_RXBUF != 0,
            checksums: features & GUEST_CSUM != 0,
            longest: facts.longest_packet(features),
            expected: 0,
            seen: 0,
            held: VecDeque::new(),
            spare: Vec::new(),
            pieces: Pieces::default(),
            room: 0,
            used: Vec::new(),
            aside: aside.into(),
            waiting: waiting.map(<[u8]>::len),
            notified: true,
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

    /// The packet that waits for buffers.
    pub fn waiting(&self) -> Option<&[u8]> {
        self.aside.get(..self.waiting?)
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
        while let Some(held) = self.held.pop_back() {
            queue.undo_pop();
            self.spare.push(held.chain);
        }
        self.pieces.clear();
        self.room = 0;
        // Packets before a fault are complete.
        queue.signal(memory, interrupt)?;
        progress
    }

    fn turn<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
    ) -> Result<Progress, QueueError> {
        if std::mem::take(&mut self.notified) {
            queue.disable_notification(memory)?;
        }
        // Falls slowly, rises at once.
        self.expected = (self.expected / 2)
            .max(2 * self.seen)
            .clamp(LEAST_ROOM.min(self.longest), self.longest);
        self.seen = 0;
        for _ in 0..TURN {
            if self.limit.as_ref().is_some_and(LimiterTimer::is_waiting) {
                return Ok(Progress::Limited);
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
                    self.notified = true;
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
                Ok(len) if len <= self.room => self.finish(queue, memory, len)?,
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
                Err(ErrorKind::WouldBlock) => return Ok(Progress::Empty),
                Err(ErrorKind::Interrupted) => {}
                Err(error) => {
                    debug!("receiving packets: {error}");
                    return Ok(Progress::Failed);
                }
            }
        }
        Ok(Progress::TurnOver)
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
            // The kernel wrote through pointers, which told nobody.
            let marked = held.chain.writer(memory).slices(part, |slice| {
                slice.bitmap().mark_dirty(0, slice.len());
                Ok(())
            });
            marked.map_err(|fault| queue.error(fault))?;
            self.used.push((held.chain.head(), part as u32));
            left -= part;
            pieces += held.pieces;
            room += held.room;
        }
        self.complete_header(memory)
            .map_err(|fault| queue.error(fault))?;
        queue.add_used_together(memory, &self.used)?;
        for held in self.held.drain(..self.used.len().min(self.held.len())) {
            self.spare.push(held.chain);
        }
        self.pieces.remove_first(pieces);
        self.room -= room;
        Ok(())
    }

    /// Of the header, what the kernel does not know (§5.1.6.4.1).
    fn complete_header<M: GuestMemory>(&self, memory: &M) -> Result<(), Fault> {
        let Some(first) = self.held.front() else {
            return Ok(());
        };
        let mut writer = first.chain.writer(memory);
        if self.checksums {
            writer.skip(NUM_BUFFERS)?;
        } else {
            writer.write(&[0])?;
            writer.skip(NUM_BUFFERS - 1)?;
        }
        // No more than are held, which are no more than the queue has entries.
        writer.write(&(self.used.len() as u16).to_le_bytes())
    }
}
