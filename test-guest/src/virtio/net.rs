//! Network device (virtio 1.2 §5.1): pairs of queues and the control queue, buffers for packets that the device may merge.

use super::queue::{Queue, Segment};
use super::{Transport, wait_for};
use crate::dma;
use crate::map::{read, write};
use crate::number;
use crate::outcome::{Outcome, Reason, ensure};

/// Device type.
pub const TYPE: u16 = 1;
/// Most pairs of queues that this driver uses.
pub const MAX_PAIRS: usize = 4;
/// Bytes of the header before each packet (§5.1.6).
pub const HEADER: u64 = 12;
/// Bytes of a buffer for packets, header included.
pub const BUFFER: u64 = 2048;

/// Feature: the device completes checksums.
pub const F_CSUM: u64 = 1 << 0;
/// Feature: the driver takes packets whose checksums are not complete.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// Feature: the MTU is told.
pub const F_MTU: u64 = 1 << 3;
/// Feature: the address is told.
pub const F_MAC: u64 = 1 << 5;
/// Feature: the driver takes datagrams that are not cut into fragments.
pub const F_GUEST_UFO: u64 = 1 << 10;
/// Feature: the device cuts TCP over IPv4 into segments.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// Feature: the device cuts datagrams into fragments.
pub const F_HOST_UFO: u64 = 1 << 14;
/// Feature: a packet may come in several buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// Feature: the link's state is told.
pub const F_STATUS: u64 = 1 << 16;
/// Feature: a control queue.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// Feature: several pairs of queues.
pub const F_MQ: u64 = 1 << 22;

/// How to set the device up.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Features to accept where they are offered.
    pub features: u64,
    /// Pairs to use, at most.
    pub pairs: usize,
    /// Entries a queue, at most.
    pub size: u16,
}

/// The device, running.
pub struct Net {
    /// Its transport.
    pub transport: Transport,
    /// Features in use.
    pub features: u64,
    /// How many pairs are in use.
    pub pairs: usize,
    receive: [Option<Queue>; MAX_PAIRS],
    transmit: [Option<Queue>; MAX_PAIRS],
    control: Option<Queue>,
    buffers: [u64; MAX_PAIRS],
}

impl Net {
    /// Resets the device that `net_index=` names (default the first) and sets it up; no buffers are given to it.
    pub fn open(setup: Setup) -> Outcome<Self> {
        let transport = Transport::find(TYPE, number("net_index").unwrap_or(0))?;
        let mut wanted = setup.features;
        if setup.pairs < 2 {
            wanted &= !F_MQ;
        }
        let features = transport.negotiate(wanted)?;
        transport.interrupts()?;
        let most: u16 = if features & F_MQ != 0 {
            read(transport.config.at + 8)
        } else {
            1
        };
        let mut net = Self {
            transport,
            features,
            pairs: setup.pairs.min(usize::from(most)).min(MAX_PAIRS),
            receive: [const { None }; MAX_PAIRS],
            transmit: [const { None }; MAX_PAIRS],
            control: None,
            buffers: [0; MAX_PAIRS],
        };
        for pair in 0..net.pairs {
            let index = 2 * pair as u16;
            let queue = net.transport.queue(index, setup.size, features)?;
            net.buffers[pair] = dma::take(BUFFER * u64::from(queue.size), 4096)?;
            queue.ask_for_interrupt(false);
            net.receive[pair] = Some(queue);
            let queue = net.transport.queue(index + 1, setup.size, features)?;
            queue.ask_for_interrupt(false);
            net.transmit[pair] = Some(queue);
        }
        if features & F_CTRL_VQ != 0 {
            net.control = Some(net.transport.queue(2 * most, 16, features)?);
        }
        net.transport.go()?;
        if net.pairs > 1 {
            let pairs = dma::take(2, 2)?;
            write(pairs, net.pairs as u16);
            let status = net.command(4, 0, Segment::readable(pairs, 2))?;
            ensure("the device uses all pairs", status == 0)?;
        }
        Ok(net)
    }

    /// A command of the control queue (§5.1.6.5): its status, 0 when it is done.
    pub fn command(&mut self, class: u8, command: u8, data: Segment) -> Outcome<u8> {
        let at = dma::take(3, 1)?;
        write(at, class);
        write(at + 1, command);
        write(at + 2, 0xffu8);
        let queue = self.control.as_mut();
        let queue = queue.ok_or(Reason("there is no control queue", 0, 1))?;
        let chain = [Segment::readable(at, 2), data, Segment::writable(at + 2, 1)];
        ensure("room for a command", queue.add(&chain, false).is_some())?;
        queue.kick();
        wait_for(queue, false)?;
        Ok(read(at + 2))
    }

