//! A driver of the socket device (virtio 1.2 §5.10): packets by polling, and streams with credit.

use super::queue::{Queue, Segment};
use super::{F_EVENT_IDX, F_INDIRECT, PATIENCE, Transport};
use crate::clock::within;
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason, ensure, same};
use crate::{dma, map};

/// Number of the device's type.
pub const TYPE: u16 = 19;
/// The host's context id.
pub const HOST: u32 = 2;
/// Bytes of a packet's header.
pub const HEADER: u64 = 44;
/// Most bytes that a packet of ours holds, and that a buffer has room for.
pub const MOST: u64 = 64 << 10;
/// Bytes from one buffer to the next.
const STRIDE: u64 = MOST + 64;
/// Where a packet begins in a buffer: its bytes, after the header, are aligned then, and the header's fields to 4.
const START: u64 = 64 - HEADER;
/// Buffers for packets either way.
const BUFFERS: u16 = 16;
/// Bytes that we say we hold of a stream: as many as the buffers do.
const OUR_BUFFER: u32 = (BUFFERS as u64 * MOST) as u32;

/// What a packet is for.
pub mod op {
    /// Asks for a stream.
    pub const REQUEST: u16 = 1;
    /// Grants it.
    pub const RESPONSE: u16 = 2;
    /// There is none.
    pub const RST: u16 = 3;
    /// One or both halves are done.
    pub const SHUTDOWN: u16 = 4;
    /// Bytes.
    pub const RW: u16 = 5;
    /// How much room there is.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// SHUTDOWN: the sender sends no more.
pub const NO_SEND: u32 = 2;
/// SHUTDOWN: nor receives.
pub const NOTHING: u32 = 3;

/// A packet that came.
#[derive(Clone, Copy)]
pub struct Packet {
    /// The sender's port.
    pub src_port: u32,
    /// Ours.
    pub dst_port: u32,
    /// What it is for.
    pub op: u16,
    /// Its flags.
    pub flags: u32,
    /// Where its bytes are.
    pub bytes: u64,
    /// How many.
    pub length: u32,
    head: u16,
}

/// The device, running.
pub struct Vsock {
    /// Resets the device in the end.
    _transport: Transport,
    /// Our context id, whose upper half is 0.
    pub cid: u32,
    /// How often the device was notified.
    pub kicks: u64,
    rx: Queue,
    tx: Queue,
    _events: Queue,
    outgoing: u64,
}

/// One stream as we know it.
#[derive(Clone, Copy)]
pub struct Stream {
    /// The host's port.
    pub host: u32,
    /// Ours.
    pub guest: u32,
    sent: u32,
    room: u32,
    forwarded: u32,
    received: u32,
}

impl Stream {
    /// Between these ports, of which nothing is known.
    pub const fn new(host: u32, guest: u32) -> Self {
        Self {
            host,
            guest,
            sent: 0,
            room: 0,
            forwarded: 0,
            received: 0,
        }
    }

    /// Bytes that may be sent now.
    pub fn credit(&self) -> u32 {
        self.room
            .saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }
}

impl Vsock {
    /// Sets the device up, with all buffers for packets given to it.
    pub fn open() -> Outcome<Self> {
        dma::reset();
        let transport = Transport::find(TYPE, 0)?;
        let features = transport.negotiate(F_EVENT_IDX | F_INDIRECT | 1)?;
        ensure("streams are offered", features & 1 != 0)?;
        let mut rx = transport.queue(0, BUFFERS, features)?;
        let tx = transport.queue(1, BUFFERS, features)?;
        let events = transport.queue(2, BUFFERS, features)?;
        let incoming = dma::take(STRIDE * u64::from(BUFFERS), 4096)?;
        let outgoing = dma::take(STRIDE * u64::from(BUFFERS), 4096)?;
        same("bytes of configuration", transport.config.length, 8)?;
        let cid = map::read::<u32>(transport.config.at);
        for queue in [&rx, &tx, &events] {
            queue.ask_for_interrupt(false);
        }
        transport.go()?;
        for n in 0..u64::from(BUFFERS) {
            give(&mut rx, incoming + n * STRIDE + START)?;
        }
        rx.kick();
        Ok(Self {
            _transport: transport,
            cid,
            kicks: 0,
            rx,
            tx,
            _events: events,
            outgoing,
        })
    }

