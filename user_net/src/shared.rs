//! What every part of the engine works with: the link, the stack, the rules, and the host's side of things.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpProtocol,
    Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::link::Link;
use crate::policy::Policy;
use crate::stack::Stack;
use crate::sys;

/// Bytes of an IPv4 header without options.
const IPV4_LEN: usize = 20;
/// Bytes of a packet that an ICMP error quotes: its header and the first of what follows.
const QUOTED: usize = 8;

/// Opens the sockets that lead outside; fuzzing puts something harmless in its place.
pub trait Outside: Send {
    /// A connection that is being made, see [`sys::connect`].
    fn connect(&mut self, to: SocketAddrV4) -> io::Result<TcpStream>;
    /// A socket for datagrams to anybody, which does not block.
    fn datagrams(&mut self) -> io::Result<UdpSocket>;
    /// A socket for echo requests, which does not block.
    fn pings(&mut self) -> io::Result<UdpSocket>;
}

/// The host's own network.
pub struct HostNetwork;

impl Outside for HostNetwork {
    fn connect(&mut self, to: SocketAddrV4) -> io::Result<TcpStream> {
        sys::connect(to)
    }

    fn datagrams(&mut self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    fn pings(&mut self) -> io::Result<UdpSocket> {
        sys::ping_socket()
    }
}

/// Whose descriptor epoll tells of.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Token {
    /// The device's socket.
    Link,
    /// A connection, by its number.
    Tcp(u64),
    /// A flow of datagrams or echo requests, by its number.
    Flow(u64),
    /// A forwarded port that takes connections.
    Listener(u64),
    /// A forwarded port that takes datagrams.
    Forward(u64),
}

const KIND_SHIFT: u32 = 60;

impl Token {
    fn to_bits(self) -> u64 {
        let (kind, number) = match self {
            Token::Link => (0, 0),
            Token::Tcp(n) => (1, n),
            Token::Flow(n) => (2, n),
            Token::Listener(n) => (3, n),
            Token::Forward(n) => (4, n),
        };
        kind << KIND_SHIFT | number
    }

    pub fn from_bits(bits: u64) -> Option<Token> {
        let number = bits & ((1 << KIND_SHIFT) - 1);
        Some(match bits >> KIND_SHIFT {
            0 => Token::Link,
            1 => Token::Tcp(number),
            2 => Token::Flow(number),
            3 => Token::Listener(number),
            4 => Token::Forward(number),
            _ => return None,
        })
    }
}

/// The shared part of the engine.
pub struct Shared {
    pub link: Link,
    pub stack: Stack,
    pub policy: Policy,
    pub outside: Box<dyn Outside>,
    pub epoll: Epoll,
    /// The time of this round.
    pub now: Instant,
    mtu: usize,
    ident: u16,
    scratch: Vec<u8>,
}

impl Shared {
    pub fn new(link: Link, stack: Stack, policy: Policy, epoll: Epoll, mtu: u16) -> Shared {
        Shared {
            link,
            stack,
            policy,
            outside: Box::new(HostNetwork),
            epoll,
            now: Instant::ZERO,
            mtu: usize::from(mtu),
            ident: 0,
            scratch: Vec::new(),
        }
    }

    /// Has epoll tell when `socket` becomes readable or writable, once each time.
    pub fn watch(&self, socket: &impl AsRawFd, token: Token) -> io::Result<()> {
        self.epoll.ctl(
            ControlOperation::Add,
            socket.as_raw_fd(),
            EpollEvent::new(
                EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED,
                token.to_bits(),
            ),
        )
    }

    /// Bytes of the largest packet.
    pub fn mtu(&self) -> u16 {
        // It came as one.
        self.mtu as u16
    }

    /// Sends a datagram to the guest.
    pub fn send_udp(&mut self, from: SocketAddrV4, port: u16, payload: &[u8]) {
        let (Some(mac), to) = (self.link.guest(), self.policy.network().guest()) else {
            return;
        };
        self.send_udp_to(mac, from, SocketAddrV4::new(to, port), payload);
    }

