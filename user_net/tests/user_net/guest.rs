//! A guest: a TCP/IP stack at the device's end of the network, which checks each frame it gets.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{
    Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, SegmentationCapabilities,
    TxToken,
};
use smoltcp::socket::{icmp, tcp, udp};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Packet, TcpPacket};
use user_net::{Offloads, Resolver, UserNet, UserNetConfig, UserNetError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Bytes of the header before a frame.
const HEADER: usize = 12;
const ETHERNET: usize = 14;
pub const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x15];
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// The network, on its thread.
pub struct Network {
    pub thread: Option<JoinHandle<Result<(), UserNetError>>>,
    pub offloads: Arc<Offloads>,
    pub forwards: Vec<SocketAddrV4>,
}

/// With the host's loopback open, and a resolver that is not there.
pub fn config() -> UserNetConfig {
    UserNetConfig {
        host_loopback: true,
        resolver: Resolver::Address("127.0.0.1:1".parse().unwrap()),
        ..UserNetConfig::default()
    }
}

pub struct Guest {
    pub network: Network,
    pub wire: Wire,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    next_port: u16,
    started: Instant,
}

impl Guest {
    /// A guest that has its address.
    pub fn new(config: &UserNetConfig) -> Guest {
        Guest::with_offloads(config, false)
    }

    /// One whose device does checksums and segmentation.
    pub fn with_offloads(config: &UserNetConfig, offloads: bool) -> Guest {
        let mut guest = Guest::without_address(config, offloads);
        guest.set_address();
        guest
    }

    pub fn without_address(config: &UserNetConfig, offloads: bool) -> Guest {
        let (network, device) = UserNet::new(config).unwrap();
        let told = network.offloads();
        told.set(offloads, offloads);
        let forwards = network.forwards().to_vec();
        let thread = thread::spawn(move || network.run());
        let mut wire = Wire::new(device, config.mtu, offloads);
        let hardware = HardwareAddress::Ethernet(EthernetAddress(MAC));
        let interface = Interface::new(
            Config::new(hardware),
            &mut wire,
            smoltcp::time::Instant::ZERO,
        );
        Guest {
            network: Network {
                thread: Some(thread),
                offloads: told,
                forwards,
            },
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            next_port: 40_000,
            started: Instant::now(),
        }
    }