    /// The device's address.
    pub fn mac(&self) -> [u8; 6] {
        core::array::from_fn(|i| read(self.transport.config.at + i as u64))
    }

    /// The MTU.
    pub fn mtu(&self) -> u16 {
        if self.features & F_MTU != 0 {
            read(self.transport.config.at + 10)
        } else {
            1500
        }
    }

    /// A pair's queue for packets that come.
    pub fn receiver(&mut self, pair: usize) -> Outcome<&mut Queue> {
        let queue = self.receive.get_mut(pair).and_then(Option::as_mut);
        queue.ok_or(Reason("no such pair", pair as u64, self.pairs as u64))
    }

    /// A pair's queue for packets that go.
    pub fn transmitter(&mut self, pair: usize) -> Outcome<&mut Queue> {
        let queue = self.transmit.get_mut(pair).and_then(Option::as_mut);
        queue.ok_or(Reason("no such pair", pair as u64, self.pairs as u64))
    }

    /// Gives the device all buffers of a pair that it hasn't got; tells it.
    pub fn refill(&mut self, pair: usize) -> Outcome {
        let buffers = self.buffers[pair.min(MAX_PAIRS - 1)];
        let queue = self.receiver(pair)?;
        while let Some(head) = queue.next_head() {
            let at = buffers + u64::from(head) * BUFFER;
            queue.add(&[Segment::writable(at, BUFFER as u32)], false);
        }
        queue.kick();
        Ok(())
    }

    /// True when a packet waits at any pair.
    pub fn has_packet(&self) -> bool {
        self.receive.iter().flatten().any(Queue::has_used)
    }

    /// Takes the next packet of a pair and shows each piece of it, the header left out; its length, and the buffers it was in.
    /// The buffers go back with the next [`Net::refill`].
    pub fn next(
        &mut self,
        pair: usize,
        mut piece: impl FnMut(u64, u64),
    ) -> Outcome<Option<(u64, u16)>> {
        let buffers = self.buffers[pair.min(MAX_PAIRS - 1)];
        let merges = self.features & F_MRG_RXBUF != 0;
        let queue = self.receiver(pair)?;
        let Some(first) = queue.take()? else {
            return Ok(None);
        };
        let at = buffers + u64::from(first.head) * BUFFER;
        let length = u64::from(first.length);
        ensure(
            "a header and a packet that fits",
            (HEADER..=BUFFER).contains(&length),
        )?;
        let count = if merges { read(at + 10) } else { 1u16 };
        ensure("a number of buffers", (1..=queue.size).contains(&count))?;
        piece(at + HEADER, length - HEADER);
        let mut total = length - HEADER;
        for _ in 1..count {
            let used = wait_for(queue, false)?;
            let length = u64::from(used.length);
            ensure("a further piece fits", (1..=BUFFER).contains(&length))?;
            piece(buffers + u64::from(used.head) * BUFFER, length);
            total += length;
        }
        Ok(Some((total, count)))
    }

    /// Takes the next packet of a pair without its header to `to`, where there are `room` bytes, and gives the buffers back; its length,
    /// and the buffers it was in. What has no room there is cut off.
    pub fn take_into(&mut self, pair: usize, to: u64, room: u64) -> Outcome<Option<(u64, u16)>> {
        let mut end = 0;
        let packet = self.next(pair, |from, length| {
            let length = length.min(room - end);
            // SAFETY: both are memory for devices of ours, of this length or more.
            unsafe {
                core::ptr::copy_nonoverlapping(
                    from as *const u8,
                    (to + end) as *mut u8,
                    length as usize,
                );
            }
            end += length;
        })?;
        self.refill(pair)?;
        if let Some((length, _)) = packet {
            ensure("nothing of a packet is missing", end == length.min(room))?;
        }
        Ok(packet)
    }

    /// Sends what lies at an address, header first, without telling the device; false when there is no room.
    pub fn send(&mut self, pair: usize, at: u64, length: u64) -> Outcome<bool> {
        let queue = self.transmitter(pair)?;
        let head = queue.add(&[Segment::readable(at, length as u32)], false);
        Ok(head.is_some())
    }
}
