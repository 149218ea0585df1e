//! TCP: each connection of the guest ends here, and another one to the host's side carries its bytes on.
//!
//! ```text
//! guest's SYN ─> Connecting ─ the host's side is there ─> Open <─ the guest's MAC is known ─ Waiting <─ client of a forward
//!                    │ it is not: RST or ICMP             │
//!                    └──────────> gone <──────────────────┘ both ended, or one was reset, or idle for too long
//! ```
//!
//! Until the host's side is there the guest's SYN is kept and not answered, so that what the guest sees is what it would see
//! without us. Bytes are read from one side only where the other has room: what a connection holds is two buffers.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};

use smoltcp::iface::SocketSet;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{Icmpv4DstUnreachable, TcpPacket};
use vmm_sys_util::epoll::EventSet;

use crate::connection::{Connection, Verdict};
use crate::policy::Target;
use crate::shared::{Shared, Token};

/// Connections at a time, in both directions together; fewer where the process may have few descriptors: a quarter of them.
/// Each holds at most 512 KiB, once it is open.
///
/// When there are as many, a new one takes the place of one that has ended and only waits for late packets, or of the one that
/// was idle longest, if that is five minutes. Else it is refused; clients of forwards wait in the listener's queue.
pub const MAX_CONNECTIONS: usize = 512;

/// How long a connection has to be idle before a new one takes its place.
const IDLE_ENOUGH: Duration = Duration::from_secs(300);
/// Until listeners are looked at again that could not be served.
const RETRY: Duration = Duration::from_secs(1);
/// The first port that connections to the guest come from.
const FIRST_PORT: u16 = 49_152;

/// What tells connections of the guest apart; its address is always the same.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Key {
    /// The guest's port.
    pub guest: u16,
    /// The other side, as the guest sees it.
    pub remote: SocketAddrV4,
}

/// A forwarded port.
struct Listener {
    socket: TcpListener,
    guest_port: u16,
    ready: bool,
}

/// All of them.
pub struct Connections {
    table: HashMap<u64, Connection>,
    ids: HashMap<Key, u64>,
    last_id: u64,
    last_port: u16,
    limit: usize,
    /// Those with something to do.
    work: VecDeque<u64>,
    /// Those for which the link has no room.
    stalled: Vec<u64>,
    listeners: Vec<Listener>,
    retry: Option<Instant>,
    /// Without a socket, for packets of no connection.
    nobody: SocketSet<'static>,
}