    pub fn set_address(&mut self) {
        let address = IpCidr::new(ADDRESS.into(), 24);
        self.interface
            .update_ip_addrs(|all| all.push(address).unwrap());
        self.interface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY)
            .unwrap();
    }

    pub fn now(&self) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(self.started.elapsed().as_micros() as i64)
    }

    pub fn poll(&mut self) {
        let now = self.now();
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    /// Runs until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if done(self) {
                self.poll();
                return;
            }
            assert!(Instant::now() < end, "waited in vain for: {what}");
            let delay = self
                .interface
                .poll_delay(self.now(), &self.sockets)
                .map_or(20, |d| d.total_millis().min(20));
            self.wire.wait(delay as i32);
        }
    }

    pub fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn start_connect(&mut self, to: SocketAddrV4) -> SocketHandle {
        let handle = self.tcp();
        self.next_port += 1;
        let (port, context) = (self.next_port, self.interface.context());
        self.sockets
            .get_mut::<tcp::Socket<'_>>(handle)
            .connect(context, (*to.ip(), to.port()), port)
            .unwrap();
        handle
    }

    pub fn connect(&mut self, to: SocketAddrV4) -> SocketHandle {
        let handle = self.start_connect(to);
        self.until("a connection", |guest| guest.socket(handle).may_send());
        handle
    }

    /// Whether a connection to `to` is reset.
    pub fn is_refused(&mut self, to: SocketAddrV4) -> bool {
        let handle = self.start_connect(to);
        let mut connected = false;
        self.until("an answer to the SYN", |guest| {
            connected = guest.socket(handle).may_send();
            connected || guest.socket(handle).state() == tcp::State::Closed
        });
        !connected
    }

    pub fn write(&mut self, handle: SocketHandle, bytes: &[u8]) {
        let mut sent = 0;
        self.until("bytes to go", |guest| {
            sent += guest.socket(handle).send_slice(&bytes[sent..]).unwrap();
            sent == bytes.len()
        });
    }

    /// Reads so many bytes.
    pub fn read(&mut self, handle: SocketHandle, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.until("bytes to come", |guest| {
            let socket = guest.socket(handle);
            while bytes.len() < count && socket.can_recv() {
                let most = count - bytes.len();
                let part = socket.recv(|b| {
                    let part = b[..b.len().min(most)].to_vec();
                    (part.len(), part)
                });
                bytes.extend(part.unwrap());
            }
            bytes.len() == count
        });
        bytes
    }

    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 256 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn send_udp(&mut self, handle: SocketHandle, to: SocketAddrV4, payload: &[u8]) {
        self.sockets
            .get_mut::<udp::Socket<'_>>(handle)
            .send_slice(payload, (*to.ip(), to.port()))
            .unwrap();
        self.poll();
    }

    pub fn try_udp(&mut self, handle: SocketHandle) -> Option<(Vec<u8>, SocketAddrV4)> {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(handle);
        let (payload, from) = socket.recv().ok()?;
        let smoltcp::wire::IpAddress::Ipv4(address) = from.endpoint.addr else {
            panic!("{from}");
        };
        Some((
            payload.to_vec(),
            SocketAddrV4::new(address, from.endpoint.port),
        ))
    }

    pub fn receive_udp(&mut self, handle: SocketHandle) -> (Vec<u8>, SocketAddrV4) {
        let mut got = None;
        self.until("a datagram", |guest| {
            got = guest.try_udp(handle);
            got.is_some()
        });
        got.unwrap()
    }

    /// What a socket of the host gets while this guest runs.
    pub fn at_host(&mut self, socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        socket.set_nonblocking(true).unwrap();
        let mut buffer = [0; 2000];
        let mut got = None;
        self.until("a datagram at the host", |_| {
            got = socket.recv_from(&mut buffer).ok();
            got.is_some()
        });
        let (len, from) = got.unwrap();
        (buffer[..len].to_vec(), from)
    }

    pub fn ping(&mut self, ident: u16) -> SocketHandle {
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(ident)).unwrap();
        self.sockets.add(socket)
    }

    /// Ends the network as the device does.
    pub fn end(mut self) {
        let thread = self.network.thread.take().unwrap();
        drop(self);
        thread.join().unwrap().unwrap();
    }
}

/// The device's end of the socket.
pub struct Wire {
    file: File,
    epoll: Epoll,
    mtu: u16,
    offloads: bool,
    buffer: Vec<u8>,
    /// What did not fit in.
    unsent: VecDeque<Vec<u8>>,
    /// Frames that were larger than the MTU.
    pub large: usize,
}

impl Wire {
    fn new(device: OwnedFd, mtu: u16, offloads: bool) -> Wire {
        let epoll = Epoll::new().unwrap();
        epoll
            .ctl(
                ControlOperation::Add,
                device.as_raw_fd(),
                EpollEvent::new(EventSet::IN, 0),
            )
            .unwrap();
        Wire {
            file: File::from(device),
            epoll,
            mtu,
            offloads,
            buffer: vec![0; 66_000],
            unsent: VecDeque::new(),
            large: 0,
        }
    }

    pub fn wait(&self, millis: i32) {
        let mut events = [EpollEvent::default()];
        let _ = self.epoll.wait(millis, &mut events);
    }

