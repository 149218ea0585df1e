//! One stream: how far both ends are with it, and how much each may send (virtio 1.2 §5.10.6.3, §5.10.6.5).
//!
//! ```text
//!   host asks ──> Asking ──RESPONSE──> Open ──both halves of the host's end are done──> Lingering ──RST──> gone
//!                    │                  ^ │
//!   guest asks, host grants ────────────┘ └── SHUTDOWN of both halves, RST, or a broken rule ────────────> gone
//! ```

use super::packet::{HOST_CID, Header, NO_RECEIVE, NO_SEND, NOTHING, STREAM, op};

/// Bytes that the device holds for one stream on their way to the host.
pub const BUFFER: u32 = 128 << 10;
/// The driver is told of room as soon as it misses so much of it. What it misses is less, so that it can always send most of a buffer
/// once the host has taken everything.
const WORTH_TELLING: u32 = BUFFER / 4;

/// The two ports, which name a stream: there is one host and one guest.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// The driver is asked, or will be; it has not answered.
    Asking,
    /// Bytes may go.
    Open,
    /// The host's end is gone. The driver is told so, or will be, and has not let go of the stream.
    Lingering,
}

/// A stream as the device knows it.
#[derive(Debug)]
pub struct Stream {
    pub ports: Ports,
    pub phase: Phase,
    /// What the back end knows the host's end by. None once that is gone.
    pub host: Option<u32>,
    /// REQUEST or RESPONSE, to be sent first of all.
    announce: Option<u16>,
    /// Halves that the host's end is done with: [`NO_SEND`], [`NO_RECEIVE`].
    host_done: u32,
    /// Those of them that the driver was told of.
    told_done: u32,
    /// Halves that the guest's end is done with.
    guest_done: u32,
    /// The host's end may have something to read.
    readable: bool,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// What the guest says of its buffer: bytes, and how many left it, modulo 2^32.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The guest was asked for room, and has not been heard of since.
    asked: bool,
    /// Bytes received from the guest, modulo 2^32.
    received: u32,
    /// Those of them that left our buffer.
    forwarded: u32,
    /// What the guest was told of that.
    told_forwarded: u32,
    /// The guest asks for room.
    owes_credit: bool,
}

/// The guest broke a rule.
#[derive(Debug, Eq, PartialEq)]
pub struct Broken;

impl Stream {
    /// A stream that the host asks for.
    pub fn asked_by_host(ports: Ports, host: u32) -> Self {
        Self {
            ports,
            phase: Phase::Asking,
            host: Some(host),
            announce: Some(op::REQUEST),
            host_done: 0,
            told_done: 0,
            guest_done: 0,
            readable: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            asked: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            owes_credit: false,
        }
    }

    /// A stream that the guest asked for with `request`, and that the host grants.
    pub fn granted_by_host(ports: Ports, host: u32, request: &Header) -> Self {
        let mut stream = Self {
            phase: Phase::Open,
            announce: Some(op::RESPONSE),
            readable: true,
            ..Self::asked_by_host(ports, host)
        };
        stream.hear(request);
        stream
    }

    /// Every packet tells of the guest's buffer.
    pub fn hear(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.asked = false;
    }

    /// The guest grants the stream.
    pub fn grant(&mut self) {
        self.phase = Phase::Open;
        self.readable = true;
    }

    /// Bytes that may go to the guest now. A guest whose numbers make no sense has no room.
    pub fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(on_the_way)
    }

    /// Bytes that the guest may still send.
    pub fn room(&self) -> u32 {
        BUFFER.saturating_sub(self.received.wrapping_sub(self.forwarded))
    }

    /// The guest sends `len` bytes. Whether the host's end takes them; else they are dropped.
    pub fn receive(&mut self, len: u32) -> Result<bool, Broken> {
        if self.phase == Phase::Asking || self.guest_done & NO_SEND != 0 || len > self.room() {
            return Err(Broken);
        }
        self.received = self.received.wrapping_add(len);
        let takes = self.host.is_some() && self.host_done & NO_RECEIVE == 0;
        if !takes {
            self.forward(len);
        }
        Ok(takes)
    }

    /// `len` bytes left our buffer.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// `len` bytes went to the guest: the header that goes with them.
    pub fn send(&mut self, guest_cid: u64, len: u32) -> Header {
        self.sent = self.sent.wrapping_add(len);
        Header {
            len,
            ..self.header(guest_cid, op::RW)
        }
    }

    /// The host's end is done with `halves` too.
    pub fn end_host(&mut self, halves: u32) {
        self.host_done |= halves;
        if self.host_done == NOTHING && self.phase == Phase::Open {
            self.phase = Phase::Lingering;
            self.host = None;
        }
    }

    /// The guest's end is done with `halves` too: all that it is done with.
    pub fn end_guest(&mut self, halves: u32) -> u32 {
        self.guest_done |= halves & NOTHING;
        self.guest_done
    }

    /// What was never asked need not be taken back.
    pub fn is_unheard(&self) -> bool {
        self.announce == Some(op::REQUEST)
    }

    /// The host's end may have something to read, or has nothing.
    pub fn set_readable(&mut self, readable: bool) {
        self.readable = readable;
    }

    /// The guest wants to know of our room.
    pub fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    fn wants_bytes(&self) -> bool {
        self.readable
            && self.phase == Phase::Open
            && self.host_done & NO_SEND == 0
            && self.guest_done & NO_RECEIVE == 0
    }

    /// Bytes of the host's end can go.
    pub fn can_send(&self) -> bool {
        self.announce.is_none() && self.wants_bytes() && self.credit() > 0
    }

    fn missing(&self) -> u32 {
        self.forwarded.wrapping_sub(self.told_forwarded)
    }

    /// The packet without bytes that is due, if one is.
    fn due(&self) -> Option<u16> {
        if let Some(announce) = self.announce {
            return Some(announce);
        }
        match self.phase {
            Phase::Asking => None,
            _ if self.told_done != self.host_done => Some(op::SHUTDOWN),
            Phase::Open if self.owes_credit || self.missing() >= WORTH_TELLING => {
                Some(op::CREDIT_UPDATE)
            }
            Phase::Open if self.wants_bytes() && self.credit() == 0 && !self.asked => {
                Some(op::CREDIT_REQUEST)
            }
            _ => None,
        }
    }

    /// Something is to go to the guest.
    pub fn is_due(&self) -> bool {
        self.due().is_some() || self.can_send()
    }

    /// The packet without bytes that is due, as it goes to the guest now.
    pub fn take_due(&mut self, guest_cid: u64) -> Option<Header> {
        let op = self.due()?;
        let mut flags = 0;
        match op {
            op::SHUTDOWN => {
                self.told_done = self.host_done;
                flags = self.host_done;
            }
            op::CREDIT_REQUEST => self.asked = true,
            op::CREDIT_UPDATE => {}
            _ => self.announce = None,
        }
        Some(Header {
            flags,
            ..self.header(guest_cid, op)
        })
    }

    /// The refusal of whatever the guest does next.
    pub fn rst(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: STREAM,
            op: op::RST,
            ..Header::default()
        }
    }

    /// A header to the guest, which tells it of our buffer.
    fn header(&mut self, guest_cid: u64, op: u16) -> Header {
        self.told_forwarded = self.forwarded;
        self.owes_credit = false;
        Header {
            op,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
            ..self.rst(guest_cid)
        }
    }
}