impl Connections {
    pub fn new(
        shared: &Shared,
        listeners: Vec<(TcpListener, u16)>,
        limit: usize,
    ) -> io::Result<Connections> {
        let listeners: Vec<Listener> = listeners
            .into_iter()
            .map(|(socket, guest_port)| Listener {
                socket,
                guest_port,
                ready: false,
            })
            .collect();
        for (number, listener) in (0..).zip(&listeners) {
            shared.watch(&listener.socket, Token::Listener(number))?;
        }
        Ok(Connections {
            table: HashMap::new(),
            ids: HashMap::new(),
            last_id: 0,
            last_port: FIRST_PORT,
            limit,
            work: VecDeque::new(),
            stalled: Vec::new(),
            listeners,
            retry: None,
            nobody: SocketSet::new(Vec::new()),
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether a client waits until the guest is found.
    pub fn waiting(&self) -> bool {
        self.table.values().any(Connection::is_waiting)
    }

    /// A packet of the guest whose checksums are right.
    pub fn on_packet(
        &mut self,
        shared: &mut Shared,
        to: Ipv4Addr,
        packet: &[u8],
        segment: &TcpPacket<&[u8]>,
    ) {
        let key = Key {
            guest: segment.src_port(),
            remote: SocketAddrV4::new(to, segment.dst_port()),
        };
        let opening = segment.syn() && !segment.ack() && !segment.rst();
        if let Some(id) = self.ids.get(&key).copied()
            && let Some(connection) = self.table.get_mut(&id)
        {
            if !opening || !connection.is_over() {
                connection.on_packet(shared, packet, segment.rst());
                self.queue(id);
                return;
            }
            // The guest uses the port again.
            self.remove(id);
        }
        if opening {
            self.open(shared, key, packet);
        } else {
            self.reset(shared, packet);
        }
    }

    /// Answers a packet of no connection.
    fn reset(&mut self, shared: &mut Shared, packet: &[u8]) {
        shared
            .stack
            .receive(&mut shared.link, &mut self.nobody, packet, shared.now);
    }

    /// The guest wants to connect.
    fn open(&mut self, shared: &mut Shared, key: Key, syn: &[u8]) {
        let stream = match shared.policy.target(key.remote, shared.now) {
            Target::Host(address) if self.make_room(shared.now) => shared.outside.connect(address),
            Target::Host(_) | Target::NoPort | Target::Closed => {
                Err(ErrorKind::ConnectionRefused.into())
            }
            Target::NoHost => Err(ErrorKind::HostUnreachable.into()),
        };
        match stream {
            Ok(stream) => self.insert(shared, Connection::from_guest(key, stream, syn, shared.now)),
            Err(e) => self.refuse(shared, syn, e.kind()),
        }
    }

    /// Tells the guest why it is not connected.
    fn refuse(&mut self, shared: &mut Shared, syn: &[u8], why: ErrorKind) {
        match why {
            ErrorKind::HostUnreachable | ErrorKind::TimedOut => {
                shared.send_unreachable(Icmpv4DstUnreachable::HostUnreachable, syn);
            }
            ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
                shared.send_unreachable(Icmpv4DstUnreachable::NetUnreachable, syn);
            }
            _ => self.reset(shared, syn),
        }
    }

    fn insert(&mut self, shared: &Shared, connection: Connection) {
        self.last_id += 1;
        let id = self.last_id;
        if let Some(host) = connection.host()
            && shared.watch(host, Token::Tcp(id)).is_ok()
        {
            self.ids.insert(connection.key(), id);
            self.table.insert(id, connection);
            self.queue(id);
        }
    }

    fn remove(&mut self, id: u64) {
        if let Some(connection) = self.table.remove(&id) {
            self.ids.remove(&connection.key());
        }
    }

    /// Whether there may be another one; an old one may go for it.
    fn make_room(&mut self, now: Instant) -> bool {
        if self.table.len() < self.limit {
            return true;
        }
        let oldest = self
            .table
            .iter()
            .filter(|(_, c)| c.is_over() || c.active() + IDLE_ENOUGH <= now)
            .min_by_key(|(_, c)| (!c.is_over(), c.active()))
            .map(|(id, _)| *id);
        if let Some(id) = oldest {
            if let Some(connection) = self.table.get_mut(&id) {
                connection.reset_host();
            }
            self.remove(id);
        }
        oldest.is_some()
    }

    /// What epoll tells of a connection.
    pub fn on_event(&mut self, id: u64, set: EventSet) {
        if let Some(connection) = self.table.get_mut(&id) {
            connection.on_event(set);
            self.queue(id);
        }
    }

    /// Clients wait at a forwarded port.
    pub fn on_client(&mut self, shared: &mut Shared, number: u64) {
        let listener = usize::try_from(number)
            .ok()
            .and_then(|n| self.listeners.get_mut(n));
        if let Some(listener) = listener {
            listener.ready = true;
            self.accept(shared);
        }
    }

    /// Takes clients, as many as there may be.
    fn accept(&mut self, shared: &mut Shared) {
        self.retry = None;
        let gateway = shared.policy.network().gateway();
        for index in 0..self.listeners.len() {
            while self.listeners[index].ready {
                if !self.make_room(shared.now) {
                    self.retry = Some(shared.now + RETRY);
                    return;
                }
                let guest = self.listeners[index].guest_port;
                match self.listeners[index].socket.accept() {
                    Ok((stream, _)) => {
                        if let Some(port) = self.free_port(guest, gateway)
                            && stream.set_nonblocking(true).is_ok()
                        {
                            let key = Key {
                                guest,
                                remote: SocketAddrV4::new(gateway, port),
                            };
                            self.insert(shared, Connection::from_host(key, stream, shared.now));
                        }
                    }
                    Err(e) => match e.kind() {
                        ErrorKind::WouldBlock => self.listeners[index].ready = false,
                        // This client is gone again.
                        ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {}
                        _ => {
                            self.retry = Some(shared.now + RETRY);
                            return;
                        }
                    },
                }
            }
        }
    }

    fn free_port(&mut self, guest: u16, gateway: Ipv4Addr) -> Option<u16> {
        for _ in FIRST_PORT..=u16::MAX {
            self.last_port = self.last_port.checked_add(1).unwrap_or(FIRST_PORT);
            let remote = SocketAddrV4::new(gateway, self.last_port);
            if !self.ids.contains_key(&Key { guest, remote }) {
                return Some(self.last_port);
            }
        }
        None
    }

    /// The guest has been found: clients need not wait any more.
    pub fn on_found(&mut self) {
        let waiting: Vec<u64> = self
            .table
            .iter()
            .filter(|(_, c)| c.is_waiting())
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            self.queue(id);
        }
    }

    /// The link has room again.
    pub fn on_room(&mut self) {
        for id in std::mem::take(&mut self.stalled) {
            self.queue(id);
        }
    }

    fn queue(&mut self, id: u64) {
        if let Some(connection) = self.table.get_mut(&id)
            && connection.queue()
        {
            self.work.push_back(id);
        }
    }

    /// Whether something is to be done at once.
    pub fn busy(&self) -> bool {
        !self.work.is_empty()
    }

    /// When something is to be done next.
    pub fn next(&self) -> Option<Instant> {
        let deadlines = self.table.values().map(Connection::deadline);
        deadlines.chain(self.retry).min()
    }

    /// Does what is to be done now, each connection once.
    pub fn work(&mut self, shared: &mut Shared, due: bool) {
        if due {
            let now = shared.now;
            let due: Vec<u64> = self
                .table
                .iter()
                .filter(|(_, c)| c.deadline() <= now)
                .map(|(id, _)| *id)
                .collect();
            for id in due {
                self.queue(id);
            }
            if self.retry.is_some_and(|at| at <= now) {
                self.accept(shared);
            }
        }
        for _ in 0..self.work.len() {
            let Some(id) = self.work.pop_front() else {
                break;
            };
            let Some(connection) = self.table.get_mut(&id) else {
                continue;
            };
            match connection.work(shared) {
                Verdict::Goes => {}
                Verdict::Stalled => self.stalled.push(id),
                Verdict::Gone => self.remove(id),
                Verdict::Refused(why, syn) => {
                    self.remove(id);
                    self.refuse(shared, &syn, why);
                }
            }
        }
    }
}

/// A stream with what both sides of a connection need.
pub fn prepare(stream: TcpStream) -> TcpStream {
    // Whoever sends has already waited for more. Without it a connection is slower, no worse.
    let _ = stream.set_nodelay(true);
    stream
}
