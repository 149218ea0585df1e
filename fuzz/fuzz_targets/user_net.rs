//! The network inside the process, with a guest that sends any frame and a host's side that does anything but reach a network.
//!
//! Holds to: no panic; connections and flows stay within their limits; each frame for the guest is whole, addressed to it, no longer than the
//! MTU unless the guest takes segments, and has the checksum it says; all is forgotten after a time without traffic, and then a
//! connection is answered as the first one was.

#![no_main]

use std::collections::HashMap;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use user_net::testing::Harness;
use user_net::{MAX_CONNECTIONS, MAX_FLOWS, UserNetConfig};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x15];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
const ADDRESS: [u8; 4] = [10, 0, 2, 15];
const HEADER: usize = 12;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const MTU: usize = 1500;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    host_loopback: bool,
    offloads: (bool, bool),
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A message of any bytes.
    Raw(Bytes<'a>),
    /// A frame to the gateway of this kind.
    Frame(Kind, Bytes<'a>),
    /// A packet with a good header: protocol, address.
    Packet(u8, Address, Bytes<'a>),
    Udp(Address, u8, u16, Bytes<'a>),
    Tcp(Tcp),
    /// A connection is made, from the first to the third segment.
    Open(u8),
    /// As the last segment was addressed, but for what is said here.
    Again(Flags, Option<i32>, Option<i32>, u16, u16),
    /// One of the far ends reads and writes so much; with neither it closes.
    Serve(u8, u16, u32),
    Turn,
    /// Frames for the guest are left in the socket from now on, or taken.
    Hold(bool),
    Advance(u16),
    Offloads(bool, bool),
}

/// At most 255 bytes, so that there is something left for the next step.
#[derive(Debug)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Arbitrary<'a> for Bytes<'a> {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Bytes<'a>> {
        let len = usize::from(u8::arbitrary(u)?).min(u.len());
        Ok(Bytes(u.bytes(len)?))
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Arp,
    Ipv4,
    Other(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Gateway,
    Dns,
    Broadcast,
    Outside,
    Any([u8; 4]),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Tcp {
    to: Address,
    /// Of the guest and of the other side; few of each, so that connections are met again.
    ports: (u8, Port),
    flags: Flags,
    /// Beside what the other side expects, if not that.
    seq: Option<i32>,
    ack: Option<i32>,
    window: u16,
    options: [u8; 12],
    /// A good maximum segment size and window scale, or what `options` has.
    good: bool,
    len: u16,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Flags {
    Syn,
    Ack,
    FinAck,
    RstAck,
    Any(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Port {
    Refused,
    Unreachable,
    Silent,
    Served(u8),
}

/// The first segment of a connection that is served.
fn opening(port: u8) -> Tcp {
    Tcp {
        to: Address::Outside,
        ports: (port, Port::Served(0)),
        flags: Flags::Syn,
        seq: Some(7),
        ack: None,
        window: 1000,
        options: [1; 12],
        good: true,
        len: 0,
    }
}

fn address(address: Address) -> [u8; 4] {
    match address {
        Address::Gateway => [10, 0, 2, 2],
        Address::Dns => [10, 0, 2, 3],
        Address::Broadcast => [255; 4],
        Address::Outside => [192, 0, 2, 1],
        Address::Any(any) => any,
    }
}

/// The sum of RFC 1071 over `bytes`, begun with `sum`.
fn sum(bytes: &[u8], sum: u32) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)));
    let mut all = u64::from(sum) + words.map(u64::from).sum::<u64>();
    while all > 0xffff {
        all = (all >> 16) + (all & 0xffff);
    }
    all as u16
}

fn frame(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![0; HEADER];
    // The checksum of what is in it is left out.
    message[0] = 1;
    message.extend(GATEWAY_MAC);
    message.extend(MAC);
    message.extend(kind.to_be_bytes());
    message.extend(payload);
    message
}

fn packet(protocol: u8, to: Address, payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    ip[2..4].copy_from_slice(&((IPV4 + payload.len()) as u16).to_be_bytes());
    ip.extend(ADDRESS);
    ip.extend(address(to));
    let check = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    ip.extend(payload);
    frame(0x0800, &ip)
}

struct World {
    harness: Harness,
    last: Option<Tcp>,
    /// By the guest's port: what the other side sends next, and what it expects.
    next: HashMap<u16, (u32, u32)>,
    hold: bool,
    tso: bool,
}

impl World {
    fn send(&mut self, message: &[u8]) {
        self.harness.send(message).expect("the engine has ended");
        self.look();
    }

    fn look(&mut self) {
        assert!(self.harness.connections() <= MAX_CONNECTIONS);
        assert!(self.harness.flows() <= MAX_FLOWS);
        while !self.hold {
            let Some(message) = self.harness.receive() else {
                return;
            };
            self.check(&message);
        }
    }

    fn check(&mut self, message: &[u8]) {
        let (header, frame) = message.split_at(HEADER);
        assert!(frame[..6] == MAC || frame[..6] == [0xff; 6] || frame[0] & 1 == 0);
        assert_eq!(frame[6..12], GATEWAY_MAC);
        let payload = &frame[ETHERNET..];
        if frame[12..14] != [8, 0] {
            assert_eq!((&frame[12..14], payload.len()), (&[8, 6][..], 28));
            return;
        }
        assert_eq!(sum(&payload[..IPV4], 0), 0xffff, "IPv4 checksum");
        let total = usize::from(u16::from_be_bytes([payload[2], payload[3]]));
        assert_eq!(total, payload.len());
        assert!(
            total <= MTU || (self.tso && header[1] == 1),
            "{total} bytes"
        );
        if payload[9] != 6 {
            return;
        }
        let tcp = &payload[IPV4..];
        let pseudo = u32::from(sum(&payload[12..20], 6 + tcp.len() as u32));
        if header[0] == 0 {
            assert_eq!(sum(tcp, pseudo), 0xffff, "TCP checksum");
        } else {
            assert_eq!(u32::from(u16::from_be_bytes([tcp[16], tcp[17]])), pseudo);
        }
        let number =
            |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let port = u16::from_be_bytes([tcp[2], tcp[3]]);
        let data = tcp.len() - usize::from(tcp[12] >> 4) * 4;
        let length = data as u32 + u32::from(tcp[13] & 2 != 0) + u32::from(tcp[13] & 1);
        self.next
            .insert(port, (number(4).wrapping_add(length), number(8)));
    }

    fn tcp(&mut self, tcp: &Tcp) {
        let port = 1024 + u16::from(tcp.ports.0 % 8);
        let to = match tcp.ports.1 {
            Port::Refused => 1,
            Port::Unreachable => 2,
            Port::Silent => 3,
            Port::Served(n) => 80 + u16::from(n % 2),
        };
        let (theirs, expected) = self.next.get(&port).copied().unwrap_or((0, 0));
        let mut options = tcp.options.to_vec();
        if tcp.good {
            options = vec![2, 4, 5, 180, 3, 3, 7, 0];
        }
        let flags = match tcp.flags {
            Flags::Syn => 2,
            Flags::Ack => 0x10,
            Flags::FinAck => 0x11,
            Flags::RstAck => 0x14,
            Flags::Any(flags) => flags,
        };
        let mut segment = Vec::new();
        segment.extend(port.to_be_bytes());
        segment.extend(to.to_be_bytes());
        segment.extend(
            expected
                .wrapping_add_signed(tcp.seq.unwrap_or(0))
                .to_be_bytes(),
        );
        segment.extend(
            theirs
                .wrapping_add_signed(tcp.ack.unwrap_or(0))
                .to_be_bytes(),
        );
        segment.extend([((20 + options.len()) as u8 / 4) << 4, flags]);
        segment.extend(tcp.window.to_be_bytes());
        segment.extend([0; 4]);
        segment.extend(options);
        segment.resize(segment.len() + usize::from(tcp.len).min(60_000), b'g');
        self.send(&packet(6, tcp.to, &segment));
    }

    fn step(&mut self, step: &Step<'_>) {
        match step {
            Step::Raw(bytes) => self.send(bytes.0),
            Step::Frame(kind, bytes) => {
                let kind = match kind {
                    Kind::Arp => 0x0806,
                    Kind::Ipv4 => 0x0800,
                    Kind::Other(kind) => *kind,
                };
                self.send(&frame(kind, bytes.0));
            }
            Step::Packet(protocol, to, bytes) => self.send(&packet(*protocol, *to, bytes.0)),
            Step::Udp(to, from, port, bytes) => {
                let mut datagram = vec![0x10, *from];
                datagram.extend(port.to_be_bytes());
                datagram.extend(((8 + bytes.0.len()) as u16).to_be_bytes());
                datagram.extend([0; 2]);
                datagram.extend(bytes.0);
                self.send(&packet(17, *to, &datagram));
            }
            Step::Tcp(tcp) => {
                self.last = Some(*tcp);
                self.tcp(tcp);
            }
            Step::Open(port) => {
                let syn = opening(*port);
                self.step(&Step::Tcp(syn));
                self.step(&Step::Again(Flags::Ack, None, None, 1000, 0));
            }
            Step::Again(flags, seq, ack, window, len) => {
                if let Some(last) = self.last {
                    self.tcp(&Tcp {
                        flags: *flags,
                        seq: *seq,
                        ack: *ack,
                        window: *window,
                        len: *len,
                        options: [1; 12],
                        good: false,
                        ..last
                    });
                }
            }
            Step::Serve(which, read, write) => {
                let write = (*write as usize).min(1 << 18);
                self.harness
                    .serve(usize::from(*which), usize::from(*read), write);
                self.turn();
            }
            Step::Turn => self.turn(),
            Step::Hold(hold) => {
                self.hold = *hold;
                self.look();
            }
            Step::Advance(millis) => {
                self.harness
                    .advance(Duration::from_millis(u64::from(*millis) * 16));
                self.turn();
            }
            Step::Offloads(checksum, tso) => {
                self.harness.set_offloads(*checksum, *tso);
                // What is on its way is as large as it was.
                self.tso |= checksum & tso;
            }
        }
    }

    fn turn(&mut self) {
        self.harness.turn().expect("the engine has ended");
        self.look();
    }
}

fuzz_target!(|case: Case<'_>| {
    let config = UserNetConfig {
        host_loopback: case.host_loopback,
        ..UserNetConfig::default()
    };
    let mut harness = Harness::new(&config).expect("descriptors");
    harness.set_offloads(case.offloads.0, case.offloads.1);
    let mut world = World {
        harness,
        last: None,
        next: HashMap::new(),
        hold: false,
        tso: case.offloads.0 & case.offloads.1,
    };
    for step in case.steps.iter().take(200) {
        world.step(step);
    }
    world.hold = false;
    world.look();
    for _ in 0..3 {
        world.harness.advance(Duration::from_secs(3 * 60 * 60));
        for _ in 0..8 {
            world.turn();
        }
    }
    assert_eq!((world.harness.connections(), world.harness.flows()), (0, 0));
    world.next.clear();
    world.tcp(&opening(0));
    assert_eq!(
        world.next.get(&1024).map(|n| n.1),
        Some(8),
        "no answer to a SYN"
    );
});
