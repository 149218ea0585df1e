//! What the guest sends: frames are looked through here, each layer's lengths and checksums first, and go to the part they are for.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_SERVER_PORT, EthernetAddress, EthernetFrame,
    EthernetProtocol, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket,
};
use vmm_sys_util::epoll::EventSet;

use crate::dhcp;
use crate::engine::Ports;
use crate::flow::{Flows, MAX_FLOWS};
use crate::link::{self, Offloaded};
use crate::shared::{Shared, Token};
use crate::sys;
use crate::tcp::{Connections, MAX_CONNECTIONS};
use crate::udp_forward::UdpForwards;

/// Between two questions where the guest is.
const ASK: Duration = Duration::from_secs(1);

/// Everything that the guest talks to.
pub struct Guest {
    pub connections: Connections,
    pub flows: Flows,
    forwards: UdpForwards,
    ask_at: Instant,
}

impl Guest {
    pub fn new(shared: &Shared, ports: Ports) -> io::Result<Guest> {
        let descriptors = usize::try_from(sys::descriptor_limit()).unwrap_or(usize::MAX);
        let connections = MAX_CONNECTIONS.min(descriptors / 4);
        Ok(Guest {
            connections: Connections::new(shared, ports.listeners, connections)?,
            flows: Flows::new(MAX_FLOWS.min(descriptors / 8)),
            forwards: UdpForwards::new(shared, ports.datagrams)?,
            ask_at: Instant::ZERO,
        })
    }

    /// What epoll tells of a socket of the host.
    pub fn on_event(&mut self, shared: &mut Shared, token: Token, set: EventSet) {
        match token {
            Token::Link => {}
            Token::Tcp(id) => self.connections.on_event(id, set),
            Token::Flow(id) => self.flows.on_readable(id),
            Token::Listener(number) => self.connections.on_client(shared, number),
            Token::Forward(number) => self.forwards.on_readable(number),
        }
    }

    /// The link has room again.
    pub fn on_room(&mut self) {
        self.connections.on_room();
        self.flows.on_room();
    }

    /// Whether something is to be done at once.
    pub fn busy(&self, shared: &Shared) -> bool {
        let forwards =
            self.forwards.waiting() && shared.link.guest().is_some() && !shared.link.blocked();
        self.connections.busy() || self.flows.busy() || forwards
    }