    /// Sends a packet of `length` bytes, which `fill` writes at the address it is given.
    pub fn send(
        &mut self,
        stream: &mut Stream,
        op: u16,
        flags: u32,
        length: u32,
        fill: impl FnOnce(u64),
    ) -> Outcome {
        let head = loop {
            while self.tx.take()?.is_some() {}
            if let Some(head) = self.tx.next_head() {
                break head;
            }
            let came = within(PATIENCE, || self.tx.has_used());
            ensure("a packet is taken", came)?;
        };
        let at = self.outgoing + u64::from(head) * STRIDE + START;
        for (field, value) in [(0, self.cid), (4, 0), (8, HOST), (12, 0)] {
            write(at + field, value);
        }
        write(at + 16, stream.guest);
        write(at + 20, stream.host);
        write(at + 24, length);
        write(at + 28, 1u16);
        write(at + 30, op);
        write(at + 32, flags);
        write(at + 36, OUR_BUFFER);
        write(at + 40, stream.received);
        fill(at + HEADER);
        stream.sent = stream.sent.wrapping_add(length);
        let whole = Segment::readable(at, HEADER as u32 + length);
        self.tx.add(&[whole], false);
        self.kicks += u64::from(self.tx.kick());
        Ok(())
    }

    /// The next packet, if one is there.
    pub fn poll(&mut self) -> Outcome<Option<Packet>> {
        if !self.rx.has_used() {
            return Ok(None);
        }
        let Some(used) = self.rx.take()? else {
            return Ok(None);
        };
        let at: u64 = read(self.rx.descriptor(used.head));
        for (field, value) in [(0, HOST), (4, 0), (8, self.cid), (12, 0)] {
            let got: u32 = read(at + field);
            same("who it is from and for", got.into(), value.into())?;
        }
        same("its type", u64::from(read::<u16>(at + 28)), 1)?;
        let length: u32 = read(at + 24);
        same(
            "bytes of a packet",
            u64::from(used.length),
            HEADER + u64::from(length),
        )?;
        Ok(Some(Packet {
            src_port: read(at + 16),
            dst_port: read(at + 20),
            op: read(at + 30),
            flags: read(at + 32),
            bytes: at + HEADER,
            length,
            head: used.head,
        }))
    }

    /// Takes note of what a packet says of its stream, and gives its buffer back to the device.
    pub fn done(&mut self, stream: &mut Stream, packet: &Packet) -> Outcome {
        let at = packet.bytes - HEADER;
        if (packet.src_port, packet.dst_port) == (stream.host, stream.guest) {
            stream.room = read(at + 36);
            stream.forwarded = read(at + 40);
            stream.received = stream.received.wrapping_add(packet.length);
        }
        same(
            "the descriptor of a packet",
            read(self.rx.descriptor(packet.head)),
            at,
        )?;
        give(&mut self.rx, at)?;
        self.kicks += u64::from(self.rx.kick());
        Ok(())
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> Outcome<Packet> {
        loop {
            if let Some(packet) = self.poll()? {
                return Ok(packet);
            }
            let came = within(PATIENCE, || self.rx.has_used());
            ensure("a packet comes", came)?;
        }
    }

    /// Waits for a packet of this kind for the stream. Those that tell of room may come before it.
    pub fn expect(&mut self, stream: &mut Stream, op: u16) -> Outcome<Packet> {
        loop {
            let packet = self.receive()?;
            if packet.op != op && packet.op == op::CREDIT_UPDATE {
                self.done(stream, &packet)?;
                continue;
            }
            same("what a packet is for", packet.op.into(), op.into())?;
            same(
                "its port of the host",
                packet.src_port.into(),
                stream.host.into(),
            )?;
            same("our port", packet.dst_port.into(), stream.guest.into())?;
            return Ok(packet);
        }
    }

    /// Connects to a port of the host.
    pub fn connect(&mut self, host: u32, guest: u32) -> Outcome<Stream> {
        let mut stream = Stream::new(host, guest);
        self.send(&mut stream, op::REQUEST, 0, 0, |_| {})?;
        let packet = self.expect(&mut stream, op::RESPONSE)?;
        self.done(&mut stream, &packet)?;
        Ok(stream)
    }

    /// Sends bytes as far as there is credit, as one packet; how many.
    pub fn push(
        &mut self,
        stream: &mut Stream,
        most: u64,
        fill: impl FnOnce(u64, u32),
    ) -> Outcome<u32> {
        let length = (stream.credit() as u64).min(most).min(MOST) as u32;
        if length > 0 {
            self.send(stream, op::RW, 0, length, |at| fill(at, length))?;
        }
        Ok(length)
    }
}

/// Gives the device a buffer.
fn give(rx: &mut Queue, at: u64) -> Outcome {
    let whole = Segment::writable(at, (HEADER + MOST) as u32);
    match rx.add(&[whole], false) {
        Some(_) => Ok(()),
        None => Err(Reason("no room for a buffer", at, 0)),
    }
}
