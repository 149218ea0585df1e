//! Streams with their ends in the host: the muxer's rules put to work on sockets.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use log::debug;
use vm_memory::GuestMemory;
use vm_virtio::{Chain, Context, EventSet, Fault, Reader, Source};

use super::listener::VsockListener;
use super::muxer::{Action, MOST_STREAMS, Muxer, Next};
use super::packet::{HEADER_LEN, Header, NO_RECEIVE, NO_SEND, NOTHING};
use super::peer::{Greeting, Peer, Stage};
use super::stream::Ports;
use crate::pieces::Pieces;

/// Token of the listener. Those of the host's ends are 1 and more.
pub const LISTENER: u32 = 0;
/// Connections taken before it is the turn of others.
const MOST_ACCEPTED: usize = 32;

/// All streams, with the sockets that they end in. It stays as it is while the device is paused.
pub struct Streams {
    muxer: Muxer,
    peers: Vec<Option<Peer>>,
    free: Vec<u32>,
    listener: VsockListener,
    /// The listener is not watched, for there are no descriptors left.
    deaf: bool,
    pieces: Pieces,
}

impl Streams {
    /// None yet, of the guest with this context id.
    pub fn new(guest_cid: u64, listener: VsockListener) -> Self {
        Self {
            muxer: Muxer::new(guest_cid),
            peers: Vec::new(),
            free: Vec::new(),
            listener,
            deaf: false,
            pieces: Pieces::default(),
        }
    }

    /// Ends all streams, and all connections with the host.
    pub fn clear(&mut self) {
        self.muxer.clear();
        self.peers.clear();
        self.free.clear();
    }

    /// All there is to wait for, when a worker starts.
    pub fn sources(&self) -> Vec<Source> {
        let peers = (0..).zip(&self.peers);
        let peers = peers.filter_map(|(host, peer)| Some(source(host, peer.as_ref()?)));
        std::iter::once(self.listening()).chain(peers).collect()
    }

    /// A packet of the guest's can be looked at.
    pub fn takes_packets(&self) -> bool {
        self.muxer.takes_packets()
    }

    /// There may be something for the guest.
    pub fn has_turns(&self) -> bool {
        self.muxer.has_turns()
    }

    /// Takes connections of programs of the host.
    pub fn accept(&mut self, context: &mut Context<'_>) {
        for _ in 0..MOST_ACCEPTED {
            match self.listener.accept() {
                Ok(_) if self.is_full() => debug!("too many streams: a connection is closed"),
                Ok(socket) => {
                    if let Some(host) = self.add(Peer::new(socket, Stage::Greeting), context) {
                        self.greet(host, context);
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    // It would be ready all the time.
                    debug!("taking a connection: {e}");
                    context.unwatch(LISTENER);
                    self.deaf = true;
                    return;
                }
            }
        }
    }

    /// A worker starts with [`sources`](Self::sources), or there may be descriptors again: watches the listener if it is not watched.
    pub fn listen_again(&mut self, context: &mut Context<'_>) {
        if self.deaf {
            self.deaf = context.watch(&self.listening()).is_err();
        }
    }

    /// The worker watches all [`sources`](Self::sources).
    pub fn set_watched(&mut self) {
        self.deaf = false;
    }

    /// Events of the host's end with `token`.
    pub fn event(&mut self, token: u32, events: EventSet, context: &mut Context<'_>) {
        let host = token.wrapping_sub(1);
        let Some(stage) = self.peer(host).map(|peer| peer.stage) else {
            return;
        };
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match stage {
            Stage::Greeting => self.greet(host, context),
            Stage::Finishing => self.finish(host, context),
            Stage::Stream(stream) => {
                self.flush(stream, host, context);
                self.muxer.readable(stream);
                let Some(peer) = self.peer(host) else { return };
                if gone && (peer.ended || self.muxer.is_asking(stream)) {
                    let hung_up = self.peer(host).is_some_and(|peer| peer.is_hung_up());
                    if hung_up {
                        self.end(stream, host, NOTHING, context);
                    }
                }
            }
        }
    }

    /// A packet from the guest.
    pub fn take<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain,
        context: &mut Context<'_>,
    ) -> Result<(), Fault> {
        let mut reader = chain.reader(memory);
        let mut bytes = [0; HEADER_LEN];
        reader.read(&mut bytes)?;
        let header = Header::decode(&bytes);
        // Chains have less than 4 GiB.
        match self.muxer.packet(&header, reader.left() as u32) {
            Action::None => {}
            Action::Connect { ports } => self.connect(&header, ports, context),
            Action::Granted { host, port } => {
                let welcome = self.peer(host).is_some_and(|peer| peer.welcome(port));
                if let (false, Some(stream)) = (welcome, self.stream_of(host)) {
                    self.end(stream, host, NOTHING, context);
                }
            }
            Action::Deliver { stream, host, len } => {
                self.deliver(stream, host, &reader, len, context)?;
            }
            Action::Halves { host, done } => {
                if let Some(peer) = self.peer(host) {
                    peer.guest_done(done);
                }
            }
            Action::Finish { host } => {
                if let Some(peer) = self.peer(host) {
                    peer.stage = Stage::Finishing;
                    peer.guest_done(NOTHING);
                }
                self.finish(host, context);
            }
            Action::Abort { host } => self.remove(host, context),
        }
        Ok(())
    }

