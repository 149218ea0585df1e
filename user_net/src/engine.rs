//! The engine: what comes from the device goes to the part it is for, what epoll tells of goes to whom it is about, and once a
//! round what was made for the device is sent.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time;

use smoltcp::time::{Duration, Instant};
use smoltcp::wire::EthernetAddress;
use thiserror::Error;
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use crate::config::UserNetConfig;
use crate::forward::{HostForward, Protocol};
use crate::guest::Guest;
use crate::link::{Inbox, Link, Offloads};
use crate::policy::Policy;
use crate::shared::{Shared, Token};
use crate::stack::Stack;
use crate::sys;

/// The MTUs that a network can have, in bytes: from what every host has to take in one piece (RFC 791 §3.1) to what an offloaded segment can be
/// at most.
pub const MTUS: RangeInclusive<u16> = 576..=65_521;
/// Batches of frames that the guest may send before others have their turn.
const MAX_BATCHES: usize = 8;
/// Events a look.
const EVENTS: usize = 64;

/// Why there is no network, or no more.
#[derive(Debug, Error)]
pub enum UserNetError {
    /// Something that the kernel did not give.
    #[error("user network: {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The port of a forward cannot be had; the source says why, as when it is in use.
    #[error("user network: listening for forward \"{forward}\"")]
    Listen {
        /// The forward.
        forward: HostForward,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A forward to an address that is not the guest's.
    #[error(
        "user network: forward \"{forward}\" leads to another address than the guest's, {guest}"
    )]
    ForwardAddress {
        /// The forward.
        forward: HostForward,
        /// The only address that there is.
        guest: Ipv4Addr,
    },
    /// An MTU that is too small or too large.
    #[error("user network: MTU {0} is not from {least} to {most}", least = MTUS.start(), most = MTUS.end())]
    Mtu(u16),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> UserNetError {
    move |source| UserNetError::System { what, source }
}

/// A network with one guest, before and while it runs.
pub struct UserNet {
    engine: Engine,
    addresses: Vec<SocketAddrV4>,
}

impl UserNet {
    /// Makes the network, opens the forwarded ports, and gives the device's end: a socket of messages (`SOCK_SEQPACKET`) that
    /// does not block. Nothing moves before [`UserNet::run`].
    ///
    /// # Errors
    ///
    /// When a forwarded port cannot be had, the MTU is out of range, or the kernel is out of descriptors.
    pub fn new(config: &UserNetConfig) -> Result<(UserNet, OwnedFd), UserNetError> {
        if !MTUS.contains(&config.mtu) {
            return Err(UserNetError::Mtu(config.mtu));
        }
        let guest = config.network.guest();
        let mut ports = Ports::default();
        let mut addresses = Vec::new();
        for forward in &config.hostfwd {
            if forward.guest_address.is_some_and(|a| a != guest) {
                return Err(UserNetError::ForwardAddress {
                    forward: *forward,
                    guest,
                });
            }
            let address = ports.open(forward).map_err(|source| UserNetError::Listen {
                forward: *forward,
                source,
            })?;
            addresses.push(address);
        }
        let (ours, device) = sys::message_pair().map_err(system("making a pair of sockets"))?;
        let engine = Engine::new(config, ours, ports)?;
        Ok((UserNet { engine, addresses }, device))
    }

    /// Where the host listens, in the order of the forwards.
    pub fn forwards(&self) -> &[SocketAddrV4] {
        &self.addresses
    }

    /// Where the device tells what its driver takes.
    pub fn offloads(&self) -> Arc<Offloads> {
        Arc::clone(self.engine.shared.link.offloads())
    }

    /// Carries packets until the device's end is closed. All connections end with it.
    ///
    /// # Errors
    ///
    /// When the kernel does not let it wait any more.
    pub fn run(mut self) -> Result<(), UserNetError> {
        while self.engine.turn(true)? {}
        Ok(())
    }
}

/// The forwarded ports.
#[derive(Default)]
pub struct Ports {
    pub listeners: Vec<(TcpListener, u16)>,
    pub datagrams: Vec<(UdpSocket, u16)>,
}

