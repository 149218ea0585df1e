//! Forwarded UDP ports: each client of the host gets a port of the gateway, from which the guest hears it and to which it answers.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};

use smoltcp::time::{Duration, Instant};

use crate::shared::{Shared, Token};

/// Clients of a forwarded port at a time; a new one takes the place of the one that was silent longest.
const MAX_CLIENTS: usize = 256;
/// After so long without a datagram a client is forgotten.
const SILENT: Duration = Duration::from_secs(120);
/// Datagrams of a port before others have their turn.
const MAX_TURN: usize = 64;
/// The first port of the gateway that clients get.
const FIRST_PORT: u16 = 49_152;
/// The largest datagram.
const MAX_DATAGRAM: usize = 65_535;

struct Client {
    address: SocketAddrV4,
    active: Instant,
}

struct Forward {
    socket: UdpSocket,
    guest_port: u16,
    /// By the gateway's port.
    clients: HashMap<u16, Client>,
    last_port: u16,
    /// Datagrams may be waiting.
    ready: bool,
}

/// All forwarded ports.
pub struct UdpForwards {
    forwards: Vec<Forward>,
    buffer: Box<[u8]>,
}

impl UdpForwards {
    pub fn new(shared: &Shared, sockets: Vec<(UdpSocket, u16)>) -> io::Result<UdpForwards> {
        let mut forwards = Vec::new();
        for (number, (socket, guest_port)) in (0..).zip(sockets) {
            shared.watch(&socket, Token::Forward(number))?;
            forwards.push(Forward {
                socket,
                guest_port,
                clients: HashMap::new(),
                last_port: FIRST_PORT,
                ready: false,
            });
        }
        let size = if forwards.is_empty() { 0 } else { MAX_DATAGRAM };
        Ok(UdpForwards {
            forwards,
            buffer: vec![0; size].into_boxed_slice(),
        })
    }

    /// A datagram of the guest for a port of the gateway. False: it is no client's.
    pub fn on_udp(&mut self, shared: &Shared, port: u16, to: u16, payload: &[u8]) -> bool {
        let of_guest = self.forwards.iter_mut().filter(|f| f.guest_port == port);
        for forward in of_guest {
            if let Some(client) = forward.clients.get_mut(&to) {
                client.active = shared.now;
                // What cannot go is lost, as datagrams may be.
                let _ = forward.socket.send_to(payload, client.address);
                return true;
            }
        }
        false
    }

    pub fn on_readable(&mut self, number: u64) {
        let forward = usize::try_from(number)
            .ok()
            .and_then(|n| self.forwards.get_mut(n));
        if let Some(forward) = forward {
            forward.ready = true;
        }
    }

    /// Whether a client waits until the guest is found.
    pub fn waiting(&self) -> bool {
        self.forwards.iter().any(|f| f.ready)
    }

    /// When clients are to be forgotten next.
    pub fn next(&self) -> Option<Instant> {
        let clients = self.forwards.iter().flat_map(|f| f.clients.values());
        clients.map(|c| c.active + SILENT).min()
    }

    /// Passes on what has come, if the guest is known and the link has room; else it waits in the kernel.
    pub fn work(&mut self, shared: &mut Shared, due: bool) {
        for forward in &mut self.forwards {
            if due {
                forward
                    .clients
                    .retain(|_, c| c.active + SILENT > shared.now);
            }
            if forward.ready && shared.link.guest().is_some() {
                forward.ready = forward.receive(shared, &mut self.buffer);
            }
        }
    }
}

impl Forward {
    /// Whether there may be more.
    fn receive(&mut self, shared: &mut Shared, buffer: &mut [u8]) -> bool {
        let gateway = shared.policy.network().gateway();
        for _ in 0..MAX_TURN {
            if !shared.link.has_room() {
                return true;
            }
            let (len, from) = match self.socket.recv_from(buffer) {
                Ok((len, SocketAddr::V4(from))) => (len, from),
                Ok(_) => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                // A client has not got its answer; another may have asked.
                Err(_) => continue,
            };
            if let Some(port) = self.port_of(from, shared.now)
                && let Some(payload) = buffer.get(..len)
            {
                let from = SocketAddrV4::new(gateway, port);
                shared.send_udp(from, self.guest_port, payload);
            }
        }
        true
    }

    fn port_of(&mut self, address: SocketAddrV4, now: Instant) -> Option<u16> {
        let known = self.clients.iter_mut().find(|(_, c)| c.address == address);
        if let Some((port, client)) = known {
            client.active = now;
            return Some(*port);
        }
        if self.clients.len() >= MAX_CLIENTS
            && let Some((oldest, _)) = self.clients.iter().min_by_key(|(_, c)| c.active)
        {
            let oldest = *oldest;
            self.clients.remove(&oldest);
        }
        for _ in FIRST_PORT..=u16::MAX {
            self.last_port = self.last_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.clients.contains_key(&self.last_port) {
                let client = Client {
                    address,
                    active: now,
                };
                self.clients.insert(self.last_port, client);
                return Some(self.last_port);
            }
        }
        None
    }
}
