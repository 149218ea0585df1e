//! UDP and echo requests: a socket of the host for each port of the guest, and who may answer.
//!
//! A port of the guest has one port of the host, whoever it talks to, and only those it has talked to can answer (RFC 4787: endpoint-
//! independent mapping, address and port-dependent filtering). Echo requests go by the same rules, with the identifier for a
//! port, over the kernel's unprivileged sockets for them; where it does not allow these they are not answered.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr};

use crate::policy::Target;
use crate::shared::{Shared, Token};

/// Ports and echo identifiers of the guest that have a socket at a time; fewer where the process may have few descriptors: an
/// eighth of them. A new one takes the place of the one that was silent longest.
pub const MAX_FLOWS: usize = 256;

/// Peers of a port that can answer; a new one takes the place of the one that was silent longest.
const MAX_PEERS: usize = 64;
/// Datagrams of a socket before others have their turn.
const MAX_TURN: usize = 64;
/// After so long without a datagram a flow is forgotten (RFC 4787 §4.3).
const SILENT: Duration = Duration::from_secs(120);
/// If all of it went to port 53, or was echo requests.
const BRIEF: Duration = Duration::from_secs(20);
/// The largest datagram.
const MAX_DATAGRAM: usize = 65_535;

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Kind {
    Udp,
    Echo,
}

/// What tells flows apart: the guest's port, or the identifier of its echo requests.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Key {
    kind: Kind,
    guest: u16,
}

/// Somebody the guest talks to, as it sees them and as the host does. Ports are 0 for echo requests.
struct Peer {
    seen: SocketAddrV4,
    host: SocketAddrV4,
    active: Instant,
}

struct Flow {
    key: Key,
    socket: UdpSocket,
    peers: Vec<Peer>,
    active: Instant,
    queued: bool,
}

impl Flow {
    fn expires(&self) -> Instant {
        let brief = self.key.kind == Kind::Echo || self.peers.iter().all(|p| p.seen.port() == 53);
        self.active + if brief { BRIEF } else { SILENT }
    }

    /// The guest says something to `seen`: the peer may answer from now on.
    fn speak(&mut self, seen: SocketAddrV4, host: SocketAddrV4, now: Instant) {
        self.active = now;
        let same = |p: &&mut Peer| p.seen == seen && p.host == host;
        if let Some(peer) = self.peers.iter_mut().find(same) {
            peer.active = now;
            return;
        }
        let peer = Peer {
            seen,
            host,
            active: now,
        };
        if self.peers.len() < MAX_PEERS {
            self.peers.push(peer);
        } else if let Some(oldest) = self.peers.iter_mut().min_by_key(|p| p.active) {
            *oldest = peer;
        }
    }

    /// As whom the guest sees the one who answers from `host`, if it may. One of the host's addresses can have two names.
    fn heard(&mut self, host: SocketAddrV4, now: Instant) -> Option<SocketAddrV4> {
        let peer = self
            .peers
            .iter_mut()
            .filter(|p| p.host.ip() == host.ip())
            .filter(|p| self.key.kind == Kind::Echo || p.host.port() == host.port())
            .max_by_key(|p| p.active)?;
        peer.active = now;
        self.active = now;
        Some(peer.seen)
    }
}

/// All of them.
pub struct Flows {
    table: HashMap<u64, Flow>,
    ids: HashMap<Key, u64>,
    last_id: u64,
    limit: usize,
    work: VecDeque<u64>,
    stalled: Vec<u64>,
    buffer: Box<[u8]>,
}