    pub fn send(&mut self, message: Vec<u8>) {
        self.unsent.push_back(message);
        while let Some(message) = self.unsent.front() {
            match self.file.write(message) {
                Ok(len) => assert_eq!(len, message.len()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => panic!("{e}"),
            }
            self.unsent.pop_front();
        }
    }

    /// A frame, without its header and with its checksum.
    pub fn receive_frame(&mut self) -> Option<Vec<u8>> {
        let len = match self.file.read(&mut self.buffer) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
            result => result.unwrap(),
        };
        let (header, frame) = self.buffer[..len].split_at(HEADER);
        let mut frame = frame.to_vec();
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        assert_eq!(word(10), 1, "num_buffers");
        let most = ETHERNET + usize::from(self.mtu);
        if header[0] == 0 {
            assert_eq!(&header[1..10], [0; 9]);
            assert!(frame.len() <= most, "{} bytes", frame.len());
            return Some(frame);
        }
        assert!(self.offloads && header[0] == 1);
        let (start, offset) = (word(6), word(8));
        assert_eq!((start, offset), (ETHERNET + 20, 16));
        // As hardware would: the sum over all, with what is in the field for a beginning.
        let mut sum: u32 = frame[start..]
            .chunks(2)
            .map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)))
            .sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        frame[start + offset..start + offset + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        if header[1] == 0 {
            assert!(frame.len() <= most);
        } else {
            assert_eq!(header[1], 1);
            assert_eq!(word(2), start + usize::from(frame[start + 12] >> 4) * 4);
            assert!(word(2) + word(4) <= most, "segments of {}", word(4));
            assert!(frame.len() > most);
            self.large += 1;
        }
        Some(frame)
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        let frame = self.receive_frame()?;
        Some((Received(frame), Sent(self, None)))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Sent<'_>> {
        if let Some(message) = self.unsent.pop_front() {
            self.send(message);
        }
        self.unsent.is_empty().then_some(Sent(self, None))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ethernet;
        all.max_transmission_unit = ETHERNET + usize::from(self.mtu);
        if self.offloads {
            all.checksum.tcp = Checksum::Rx;
            let mut segmentation = SegmentationCapabilities::default();
            segmentation.tcpv4 = std::num::NonZeroUsize::new(65_535);
            all.segmentation = segmentation;
        }
        all
    }
}

pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct Sent<'a>(&'a mut Wire, Option<u16>);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut message = vec![0; HEADER + len];
        let result = f(&mut message[HEADER..]);
        let tcp = message[HEADER + 12..HEADER + 14] == [8, 0] && message[HEADER + 23] == 6;
        if self.0.offloads && tcp {
            message[0] = 1;
            if let Some(size) = self.1 {
                message[1] = 1;
                message[4..6].copy_from_slice(&size.to_le_bytes());
            }
        }
        self.0.send(message);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.1 = meta.segmentation_offload_size.map(|s| s.get());
    }
}

/// A frame of the guest for the network, whose TCP segment `change` makes.
pub fn tcp_frame(
    to: SocketAddrV4,
    port: u16,
    change: impl FnOnce(&mut TcpPacket<&mut [u8]>),
) -> Vec<u8> {
    let mut message = vec![0; HEADER + ETHERNET + 40];
    message[HEADER..HEADER + 6].copy_from_slice(&[0x52, 0x55, 10, 0, 2, 2]);
    message[HEADER + 6..HEADER + 12].copy_from_slice(&MAC);
    message[HEADER + 12] = 8;
    let mut ip = Ipv4Packet::new_unchecked(&mut message[HEADER + ETHERNET..]);
    ip.set_version(4);
    ip.set_header_len(20);
    ip.set_total_len(40);
    ip.set_hop_limit(64);
    ip.set_next_header(smoltcp::wire::IpProtocol::Tcp);
    ip.set_src_addr(ADDRESS);
    ip.set_dst_addr(*to.ip());
    ip.fill_checksum();
    let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
    tcp.set_src_port(port);
    tcp.set_dst_port(to.port());
    tcp.set_header_len(20);
    tcp.set_window_len(1000);
    change(&mut tcp);
    tcp.fill_checksum(&ADDRESS.into(), &(*to.ip()).into());
    message
}

/// Bytes that repeat only after a long time; others for another seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}
