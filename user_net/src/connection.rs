//! One connection: a socket of the stack on the guest's side, one of the host on the other, and bytes from each to each.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::IpListenEndpoint;
use vmm_sys_util::epoll::EventSet;

use crate::shared::Shared;
use crate::sys;
use crate::tcp::{Key, prepare};

/// Bytes that a connection keeps for each side until they are taken.
///
/// One less than a power of two. The stack takes the window of its SYN, which is 65 535 and never scaled, for scaled when data
/// comes before it has sent another: with 2^n - 1 bytes even that window is no larger than the buffer, and a guest that fills
/// more of it than there is does not make the stack panic.
const BUFFER: usize = (256 << 10) - 1;

/// The longest that connecting to the host takes.
const CONNECTING: Duration = Duration::from_secs(75);
/// The longest that a client waits for the guest.
const WAITING: Duration = Duration::from_secs(60);
/// The longest without a packet while a connection begins or ends (RFC 5382 §5).
const TRANSITORY: Duration = Duration::from_secs(240);
/// And in between.
const ESTABLISHED: Duration = Duration::from_secs(2 * 60 * 60 + 240);
/// The stack asks to be asked at once: not more often than this.
const SOON: Duration = Duration::from_millis(1);

enum Stage {
    /// The host's side is being connected; the guest's SYN.
    Connecting(Box<[u8]>),
    /// A client of a forward, until it is known where the guest is.
    Waiting,
    /// The guest's side.
    Open {
        sockets: SocketSet<'static>,
        handle: SocketHandle,
    },
}

/// What becomes of a connection.
pub enum Verdict {
    /// It goes on.
    Goes,
    /// It has more for the guest than the link takes.
    Stalled,
    /// It is over.
    Gone,
    /// The host's side cannot be; this and the SYN say what the guest is to be told.
    Refused(ErrorKind, Box<[u8]>),
}

/// One connection.
pub struct Connection {
    key: Key,
    stage: Stage,
    /// None after it has ended in both directions, or was reset.
    host: Option<TcpStream>,
    readable: bool,
    writable: bool,
    failed: bool,
    /// The host's side has said all.
    host_done: bool,
    /// The guest has, and the host's side has all of it.
    guest_done: bool,
    active: Instant,
    deadline: Instant,
    queued: bool,
}

impl Connection {
    /// The guest connects, and `stream` is being connected for that.
    pub fn from_guest(key: Key, stream: TcpStream, syn: &[u8], now: Instant) -> Connection {
        Connection::new(
            key,
            stream,
            Stage::Connecting(syn.into()),
            now + CONNECTING,
            now,
        )
    }

    /// A client connects to the guest.
    pub fn from_host(key: Key, stream: TcpStream, now: Instant) -> Connection {
        Connection::new(key, stream, Stage::Waiting, now + WAITING, now)
    }

    fn new(
        key: Key,
        stream: TcpStream,
        stage: Stage,
        deadline: Instant,
        now: Instant,
    ) -> Connection {
        Connection {
            key,
            stage,
            host: Some(prepare(stream)),
            readable: false,
            writable: false,
            failed: false,
            host_done: false,
            guest_done: false,
            active: now,
            deadline,
            queued: false,
        }
    }

    pub fn key(&self) -> Key {
        self.key
    }

    pub fn host(&self) -> Option<&TcpStream> {
        self.host.as_ref()
    }

    pub fn is_waiting(&self) -> bool {
        matches!(self.stage, Stage::Waiting)
    }

    /// Whether both sides have ended, and only late packets are waited for.
    pub fn is_over(&self) -> bool {
        match &self.stage {
            Stage::Open { sockets, handle } => matches!(
                sockets.get::<Socket<'_>>(*handle).state(),
                State::TimeWait | State::Closed
            ),
            _ => false,
        }
    }

    /// When something was last heard of it.
    pub fn active(&self) -> Instant {
        self.active
    }

    /// When it is to work, even if nothing happens.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Notes that it is in the queue of work. False if it already was.
    pub fn queue(&mut self) -> bool {
        !std::mem::replace(&mut self.queued, true)
    }

