//! The TCP/IP stack that ends the guest's connections: one `smoltcp` interface that has every address, and a socket set a
//! connection, so that a packet costs the same however many connections there are.

use std::hash::{BuildHasher, RandomState};

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta, RxToken,
    SegmentationCapabilities, TxToken,
};
use smoltcp::time::Instant;
use smoltcp::wire::HardwareAddress;

use crate::link::{ETHERNET_LEN, Link};

/// Packets that a connection may send before others have their turn; far more than fit in its window.
const MAX_EGRESS: usize = 1024;

/// The interface. Packets come without Ethernet, with their checksums verified.
pub struct Stack {
    interface: Interface,
    mtu: u16,
    tso: bool,
}

impl Stack {
    pub fn new(link: &mut Link, mtu: u16, now: Instant) -> Stack {
        let tso = link.offloads().tso4();
        Stack {
            interface: interface(link, mtu, tso, now),
            mtu,
            tso,
        }
    }

    /// Follows what the guest takes. Connections know nothing of the interface, so that a new one will do.
    pub fn renew(&mut self, link: &mut Link, now: Instant) {
        if link.offloads().tso4() != self.tso {
            *self = Stack::new(link, self.mtu, now);
        }
    }

    /// What a socket needs to connect.
    pub fn context(&mut self) -> &mut smoltcp::iface::Context {
        self.interface.context()
    }

    /// Gives `packet` to the sockets; without one that it is for, it is answered with a reset.
    pub fn receive(
        &mut self,
        link: &mut Link,
        sockets: &mut SocketSet<'_>,
        packet: &[u8],
        now: Instant,
    ) {
        let mut port = Port {
            packet: Some(packet),
            link,
            mtu: self.mtu,
            tso: self.tso,
        };
        self.interface.poll_ingress_single(now, &mut port, sockets);
    }

    /// Sends what the sockets have and the link takes. The time at which they want to be asked again.
    pub fn send(
        &mut self,
        link: &mut Link,
        sockets: &mut SocketSet<'_>,
        now: Instant,
    ) -> Option<Instant> {
        let mut port = Port {
            packet: None,
            link,
            mtu: self.mtu,
            tso: self.tso,
        };
        for _ in 0..MAX_EGRESS {
            if self.interface.poll_egress(now, &mut port, sockets) == PollResult::None {
                break;
            }
        }
        self.interface.poll_at(now, sockets)
    }
}

fn interface(link: &mut Link, mtu: u16, tso: bool, now: Instant) -> Interface {
    let mut port = Port {
        packet: None,
        link,
        mtu,
        tso,
    };
    let mut config = Config::new(HardwareAddress::Ip);
    // Sequence numbers come from it.
    config.random_seed = RandomState::new().hash_one(now.total_micros());
    let mut interface = Interface::new(config, &mut port, now);
    interface.set_any_ip(true);
    interface
}

/// The device that `smoltcp` sees: at most one packet comes in, any number go out.
struct Port<'a> {
    packet: Option<&'a [u8]>,
    link: &'a mut Link,
    mtu: u16,
    tso: bool,
}

impl Device for Port<'_> {
    type RxToken<'b>
        = Incoming<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Outgoing<'b>
    where
        Self: 'b;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let packet = self.packet.take()?;
        Some((
            Incoming(packet),
            Outgoing {
                link: self.link,
                segment: None,
            },
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        self.link.has_room().then_some(Outgoing {
            link: self.link,
            segment: None,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::ignored();
        checksum.ipv4 = Checksum::Tx;
        let mut segmentation = SegmentationCapabilities::default();
        // An IPv4 packet's length has 16 bits, and the limit counts the Ethernet header.
        segmentation.tcpv4 = self
            .tso
            .then_some(65_535 - ETHERNET_LEN)
            .and_then(std::num::NonZeroUsize::new);
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ip;
        all.max_transmission_unit = usize::from(self.mtu);
        all.checksum = checksum;
        all.segmentation = segmentation;
        all
    }
}

struct Incoming<'a>(&'a [u8]);

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Outgoing<'a> {
    link: &'a mut Link,
    segment: Option<u16>,
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.link.send_tcp(len, self.segment, f)
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(|size| size.get());
    }
}