impl Flows {
    pub fn new(limit: usize) -> Flows {
        Flows {
            table: HashMap::new(),
            ids: HashMap::new(),
            last_id: 0,
            limit,
            work: VecDeque::new(),
            stalled: Vec::new(),
            buffer: vec![0; MAX_DATAGRAM].into_boxed_slice(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// A datagram of the guest for somebody outside; `packet` is all of it.
    pub fn on_udp(
        &mut self,
        shared: &mut Shared,
        port: u16,
        to: SocketAddrV4,
        payload: &[u8],
        packet: &[u8],
    ) {
        let host = match shared.policy.target(to, shared.now) {
            Target::Host(host) => host,
            Target::NoPort => {
                return shared.send_unreachable(Icmpv4DstUnreachable::PortUnreachable, packet);
            }
            Target::NoHost => {
                return shared.send_unreachable(Icmpv4DstUnreachable::HostUnreachable, packet);
            }
            Target::Closed => return,
        };
        let key = Key {
            kind: Kind::Udp,
            guest: port,
        };
        self.send(shared, key, to, host, payload, packet);
    }

    /// An echo request of the guest for somebody outside: `message` is what ICMP has of it.
    pub fn on_echo(
        &mut self,
        shared: &mut Shared,
        ident: u16,
        to: Ipv4Addr,
        message: &[u8],
        packet: &[u8],
    ) {
        // Any port shows whether the address is open.
        match shared.policy.target(SocketAddrV4::new(to, 7), shared.now) {
            Target::Host(host) => {
                let key = Key {
                    kind: Kind::Echo,
                    guest: ident,
                };
                let (to, host) = (SocketAddrV4::new(to, 0), SocketAddrV4::new(*host.ip(), 0));
                self.send(shared, key, to, host, message, packet);
            }
            Target::NoHost => {
                shared.send_unreachable(Icmpv4DstUnreachable::HostUnreachable, packet);
            }
            Target::NoPort | Target::Closed => {}
        }
    }

    fn send(
        &mut self,
        shared: &mut Shared,
        key: Key,
        to: SocketAddrV4,
        host: SocketAddrV4,
        payload: &[u8],
        packet: &[u8],
    ) {
        let id = match self.ids.get(&key) {
            Some(id) => *id,
            None => match self.open(shared, key) {
                Ok(id) => id,
                // As if it were lost on the way.
                Err(_) => return,
            },
        };
        let Some(flow) = self.table.get_mut(&id) else {
            return;
        };
        flow.speak(to, host, shared.now);
        match flow.socket.send_to(payload, host) {
            Err(e) if e.kind() == ErrorKind::HostUnreachable => {
                shared.send_unreachable(Icmpv4DstUnreachable::HostUnreachable, packet);
            }
            Err(e) if e.kind() == ErrorKind::NetworkUnreachable => {
                shared.send_unreachable(Icmpv4DstUnreachable::NetUnreachable, packet);
            }
            // Else it has gone, or is lost as datagrams may be.
            _ => {}
        }
    }

    fn open(&mut self, shared: &mut Shared, key: Key) -> io::Result<u64> {
        if self.table.len() >= self.limit
            && let Some(oldest) = self.table.iter().min_by_key(|(_, f)| f.active)
        {
            self.remove(*oldest.0);
        }
        let socket = match key.kind {
            Kind::Udp => shared.outside.datagrams()?,
            Kind::Echo => shared.outside.pings()?,
        };
        self.last_id += 1;
        let id = self.last_id;
        shared.watch(&socket, Token::Flow(id))?;
        let flow = Flow {
            key,
            socket,
            peers: Vec::new(),
            active: shared.now,
            queued: false,
        };
        self.table.insert(id, flow);
        self.ids.insert(key, id);
        Ok(id)
    }

    fn remove(&mut self, id: u64) {
        if let Some(flow) = self.table.remove(&id) {
            self.ids.remove(&flow.key);
        }
    }

    /// A socket may have something.
    pub fn on_readable(&mut self, id: u64) {
        if let Some(flow) = self.table.get_mut(&id)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.work.push_back(id);
        }
    }

    /// The link has room again.
    pub fn on_room(&mut self) {
        self.work.extend(self.stalled.drain(..));
    }

    /// Whether something is to be done at once.
    pub fn busy(&self) -> bool {
        !self.work.is_empty()
    }

    /// When something is to be done next.
    pub fn next(&self) -> Option<Instant> {
        self.table.values().map(Flow::expires).min()
    }

    /// Does what is to be done now.
    pub fn work(&mut self, shared: &mut Shared, due: bool) {
        if due {
            let ids = &mut self.ids;
            self.table.retain(|_, flow| {
                let keep = flow.expires() > shared.now;
                if !keep {
                    ids.remove(&flow.key);
                }
                keep
            });
        }
        for _ in 0..self.work.len() {
            let Some(id) = self.work.pop_front() else {
                break;
            };
            let Some(flow) = self.table.get_mut(&id) else {
                continue;
            };
            match receive(shared, flow, &mut self.buffer) {
                Turn::Empty => flow.queued = false,
                Turn::More => self.work.push_back(id),
                Turn::Stalled => self.stalled.push(id),
            }
        }
    }
}

/// What is left in a socket after a turn.
enum Turn {
    Empty,
    More,
    /// What is in it stays there until the link has room.
    Stalled,
}

fn receive(shared: &mut Shared, flow: &mut Flow, buffer: &mut [u8]) -> Turn {
    for _ in 0..MAX_TURN {
        if !shared.link.has_room() {
            return Turn::Stalled;
        }
        let (len, from) = match flow.socket.recv_from(buffer) {
            Ok((len, SocketAddr::V4(from))) => (len, from),
            Ok(_) => continue,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Turn::Empty,
            // One datagram could not be delivered; another may have arrived.
            Err(_) => continue,
        };
        let (Some(seen), Some(payload)) = (flow.heard(from, shared.now), buffer.get(..len)) else {
            continue;
        };
        match flow.key.kind {
            Kind::Udp => shared.send_udp(seen, flow.key.guest, payload),
            Kind::Echo => {
                let checksums = ChecksumCapabilities::ignored();
                if let Ok(reply) = Icmpv4Packet::new_checked(payload)
                    && let Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) =
                        Icmpv4Repr::parse(&reply, &checksums)
                {
                    // The kernel has put its own identifier in.
                    let ident = flow.key.guest;
                    let reply = Icmpv4Repr::EchoReply {
                        ident,
                        seq_no,
                        data,
                    };
                    shared.send_icmp(*seen.ip(), &reply);
                }
            }
        }
    }
    Turn::More
}
