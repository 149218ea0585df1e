//! All streams of a device (virtio 1.2 §5.10.6): what a packet of the guest's means, and which packet it gets next. Does no I/O, and
//! holds no bytes: the handler moves those, and says what it moved.
//!
//! Whatever the guest and the host do, there are at most [`MOST_STREAMS`] streams, as many entries in the order of turns, and a bounded
//! number of refusals to be sent. Streams take turns, so that none holds another up.

use std::collections::{HashMap, VecDeque};

use super::packet::{HOST_CID, Header, NOTHING, STREAM, op};
use super::stream::{Broken, Phase, Ports, Stream};

/// Most streams at a time, those that wait for either side included.
pub const MOST_STREAMS: usize = 1024;
/// With so many refusals to be sent no more of the guest's packets are looked at.
const MOST_REFUSALS: usize = 256;
/// Ports that the device gives to the host's ends, none of which anybody knows by heart.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// What a packet of the guest's asks the handler to do. `stream` is for the muxer, `host` the handler's own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Nothing.
    None,
    /// Connect to the host's port `ports.host`; then call [`Muxer::grant`], or [`Muxer::refuse`].
    Connect { ports: Ports },
    /// The guest took the connection that the host asked for.
    Granted { host: u32, port: u32 },
    /// Bring `len` bytes to the host; tell with [`Muxer::forwarded`] when they are gone.
    Deliver { stream: u32, host: u32, len: u32 },
    /// The guest is done with these halves: [`NO_SEND`](super::packet::NO_SEND), [`NO_RECEIVE`](super::packet::NO_RECEIVE).
    Halves { host: u32, done: u32 },
    /// The stream is gone. What the guest sent still goes to the host.
    Finish { host: u32 },
    /// The stream is gone, at once.
    Abort { host: u32 },
}

/// What the guest gets next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// A header alone.
    Packet(Header),
    /// Up to `most` bytes, at least 1, of the end `host`: then call [`Muxer::sent`], or [`Muxer::dry`], or [`Muxer::host_done`].
    Bytes { stream: u32, host: u32, most: u32 },
}

#[derive(Debug, Default)]
struct Slot {
    stream: Option<Stream>,
    /// It is in `turns`.
    queued: bool,
    /// When it began to linger.
    lingers_since: u64,
}

/// The streams of a device.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, u32>,
    /// Slots that have something for the guest, each once.
    turns: VecDeque<u32>,
    refusals: VecDeque<Header>,
    next_port: u32,
    clock: u64,
}

