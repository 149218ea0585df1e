//! Packets from the driver (virtio 1.2 §5.1.6.2): the kernel takes each straight from the driver's buffers, many in one system call
//! where the host's end allows that. When it takes no more, they stay in the queue.
#![allow(unsafe_code)]

use std::io::{self, ErrorKind};

use block_util::LimiterTimer;
use log::debug;
use net_util::{MAX_BATCH, MAX_PACKET_LEN, SendBatch, VNET_HEADER_LEN};
use vm_memory::GuestMemory;
use vm_virtio::{Chain, Context, DeviceQueue, Fault, QueueError};

use super::backend::PacketQueue;
use crate::pieces::{MOST, Pieces};

/// Packets before it is the turn of others.
const TURN: usize = 256;

/// A chain that was popped and is not used yet.
#[derive(Clone, Copy)]
struct Packet {
    head: u16,
    /// Where its pieces end among those of all; it has none if it cannot be sent.
    end: usize,
    len: usize,
}

/// What one queue needs to transmit.
pub(super) struct Transmitter {
    /// The host's end takes nothing until it says otherwise.
    pub blocked: bool,
    limit: Option<LimiterTimer>,
    batch: Option<SendBatch>,
    chain: Chain,
    pieces: Pieces,
    packets: Vec<Packet>,
    /// Those that go back, with the bytes written to each.
    used: Vec<(u16, u32)>,
}

impl Transmitter {
    /// For `end`, as fast as `limit` allows.
    pub fn new(end: Option<&dyn PacketQueue>, limit: Option<LimiterTimer>) -> Self {
        let batch = end.filter(|end| end.takes_batches()).and_then(|_| {
            SendBatch::new()
                .inspect_err(|e| debug!("packets are sent one by one: {e}"))
                .ok()
        });
        Self {
            blocked: false,
            limit,
            batch,
            chain: Chain::new(),
            pieces: Pieces::default(),
            packets: Vec::with_capacity(MAX_BATCH),
            used: Vec::with_capacity(MAX_BATCH),
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

    /// Sends what the driver gave, as far as the host's end takes it and the limit allows.
    pub fn transmit<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        if self.blocked || self.is_limited() {
            return Ok(());
        }
        let turn = self.turn(queue, memory, end);
        // Packets before a fault are complete.
        queue.signal(memory, context.interrupt())?;
        if turn? {
            context.again(queue.index());
        }
        Ok(())
    }

    /// True if there may be more, after the others had their turn.
    fn turn<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
    ) -> Result<bool, QueueError> {
        queue.disable_notification(memory)?;
        let mut left = TURN;
        while left > 0 {
            let gathered = self.gather(queue, memory, left.min(self.most()));
            left = left.saturating_sub(self.packets.len().max(1));
            let none = self.packets.is_empty();
            self.send(queue, memory, end)?;
            gathered?;
            if self.blocked || self.is_limited() {
                return Ok(false);
            }
            if none {
                if !queue.enable_notification(memory)? {
                    return Ok(false);
                }
                queue.disable_notification(memory)?;
            }
        }
        Ok(true)
    }

    fn is_limited(&self) -> bool {
        self.limit.as_ref().is_some_and(LimiterTimer::is_waiting)
    }

    /// Packets that are sent together. With a limit each is asked for by itself.
    fn most(&self) -> usize {
        if self.batch.is_some() && self.limit.is_none() {
            MAX_BATCH
        } else {
            1
        }
    }

    /// Pops up to `most` packets.
    fn gather<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        most: usize,
    ) -> Result<(), QueueError> {
        self.packets.clear();
        self.pieces.clear();
        while self.packets.len() < most && queue.pop(memory, &mut self.chain)? {
            let start = self.pieces.len();
            if let Err(fault) = self.take(memory) {
                self.pieces.truncate(start);
                queue.undo_pop();
                return Err(queue.error(fault));
            }
        }
        Ok(())
    }

    /// Adds the packet in `chain`.
    fn take<M: GuestMemory>(&mut self, memory: &M) -> Result<(), Fault> {
        let len = self.chain.readable_len() as usize;
        if len < VNET_HEADER_LEN {
            return Err(Fault::Short {
                wanted: VNET_HEADER_LEN,
                left: len,
            });
        }
        let start = self.pieces.len();
        if len <= MAX_PACKET_LEN {
            self.chain.reader(memory).slices(len, |slice| {
                // One more than there may be shows that there are too many.
                if self.pieces.len() - start <= MOST {
                    self.pieces.push(&slice);
                }
                Ok(())
            })?;
        } else {
            debug!("a packet of {len} bytes is too long to be sent");
        }
        if self.pieces.len() - start > MOST {
            debug!("a packet in more than {MOST} pieces cannot be sent");
            self.pieces.truncate(start);
        }
        self.packets.push(Packet {
            head: self.chain.head(),
            end: self.pieces.len(),
            len,
        });
        Ok(())
    }

    /// Sends what was gathered and gives the driver its chains back.
    fn send<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
    ) -> Result<(), QueueError> {
        match (&*self.packets, &mut self.batch) {
            ([_, _, ..], Some(batch)) => {
                let pieces = self.pieces.as_slice();
                let packets = split(&self.packets, pieces).filter(|packet| !packet.is_empty());
                // SAFETY: the pieces were found in guest memory just now, whose mapping the caller borrows; nobody makes references
                // to them. The end does not block.
                let sent = unsafe { batch.write_packets(end.as_raw_fd(), packets, lost) };
                if let Err(error) = sent {
                    debug!("packets are sent one by one from now on: {error}");
                    self.batch = None;
                }
            }
            ([packet], _) => {
                let packet = *packet;
                if packet.end > 0 {
                    // SAFETY: as above.
                    let sent = unsafe { end.write_packet(self.pieces.as_slice()) };
                    if matches!(&sent, Err(e) if waits(e)) {
                        self.blocked = true;
                        queue.undo_pop();
                        return Ok(());
                    }
                    lost(sent);
                }
                if let Some(limit) = &mut self.limit {
                    limit.charge(packet.len as u64).map_err(|error| {
                        debug!("the timer of a rate limiter: {error}");
                        queue.error(Fault::Request("the timer of the limit cannot be set"))
                    })?;
                }
            }
            // Without a batch they come one by one.
            _ => {}
        }
        self.used.clear();
        self.used
            .extend(self.packets.iter().map(|packet| (packet.head, 0)));
        queue.add_used_together(memory, &self.used)
    }
}

/// The pieces of each packet.
fn split<'a>(
    packets: &'a [Packet],
    pieces: &'a [libc::iovec],
) -> impl Iterator<Item = &'a [libc::iovec]> {
    let mut start = 0;
    packets.iter().map(move |packet| {
        let own = pieces.get(start..packet.end).unwrap_or_default();
        start = packet.end;
        own
    })
}

fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Says so of a packet that could not be sent.
fn lost(sent: io::Result<usize>) {
    if let Err(error) = sent {
        debug!("a packet is not sent: {error}");
    }
}