    /// Sends a datagram to whoever has `mac`.
    pub fn send_udp_to(
        &mut self,
        mac: EthernetAddress,
        from: SocketAddrV4,
        to: SocketAddrV4,
        payload: &[u8],
    ) {
        let header = UdpRepr {
            src_port: from.port(),
            dst_port: to.port(),
        };
        let len = header.header_len() + payload.len();
        if len > usize::from(u16::MAX) - IPV4_LEN {
            return;
        }
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        bytes.resize(len, 0);
        header.emit(
            &mut UdpPacket::new_unchecked(&mut bytes),
            &(*from.ip()).into(),
            &(*to.ip()).into(),
            payload.len(),
            |part| part.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
        self.send_ipv4(mac, *from.ip(), *to.ip(), IpProtocol::Udp, &bytes);
        self.scratch = bytes;
    }

    /// Sends an ICMP message to the guest.
    pub fn send_icmp(&mut self, from: Ipv4Addr, message: &Icmpv4Repr<'_>) {
        let Some(mac) = self.link.guest() else {
            return;
        };
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        bytes.resize(message.buffer_len(), 0);
        message.emit(
            &mut Icmpv4Packet::new_unchecked(&mut bytes),
            &ChecksumCapabilities::default(),
        );
        let to = self.policy.network().guest();
        self.send_ipv4(mac, from, to, IpProtocol::Icmp, &bytes);
        self.scratch = bytes;
    }

    /// Tells the guest that its `packet` did not arrive. The error comes from the gateway, or where the reason is a port that
    /// is not there, from the host that lacks it.
    pub fn send_unreachable(&mut self, reason: Icmpv4DstUnreachable, packet: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else {
            return;
        };
        let Ok(header) = Ipv4Repr::parse(&ip, &ChecksumCapabilities::ignored()) else {
            return;
        };
        let from = match reason {
            Icmpv4DstUnreachable::PortUnreachable => header.dst_addr,
            _ => self.policy.network().gateway(),
        };
        let data = ip.payload();
        let message = Icmpv4Repr::DstUnreachable {
            reason,
            header,
            data: &data[..data.len().min(QUOTED)],
        };
        self.send_icmp(from, &message);
    }

    /// Sends a packet, in pieces if the MTU asks for that (RFC 791 §2.3).
    fn send_ipv4(
        &mut self,
        mac: EthernetAddress,
        from: Ipv4Addr,
        to: Ipv4Addr,
        protocol: IpProtocol,
        payload: &[u8],
    ) {
        let most = self.mtu - IPV4_LEN;
        let whole = payload.len() <= most;
        // Offsets count eight bytes.
        let step = if whole { most } else { most & !7 };
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        for (index, part) in payload.chunks(step).enumerate() {
            let offset = index * step;
            let header = Ipv4Repr {
                src_addr: from,
                dst_addr: to,
                next_header: protocol,
                payload_len: part.len(),
                hop_limit: 64,
            };
            let len = IPV4_LEN + part.len();
            self.link
                .send_frame(mac, EthernetProtocol::Ipv4, len, |bytes| {
                    let mut packet = Ipv4Packet::new_unchecked(bytes);
                    header.emit(&mut packet, &ChecksumCapabilities::ignored());
                    if !whole {
                        packet.set_ident(ident);
                        packet.set_dont_frag(false);
                        packet.set_frag_offset(offset as u16);
                        packet.set_more_frags(offset + part.len() < payload.len());
                    }
                    packet.fill_checksum();
                    packet.payload_mut().copy_from_slice(part);
                });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_epoll() {
        for token in [
            Token::Link,
            Token::Tcp(7),
            Token::Flow((1 << 60) - 1),
            Token::Listener(0),
            Token::Forward(3),
        ] {
            assert_eq!(Token::from_bits(token.to_bits()), Some(token));
        }
        assert_eq!(Token::from_bits(u64::MAX), None);
    }
}