impl Muxer {
    /// No streams yet, of the guest with this context id.
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            refusals: VecDeque::new(),
            next_port: FIRST_PORT,
            clock: 0,
        }
    }

    /// Whether a packet of the guest's can be looked at, or has to wait until the guest takes what it is told.
    pub fn takes_packets(&self) -> bool {
        self.refusals.len() < MOST_REFUSALS
    }

    /// Something may be there for the guest.
    pub fn has_turns(&self) -> bool {
        !self.refusals.is_empty() || !self.turns.is_empty()
    }

    /// The guest sent a packet whose header is `header`, and `payload` bytes after it.
    pub fn packet(&mut self, header: &Header, payload: u32) -> Action {
        let ours =
            header.src_cid == self.guest_cid && header.dst_cid == HOST_CID && header.kind == STREAM;
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let slot = match self.by_ports.get(&ports) {
            Some(&slot) if ours => slot,
            _ if header.op == op::RST => return Action::None,
            None if ours && header.op == op::REQUEST => return Action::Connect { ports },
            _ => {
                self.refuse(header);
                return Action::None;
            }
        };
        let Some(stream) = self.stream_mut(slot) else {
            return Action::None;
        };
        let was = stream.phase;
        if header.op != op::RST {
            stream.hear(header);
        }
        let host = stream.host;
        let port = stream.ports.host;
        let outcome = match header.op {
            op::RST => {
                self.remove(slot);
                return host.map_or(Action::None, |host| Action::Abort { host });
            }
            op::RESPONSE if was == Phase::Asking && !stream.is_unheard() => {
                stream.grant();
                Ok(host.map(|host| Action::Granted { host, port }))
            }
            op::RW if header.len <= payload => stream.receive(header.len).map(|takes| {
                host.filter(|_| takes && header.len > 0)
                    .map(|host| Action::Deliver {
                        stream: slot,
                        host,
                        len: header.len,
                    })
            }),
            op::SHUTDOWN if was != Phase::Asking => {
                let done = stream.end_guest(header.flags);
                if done == NOTHING {
                    self.reset(slot);
                    return host.map_or(Action::None, |host| Action::Finish { host });
                }
                Ok(host.map(|host| Action::Halves { host, done }))
            }
            op::CREDIT_UPDATE if was != Phase::Asking => Ok(None),
            op::CREDIT_REQUEST if was != Phase::Asking => {
                stream.owe_credit();
                Ok(None)
            }
            _ => Err(Broken),
        };
        match outcome {
            Ok(action) => {
                self.touch(slot);
                action.unwrap_or(Action::None)
            }
            Err(Broken) => {
                self.reset(slot);
                host.map_or(Action::None, |host| Action::Abort { host })
            }
        }
    }

    /// The connection that `request` asked for is there, and the handler knows it by `host`. None, and a refusal, where there are too many.
    pub fn grant(&mut self, request: &Header, ports: Ports, host: u32) -> Option<u32> {
        let slot = self.insert(Stream::granted_by_host(ports, host, request));
        if slot.is_none() {
            self.refuse(request);
        }
        slot
    }

    /// Tells the guest that there is nothing where `header` was sent to.
    pub fn refuse(&mut self, header: &Header) {
        self.refusals.push_back(header.refusal());
    }

    /// The host asks for the guest's port `guest`; the handler knows the host's end by `host`. None where there are too many.
    pub fn request(&mut self, guest: u32, host: u32) -> Option<u32> {
        // One of so many ports is free.
        for _ in 0..=MOST_STREAMS {
            let ports = Ports {
                host: self.next_port,
                guest,
            };
            self.next_port = match self.next_port {
                LAST_PORT => FIRST_PORT,
                port => port + 1,
            };
            if !self.by_ports.contains_key(&ports) {
                return self.insert(Stream::asked_by_host(ports, host));
            }
        }
        None
    }

    /// The host's end of `stream` may have something to read, which may be its end.
    pub fn readable(&mut self, stream: u32) {
        self.with(stream, |s| s.set_readable(true));
    }

    /// The host's end of `stream` has nothing to read, until [`readable`](Self::readable).
    pub fn dry(&mut self, stream: u32) {
        self.with(stream, |s| s.set_readable(false));
    }

    /// `len` bytes that the guest sent are gone to the host, or will never go.
    pub fn forwarded(&mut self, stream: u32, len: u32) {
        self.with(stream, |s| s.forward(len));
    }

    /// `len` bytes of the host's end go to the guest: their header.
    pub fn sent(&mut self, stream: u32, len: u32) -> Option<Header> {
        let cid = self.guest_cid;
        let header = self.stream_mut(stream)?.send(cid, len);
        self.touch(stream);
        Some(header)
    }

    /// The host's end of `stream` is done with `halves`. Once it is done with both, the handler has nothing more to do with it.
    /// True if so.
    pub fn host_done(&mut self, stream: u32, halves: u32) -> bool {
        let clock = self.clock;
        let Some(slot) = self.slots.get_mut(stream as usize) else {
            return true;
        };
        let Some(known) = &mut slot.stream else {
            return true;
        };
        if known.phase == Phase::Asking {
            // It gave up before the guest answered.
            if known.is_unheard() {
                self.remove(stream);
            } else {
                self.reset(stream);
            }
            return true;
        }
        let was = known.phase;
        known.end_host(halves);
        let lingers = known.phase == Phase::Lingering;
        if lingers && was == Phase::Open {
            slot.lingers_since = clock;
            self.clock += 1;
        }
        self.touch(stream);
        lingers
    }

    /// The guest has not answered to what the host asked for.
    pub fn is_asking(&self, stream: u32) -> bool {
        let slot = self.slots.get(stream as usize);
        slot.and_then(|slot| slot.stream.as_ref())
            .is_some_and(|stream| stream.phase == Phase::Asking)
    }

    /// What the guest gets next, which may have room for `room` bytes after the header.
    pub fn next(&mut self, room: u32) -> Option<Next> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(Next::Packet(refusal));
        }
        let cid = self.guest_cid;
        while let Some(turn) = self.turns.pop_front() {
            let Some(slot) = self.slots.get_mut(turn as usize) else {
                continue;
            };
            slot.queued = false;
            let Some(stream) = &mut slot.stream else {
                continue;
            };
            if let Some(header) = stream.take_due(cid) {
                self.touch(turn);
                return Some(Next::Packet(header));
            }
            if let (true, Some(host)) = (stream.can_send(), stream.host) {
                return Some(Next::Bytes {
                    stream: turn,
                    host,
                    most: stream.credit().min(room),
                });
            }
        }
        None
    }

    /// Forgets all streams.
    pub fn clear(&mut self) {
        *self = Self {
            next_port: self.next_port,
            ..Self::new(self.guest_cid)
        };
    }

    fn stream_mut(&mut self, slot: u32) -> Option<&mut Stream> {
        self.slots.get_mut(slot as usize)?.stream.as_mut()
    }

    fn with(&mut self, slot: u32, change: impl FnOnce(&mut Stream)) {
        if let Some(stream) = self.stream_mut(slot) {
            change(stream);
            self.touch(slot);
        }
    }

    /// Gives `slot` a turn if it has something for the guest.
    fn touch(&mut self, slot: u32) {
        if let Some(known) = self.slots.get_mut(slot as usize)
            && !known.queued
            && known.stream.as_ref().is_some_and(Stream::is_due)
        {
            known.queued = true;
            self.turns.push_back(slot);
        }
    }

    fn insert(&mut self, stream: Stream) -> Option<u32> {
        if self.by_ports.len() >= MOST_STREAMS {
            self.end_lingering()?;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Slot::default());
                // No more than there may be streams.
                self.slots.len() as u32 - 1
            }
        };
        self.by_ports.insert(stream.ports, slot);
        self.slots.get_mut(slot as usize)?.stream = Some(stream);
        self.touch(slot);
        Some(slot)
    }

    /// Ends the stream that lingers longest.
    fn end_lingering(&mut self) -> Option<()> {
        let lingers = |slot: &Slot| {
            let stream = slot.stream.as_ref()?;
            (stream.phase == Phase::Lingering).then_some(slot.lingers_since)
        };
        let (slot, _) = (0..)
            .zip(&self.slots)
            .filter_map(|(index, slot)| Some((index, lingers(slot)?)))
            .min_by_key(|(_, since)| *since)?;
        self.reset(slot);
        Some(())
    }

    /// Takes a stream away and tells the guest.
    fn reset(&mut self, slot: u32) {
        let cid = self.guest_cid;
        if let Some(stream) = self.remove(slot) {
            self.refusals.push_back(stream.rst(cid));
        }
    }

    fn remove(&mut self, slot: u32) -> Option<Stream> {
        let stream = self.slots.get_mut(slot as usize)?.stream.take()?;
        self.by_ports.remove(&stream.ports);
        self.free.push(slot);
        Some(stream)
    }
}