    /// When something is to be done next, even if nothing comes.
    pub fn next(&self, shared: &Shared) -> Option<Instant> {
        let ask = self.seeks(shared).then_some(self.ask_at);
        [
            self.connections.next(),
            self.flows.next(),
            self.forwards.next(),
            ask,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn seeks(&self, shared: &Shared) -> bool {
        shared.link.guest().is_none() && (self.connections.waiting() || self.forwards.waiting())
    }

    /// Does what is to be done now.
    pub fn work(&mut self, shared: &mut Shared) {
        if self.seeks(shared) && self.ask_at <= shared.now {
            self.ask_at = shared.now + ASK;
            ask(shared);
        }
        let due = self.next(shared).is_some_and(|at| at <= shared.now);
        self.connections.work(shared, due);
        self.flows.work(shared, due);
        self.forwards.work(shared, due);
    }

    /// A message of the device: what makes no sense is dropped.
    pub fn on_message(&mut self, shared: &mut Shared, message: &[u8]) {
        let Some((offloaded, frame)) = link::split(message) else {
            return;
        };
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return;
        };
        let (from, to) = (frame.src_addr(), frame.dst_addr());
        if !from.is_unicast() || !(to == shared.link.mac() || to.is_broadcast()) {
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.on_arp(shared, from, frame.payload()),
            EthernetProtocol::Ipv4 => self.on_ipv4(shared, from, frame.payload(), offloaded),
            _ => {}
        }
    }

    /// The guest is where its packets come from.
    fn learn(&mut self, shared: &mut Shared, mac: EthernetAddress) {
        let found = shared.link.guest().is_none();
        shared.link.learn(mac);
        if found {
            self.connections.on_found();
        }
    }

    fn on_arp(&mut self, shared: &mut Shared, from: EthernetAddress, payload: &[u8]) {
        let Ok(packet) = ArpPacket::new_checked(payload) else {
            return;
        };
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
        else {
            return;
        };
        if source_hardware_addr != from {
            return;
        }
        if source_protocol_addr == shared.policy.network().guest() {
            self.learn(shared, from);
        }
        // Whoever asks for the guest's address or another one looks whether it is free: it is.
        if operation != ArpOperation::Request || !shared.policy.is_ours(target_protocol_addr) {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: shared.link.mac(),
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        send_arp(shared, from, &reply);
    }

    fn on_ipv4(
        &mut self,
        shared: &mut Shared,
        from: EthernetAddress,
        payload: &[u8],
        offloaded: Offloaded,
    ) {
        let Ok(ip) = Ipv4Packet::new_checked(payload) else {
            return;
        };
        if ip.version() != 4 || !ip.verify_checksum() || ip.more_frags() || ip.frag_offset() != 0 {
            return;
        }
        let Some(packet) = payload.get(..usize::from(ip.total_len())) else {
            return;
        };
        let (source, to) = (ip.src_addr(), ip.dst_addr());
        if source == shared.policy.network().guest() {
            self.learn(shared, from);
        } else if !(source.is_unspecified() && ip.next_header() == IpProtocol::Udp) {
            // Without an address a guest can only ask for one.
            return;
        }
        match ip.next_header() {
            IpProtocol::Tcp => {
                let Ok(segment) = TcpPacket::new_checked(ip.payload()) else {
                    return;
                };
                let intact =
                    offloaded.checksum || segment.verify_checksum(&source.into(), &to.into());
                if intact && segment.src_port() != 0 {
                    self.connections.on_packet(shared, to, packet, &segment);
                }
            }
            IpProtocol::Udp => {
                let Ok(datagram) = UdpPacket::new_checked(ip.payload()) else {
                    return;
                };
                let intact = offloaded.checksum
                    || datagram.checksum() == 0
                    || datagram.verify_checksum(&source.into(), &to.into());
                if intact && datagram.src_port() != 0 {
                    self.on_udp(shared, source, to, &datagram, packet);
                }
            }
            IpProtocol::Icmp => self.on_icmp(shared, to, ip.payload(), packet),
            _ => {}
        }
    }

    fn on_udp(
        &mut self,
        shared: &mut Shared,
        source: Ipv4Addr,
        to: Ipv4Addr,
        datagram: &UdpPacket<&[u8]>,
        packet: &[u8],
    ) {
        let network = shared.policy.network();
        let (port, to_port) = (datagram.src_port(), datagram.dst_port());
        let local = to.is_broadcast() || to == network.broadcast() || to == network.gateway();
        if to_port == DHCP_SERVER_PORT && local {
            if let Some(answer) = dhcp::answer(network, shared.mtu(), datagram.payload()) {
                let from = SocketAddrV4::new(network.gateway(), DHCP_SERVER_PORT);
                let to = SocketAddrV4::new(answer.address, answer.port);
                shared.send_udp_to(answer.mac, from, to, &answer.message);
            }
            return;
        }
        if source.is_unspecified() {
            return;
        }
        if to == network.gateway()
            && self
                .forwards
                .on_udp(shared, port, to_port, datagram.payload())
        {
            return;
        }
        let to = SocketAddrV4::new(to, to_port);
        self.flows
            .on_udp(shared, port, to, datagram.payload(), packet);
    }

    fn on_icmp(&mut self, shared: &mut Shared, to: Ipv4Addr, message: &[u8], packet: &[u8]) {
        let Ok(icmp) = Icmpv4Packet::new_checked(message) else {
            return;
        };
        let Ok(Icmpv4Repr::EchoRequest {
            ident,
            seq_no,
            data,
        }) = Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default())
        else {
            return;
        };
        if shared.policy.is_ours(to) {
            let reply = Icmpv4Repr::EchoReply {
                ident,
                seq_no,
                data,
            };
            shared.send_icmp(to, &reply);
        } else {
            self.flows.on_echo(shared, ident, to, message, packet);
        }
    }
}

/// Asks where the guest is.
fn ask(shared: &mut Shared) {
    let network = shared.policy.network();
    let question = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: shared.link.mac(),
        source_protocol_addr: network.gateway(),
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: network.guest(),
    };
    send_arp(shared, EthernetAddress::BROADCAST, &question);
}

fn send_arp(shared: &mut Shared, to: EthernetAddress, message: &ArpRepr) {
    let len = message.buffer_len();
    shared
        .link
        .send_frame(to, EthernetProtocol::Arp, len, |bytes| {
            message.emit(&mut ArpPacket::new_unchecked(bytes));
        });
}