    pub fn on_event(&mut self, set: EventSet) {
        let ended = EventSet::HANG_UP | EventSet::ERROR;
        self.failed |= set.contains(EventSet::ERROR);
        self.readable |= set.intersects(EventSet::IN | EventSet::READ_HANG_UP | ended);
        self.writable |= set.intersects(EventSet::OUT | ended);
    }

    /// A packet of the guest.
    pub fn on_packet(&mut self, shared: &mut Shared, packet: &[u8], reset: bool) {
        match &mut self.stage {
            // The guest asks again for what is being done, or does not want it any more.
            Stage::Connecting(_) => {
                if reset {
                    self.host = None;
                }
            }
            Stage::Waiting => {}
            Stage::Open { sockets, .. } => {
                self.active = shared.now;
                shared
                    .stack
                    .receive(&mut shared.link, sockets, packet, shared.now);
            }
        }
    }

    /// Ends the host's side with a reset.
    pub fn reset_host(&mut self) {
        if let Some(host) = self.host.take() {
            // If it fails the peer sees an ordinary end.
            let _ = sys::reset_on_close(&host);
        }
    }

    /// Does what can be done now.
    pub fn work(&mut self, shared: &mut Shared) -> Verdict {
        self.queued = false;
        match &mut self.stage {
            Stage::Connecting(syn) => {
                let Some(host) = &self.host else {
                    return Verdict::Gone;
                };
                let syn = std::mem::take(syn);
                if !self.writable && !self.failed {
                    if self.deadline <= shared.now {
                        return Verdict::Refused(ErrorKind::TimedOut, syn);
                    }
                    self.stage = Stage::Connecting(syn);
                    return Verdict::Goes;
                }
                match host.take_error() {
                    Ok(None) => self.answer(shared, &syn),
                    Ok(Some(e)) | Err(e) => return Verdict::Refused(e.kind(), syn),
                }
            }
            Stage::Waiting => {
                if shared.link.guest().is_none() || !self.connect(shared) {
                    if self.deadline <= shared.now || shared.link.guest().is_some() {
                        self.reset_host();
                        return Verdict::Gone;
                    }
                    return Verdict::Goes;
                }
            }
            Stage::Open { .. } => {}
        }
        self.exchange(shared)
    }

    /// The host's side is there: the guest's SYN is answered now.
    fn answer(&mut self, shared: &mut Shared, syn: &[u8]) {
        let mut socket = socket();
        // Cannot fail: the port is not 0 and the socket new. If it did the SYN would be answered with a reset.
        let _ = socket.listen(IpListenEndpoint::from((
            *self.key.remote.ip(),
            self.key.remote.port(),
        )));
        self.active = shared.now;
        let (mut sockets, handle) = alone(socket);
        shared
            .stack
            .receive(&mut shared.link, &mut sockets, syn, shared.now);
        self.stage = Stage::Open { sockets, handle };
    }

    /// Begins to connect to the guest.
    fn connect(&mut self, shared: &mut Shared) -> bool {
        let mut socket = socket();
        let guest = (shared.policy.network().guest(), self.key.guest);
        let from = (*self.key.remote.ip(), self.key.remote.port());
        let connecting = socket.connect(shared.stack.context(), guest, from).is_ok();
        if connecting {
            self.active = shared.now;
            let (sockets, handle) = alone(socket);
            self.stage = Stage::Open { sockets, handle };
        }
        connecting
    }