impl Ports {
    fn open(&mut self, forward: &HostForward) -> io::Result<SocketAddrV4> {
        let address = match forward.protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(forward.host)?;
                listener.set_nonblocking(true)?;
                let address = listener.local_addr()?;
                self.listeners.push((listener, forward.guest_port));
                address
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(forward.host)?;
                socket.set_nonblocking(true)?;
                let address = socket.local_addr()?;
                self.datagrams.push((socket, forward.guest_port));
                address
            }
        };
        match address {
            std::net::SocketAddr::V4(address) => Ok(address),
            std::net::SocketAddr::V6(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// All parts together.
pub struct Engine {
    pub shared: Shared,
    pub guest: Guest,
    inbox: Inbox,
    started: time::Instant,
    /// How much later it is than the clock says.
    pub ahead: time::Duration,
    events: Vec<EpollEvent>,
    /// Frames of the guest may be waiting.
    readable: bool,
}

impl Engine {
    pub fn new(
        config: &UserNetConfig,
        socket: OwnedFd,
        ports: Ports,
    ) -> Result<Engine, UserNetError> {
        let gateway = config.network.gateway().octets();
        // Locally administered, and another one in each network.
        let mac = EthernetAddress([0x52, 0x55, gateway[0], gateway[1], gateway[2], gateway[3]]);
        let epoll = Epoll::new().map_err(system("making an epoll"))?;
        let mut link = Link::new(socket, mac);
        let stack = Stack::new(&mut link, config.mtu, Instant::ZERO);
        let shared = Shared::new(link, stack, Policy::new(config), epoll, config.mtu);
        let watching = "watching a socket";
        shared
            .watch(&shared.link, Token::Link)
            .map_err(system(watching))?;
        let guest = Guest::new(&shared, ports).map_err(system(watching))?;
        Ok(Engine {
            shared,
            guest,
            inbox: Inbox::new(),
            started: time::Instant::now(),
            ahead: time::Duration::ZERO,
            events: vec![EpollEvent::default(); EVENTS],
            readable: true,
        })
    }

    /// One round: waits if nothing is to do and `wait` says so, and does what there is. False when the device's end is gone.
    pub fn turn(&mut self, wait: bool) -> Result<bool, UserNetError> {
        let timeout = self.timeout(wait);
        let count = match self.shared.epoll.wait(timeout, &mut self.events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            result => result.map_err(system("waiting for sockets"))?,
        };
        self.clock();
        for event in self.events.iter().take(count) {
            let set = event.event_set();
            match Token::from_bits(event.data()) {
                Some(Token::Link) => {
                    if set.intersects(EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR)
                    {
                        self.shared.link.close();
                    }
                    if set.contains(EventSet::OUT) {
                        self.shared.link.on_writable();
                        self.guest.on_room();
                    }
                    self.readable |= set.contains(EventSet::IN);
                }
                Some(token) => self.guest.on_event(&mut self.shared, token, set),
                None => {}
            }
        }
        self.shared
            .stack
            .renew(&mut self.shared.link, self.shared.now);
        for _ in 0..MAX_BATCHES {
            self.readable = self.readable && self.shared.link.receive(&mut self.inbox);
            if !self.readable {
                break;
            }
            for message in self.inbox.messages() {
                self.guest.on_message(&mut self.shared, message);
            }
            self.guest.work(&mut self.shared);
        }
        self.guest.work(&mut self.shared);
        self.shared.link.flush();
        Ok(!self.shared.link.closed())
    }

    /// Milliseconds to wait for events, -1 for ever.
    fn timeout(&mut self, wait: bool) -> i32 {
        if !wait || self.readable || self.guest.busy(&self.shared) {
            return 0;
        }
        self.clock();
        match self.guest.next(&self.shared) {
            None => -1,
            // Not before it is due.
            Some(at) if at > self.shared.now => {
                let micros = (at - self.shared.now).total_micros();
                i32::try_from(micros.div_ceil(1000)).unwrap_or(i32::MAX)
            }
            Some(_) => 0,
        }
    }

    fn clock(&mut self) {
        let passed = self.started.elapsed() + self.ahead;
        self.shared.now = Instant::ZERO
            + Duration::from_micros(u64::try_from(passed.as_micros()).unwrap_or(u64::MAX));
    }
}