    /// Puts what the guest gets next into `chain`: how many bytes. None if there is nothing.
    pub fn give<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain,
        context: &mut Context<'_>,
    ) -> Result<Option<u32>, Fault> {
        let mut writer = chain.writer(memory);
        let mut bytes = writer.clone();
        bytes.skip(HEADER_LEN)?;
        let room = bytes.left() as u32;
        while let Some(next) = self.muxer.next(room) {
            let (stream, host, most) = match next {
                Next::Packet(header) => {
                    writer.write(&header.encode())?;
                    return Ok(Some(HEADER_LEN as u32));
                }
                Next::Bytes { most: 0, .. } => {
                    let wanted = HEADER_LEN + 1;
                    return Err(Fault::Short {
                        wanted,
                        left: HEADER_LEN,
                    });
                }
                Next::Bytes { stream, host, most } => (stream, host, most),
            };
            let Some(peer) = self.peers.get_mut(host as usize).and_then(Option::as_mut) else {
                self.muxer.dry(stream);
                continue;
            };
            match peer.read(&bytes, most as usize, &mut self.pieces)? {
                Ok(0) => {
                    peer.ended = true;
                    let halves = if peer.is_hung_up() { NOTHING } else { NO_SEND };
                    self.muxer.dry(stream);
                    self.end(stream, host, halves, context);
                }
                Ok(count) => {
                    // No more than `most`.
                    if let Some(header) = self.muxer.sent(stream, count as u32) {
                        writer.write(&header.encode())?;
                        return Ok(Some((HEADER_LEN + count) as u32));
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.muxer.dry(stream),
                Err(e) => {
                    debug!("the host's end of a stream: {e}");
                    self.end(stream, host, NOTHING, context);
                }
            }
        }
        Ok(None)
    }

    fn connect(&mut self, request: &Header, ports: Ports, context: &mut Context<'_>) {
        let socket = if self.is_full() {
            None
        } else {
            let connected = self.listener.connect(ports.host);
            connected
                .inspect_err(|e| debug!("the host's port {}: {e}", ports.host))
                .ok()
        };
        let added = socket.and_then(|s| self.add(Peer::new(s, Stage::Finishing), context));
        let Some(host) = added else {
            self.muxer.refuse(request);
            return;
        };
        match (self.muxer.grant(request, ports, host), self.peer(host)) {
            (Some(stream), Some(peer)) => peer.stage = Stage::Stream(stream),
            _ => self.remove(host, context),
        }
    }

    fn deliver<M: GuestMemory>(
        &mut self,
        stream: u32,
        host: u32,
        reader: &Reader<'_, M>,
        len: u32,
        context: &mut Context<'_>,
    ) -> Result<(), Fault> {
        let Some(peer) = self.peers.get_mut(host as usize).and_then(Option::as_mut) else {
            return Ok(());
        };
        match peer.write(reader, len as usize, &mut self.pieces)? {
            Ok(count) => self.muxer.forwarded(stream, count as u32),
            Err(e) => {
                debug!("the host's end of a stream: {e}");
                self.muxer.forwarded(stream, len);
                self.end(stream, host, NO_RECEIVE, context);
            }
        }
        Ok(())
    }

    /// Brings to the host what waits for it.
    fn flush(&mut self, stream: u32, host: u32, context: &mut Context<'_>) {
        let Some(peer) = self.peer(host) else { return };
        if peer.waiting() == 0 {
            return;
        }
        match peer.flush() {
            Ok(count) => self.muxer.forwarded(stream, count as u32),
            Err(e) => {
                debug!("the host's end of a stream: {e}");
                let lost = peer.drop_backlog();
                self.muxer.forwarded(stream, lost as u32);
                self.end(stream, host, NO_RECEIVE, context);
            }
        }
    }

    /// Of a stream that is gone, brings to the host what waits for it.
    fn finish(&mut self, host: u32, context: &mut Context<'_>) {
        let done = match self.peer(host) {
            Some(peer) => peer.flush().is_err() || peer.waiting() == 0,
            None => false,
        };
        if done {
            self.remove(host, context);
        }
    }

    /// Hears what a program of the host wants.
    fn greet(&mut self, host: u32, context: &mut Context<'_>) {
        let Some(peer) = self.peers.get_mut(host as usize).and_then(Option::as_mut) else {
            return;
        };
        let stream = match peer.greeting() {
            Greeting::Partial => return,
            Greeting::Connect(port) => self.muxer.request(port, host),
            Greeting::Wrong => None,
        };
        match stream {
            Some(stream) => peer.stage = Stage::Stream(stream),
            None => self.remove(host, context),
        }
    }

    /// The host's end is done with `halves`.
    fn end(&mut self, stream: u32, host: u32, halves: u32, context: &mut Context<'_>) {
        if self.muxer.host_done(stream, halves) {
            self.remove(host, context);
        }
    }

    fn peer(&mut self, host: u32) -> Option<&mut Peer> {
        self.peers.get_mut(host as usize)?.as_mut()
    }

    fn stream_of(&mut self, host: u32) -> Option<u32> {
        match self.peer(host)?.stage {
            Stage::Stream(stream) => Some(stream),
            _ => None,
        }
    }

    fn is_full(&self) -> bool {
        self.peers.len() - self.free.len() >= MOST_STREAMS
    }

    /// Keeps and watches `peer`: what it is known by.
    fn add(&mut self, peer: Peer, context: &mut Context<'_>) -> Option<u32> {
        // No more than there may be streams.
        let host = self.free.pop().unwrap_or(self.peers.len() as u32);
        if let Err(e) = context.watch(&source(host, &peer)) {
            debug!("waiting for the host's end of a stream: {e}");
            if (host as usize) < self.peers.len() {
                self.free.push(host);
            }
            return None;
        }
        match self.peers.get_mut(host as usize) {
            Some(place) => *place = Some(peer),
            None => self.peers.push(Some(peer)),
        }
        Some(host)
    }

    fn remove(&mut self, host: u32, context: &mut Context<'_>) {
        let Some(place) = self.peers.get_mut(host as usize) else {
            return;
        };
        if let Some(peer) = place.take() {
            context.unwatch(host + 1);
            self.free.push(host);
            drop(peer);
            self.listen_again(context);
        }
    }

    fn listening(&self) -> Source {
        Source {
            fd: self.listener.as_raw_fd(),
            events: EventSet::IN,
            token: LISTENER,
        }
    }
}

/// Edges, for a socket can be ready for long before its stream is.
fn source(host: u32, peer: &Peer) -> Source {
    Source {
        fd: peer.as_raw_fd(),
        events: EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED,
        token: host + 1,
    }
}