    /// Moves bytes in both directions, and sends what the guest is to have.
    fn exchange(&mut self, shared: &mut Shared) -> Verdict {
        let now = shared.now;
        let Stage::Open { sockets, handle } = &mut self.stage else {
            return Verdict::Goes;
        };
        let socket = sockets.get_mut::<Socket<'_>>(*handle);
        if self.active + patience(socket.state()) <= now {
            socket.abort();
        }
        if let Some(host) = &self.host {
            let mut sides = Sides {
                socket,
                host,
                readable: &mut self.readable,
                writable: &mut self.writable,
                host_done: &mut self.host_done,
                guest_done: &mut self.guest_done,
            };
            match sides.exchange() {
                Ok(true) => self.active = now,
                // After its end the host's side is not read, which else would tell of a reset.
                Ok(false) if !self.failed || !self.host_done => {}
                _ => socket.abort(),
            }
        }
        let poll = shared.stack.send(&mut shared.link, sockets, now);
        let socket = sockets.get::<Socket<'_>>(*handle);
        let state = socket.state();
        let told = socket.remote_endpoint().is_none();
        match state {
            // A reset while it was connecting makes it listen again.
            State::Closed | State::Listen => {
                if !(self.host_done && self.guest_done) {
                    self.reset_host();
                }
                self.host = None;
                if told {
                    return Verdict::Gone;
                }
            }
            State::TimeWait if self.guest_done => self.host = None,
            _ => {}
        }
        self.deadline = self.active + patience(state);
        match poll {
            Some(at) if at <= now && shared.link.blocked() => return Verdict::Stalled,
            Some(at) => self.deadline = self.deadline.min(at.max(now + SOON)),
            None => {}
        }
        Verdict::Goes
    }
}

/// How long nothing may happen.
fn patience(state: State) -> Duration {
    match state {
        State::Established | State::CloseWait | State::FinWait2 => ESTABLISHED,
        _ => TRANSITORY,
    }
}

fn alone(socket: Socket<'static>) -> (SocketSet<'static>, SocketHandle) {
    let mut sockets = SocketSet::new(Vec::with_capacity(1));
    let handle = sockets.add(socket);
    (sockets, handle)
}

fn socket() -> Socket<'static> {
    let buffer = || SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = Socket::new(buffer(), buffer());
    // What is here was already waited for, and what a round brings is acknowledged together.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

/// Both sides while bytes move.
struct Sides<'a> {
    socket: &'a mut Socket<'static>,
    host: &'a TcpStream,
    readable: &'a mut bool,
    writable: &'a mut bool,
    host_done: &'a mut bool,
    guest_done: &'a mut bool,
}

impl Sides<'_> {
    /// Moves what can move. Whether anything did; an error when the host's side is no more.
    fn exchange(&mut self) -> io::Result<bool> {
        if matches!(
            self.socket.state(),
            State::Listen | State::SynSent | State::SynReceived | State::Closed
        ) {
            return Ok(false);
        }
        let sent = self.carry_out()?;
        let received = self.carry_in()?;
        Ok(sent | received)
    }

    fn carry_out(&mut self) -> io::Result<bool> {
        let mut moved = false;
        let mut host = self.host;
        while *self.writable && self.socket.can_recv() {
            let written = self.socket.recv(|bytes| match host.write(bytes) {
                Ok(count) => (count, Ok(count)),
                Err(e) => (0, Err(e)),
            });
            match written {
                Ok(Ok(count)) => moved |= count > 0,
                Ok(Err(e)) if e.kind() == ErrorKind::WouldBlock => *self.writable = false,
                Ok(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(e),
                Err(_) => break,
            }
        }
        let ended = matches!(
            self.socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        if ended && !self.socket.can_recv() && !*self.guest_done {
            *self.guest_done = true;
            // It fails when the other side is gone, which reading tells too.
            let _ = host.shutdown(std::net::Shutdown::Write);
        }
        Ok(moved)
    }

    fn carry_in(&mut self) -> io::Result<bool> {
        let mut moved = false;
        let mut host = self.host;
        while *self.readable && !*self.host_done && self.socket.can_send() {
            let read = self.socket.send(|room| match host.read(room) {
                Ok(count) => (count, Ok(count)),
                Err(e) => (0, Err(e)),
            });
            match read {
                Ok(Ok(0)) => {
                    *self.host_done = true;
                    self.socket.close();
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(e)) if e.kind() == ErrorKind::WouldBlock => *self.readable = false,
                Ok(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(e),
                Err(_) => break,
            }
        }
        Ok(moved)
    }
}
