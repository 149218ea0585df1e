//! The wire to the device: frames with a virtio-net header (virtio 1.2 §5.1.6) as messages of a socket, many a system call.
//!
//! What goes out is gathered in a bounded arena and sent when a round of the engine ends or the arena is full. When the device
//! does not take it, the link is blocked: nothing new is made until the socket can be written again.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket,
};

use crate::sys;

/// Bytes of `virtio_net_hdr_v1`.
pub const HEADER_LEN: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// Header, Ethernet and the largest IPv4 packet.
const MAX_FRAME: usize = HEADER_LEN + ETHERNET_LEN + 65_535;
/// A message's room in the inbox: a VLAN tag more, although nobody here takes such frames.
const ROOM: usize = MAX_FRAME + 21;
/// Bytes after which what was gathered is sent.
const ARENA: usize = 256 << 10;
/// Frames after which it is.
const MAX_FRAMES: usize = 2 * sys::MAX_BATCH;
/// Of a new frame this much is cleared: all headers there can be.
const CLEARED: usize = HEADER_LEN + ETHERNET_LEN + 60 + 60;

/// `flags`: the checksum is to be computed from `csum_start` on.
const NEEDS_CSUM: u8 = 1;
/// `gso_type`: TCP over IPv4, to be cut into segments of `gso_size` bytes.
const GSO_TCPV4: u8 = 1;

/// What the guest takes from the engine, set by the device whenever its driver says so.
#[derive(Debug, Default)]
pub struct Offloads {
    checksum: AtomicBool,
    tso4: AtomicBool,
}

impl Offloads {
    /// Whether packets may come without a TCP checksum (`VIRTIO_NET_F_GUEST_CSUM`), and in segments of up to 64 KiB
    /// (`VIRTIO_NET_F_GUEST_TSO4`, which counts only with the first). Both are off at first.
    pub fn set(&self, checksum: bool, tso4: bool) {
        self.tso4.store(checksum && tso4, Ordering::Relaxed);
        self.checksum.store(checksum, Ordering::Relaxed);
    }

    /// Whether large segments may come.
    pub(crate) fn tso4(&self) -> bool {
        self.tso4.load(Ordering::Relaxed)
    }
}

/// What the device's header says about a frame of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Offloaded {
    /// The checksum of the packet in it was left out.
    pub checksum: bool,
}

/// Takes the header off a message.
pub fn split(message: &[u8]) -> Option<(Offloaded, &[u8])> {
    let (header, frame) = message.split_at_checked(HEADER_LEN)?;
    let checksum = header[0] & NEEDS_CSUM != 0;
    Some((Offloaded { checksum }, frame))
}

/// Messages that were received together.
pub struct Inbox {
    buffer: Box<[u8]>,
    lengths: Vec<usize>,
}

impl Inbox {
    pub fn new() -> Inbox {
        Inbox {
            buffer: vec![0; ROOM * sys::MAX_BATCH].into_boxed_slice(),
            lengths: Vec::with_capacity(sys::MAX_BATCH),
        }
    }

    /// The messages, in order.
    pub fn messages(&self) -> impl Iterator<Item = &[u8]> {
        self.buffer
            .chunks_exact(ROOM)
            .zip(&self.lengths)
            .filter_map(|(part, length)| part.get(..*length))
    }
}

/// Our end of the wire.
pub struct Link {
    socket: OwnedFd,
    offloads: Arc<Offloads>,
    /// Our own address: gateway and DNS server are one station.
    mac: EthernetAddress,
    /// The guest's, once a packet has come from its IPv4 address.
    guest: Option<EthernetAddress>,
    arena: Box<[u8]>,
    end: usize,
    frames: Vec<Range<usize>>,
    /// How many of `frames` have gone.
    sent: usize,
    blocked: bool,
    closed: bool,
}

impl Link {
    pub fn new(socket: OwnedFd, mac: EthernetAddress) -> Link {
        Link {
            socket,
            offloads: Arc::default(),
            mac,
            guest: None,
            arena: vec![0; ARENA + MAX_FRAME].into_boxed_slice(),
            end: 0,
            frames: Vec::with_capacity(MAX_FRAMES),
            sent: 0,
            blocked: false,
            closed: false,
        }
    }

    pub fn offloads(&self) -> &Arc<Offloads> {
        &self.offloads
    }

    pub fn mac(&self) -> EthernetAddress {
        self.mac
    }

    pub fn guest(&self) -> Option<EthernetAddress> {
        self.guest
    }

    pub fn learn(&mut self, guest: EthernetAddress) {
        self.guest = Some(guest);
    }

    /// Whether the device does not take what is there.
    pub fn blocked(&self) -> bool {
        self.blocked
    }

    /// Whether the device's end is gone.
    pub fn closed(&self) -> bool {
        self.closed
    }

    /// What epoll has seen: room for more, or the end.
    pub fn on_writable(&mut self) {
        self.blocked = false;
        self.flush();
    }

    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Takes messages of the device into `inbox`. False: there were none.
    pub fn receive(&mut self, inbox: &mut Inbox) -> bool {
        match sys::receive(&self.socket, &mut inbox.buffer, ROOM, &mut inbox.lengths) {
            // The other end never sends nothing: this is its end.
            Ok(()) if inbox.lengths.first().is_none_or(|length| *length == 0) => {
                self.closed = true;
                false
            }
            Ok(()) => true,
            Err(e) => {
                if !matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) {
                    self.closed = true;
                }
                false
            }
        }
    }

    /// Whether there is room for another frame; what was gathered may be sent for that.
    pub fn has_room(&mut self) -> bool {
        if self.full() {
            self.flush();
        }
        !self.blocked && !self.full()
    }

    fn full(&self) -> bool {
        self.end > ARENA || self.frames.len() >= MAX_FRAMES
    }

    /// Sends what was gathered, as far as the device takes it.
    pub fn flush(&mut self) {
        while !self.blocked && self.sent < self.frames.len() {
            let waiting = self.frames[self.sent..]
                .iter()
                .map(|range| &self.arena[range.clone()]);
            match sys::send(&self.socket, waiting) {
                Ok(count) => self.sent += count.max(1),
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => self.blocked = true,
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                        self.closed = true;
                        self.sent = self.frames.len();
                    }
                    // One that does not go is lost, as on any wire.
                    _ => self.sent += 1,
                },
            }
        }
        if self.sent >= self.frames.len() {
            self.sent = 0;
            self.end = 0;
            self.frames.clear();
        }
    }

    /// A frame of `len` bytes after its Ethernet header, to `to`. Lost when there is no room.
    pub fn send_frame(
        &mut self,
        to: EthernetAddress,
        kind: EthernetProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) {
        if self.has_room()
            && let Some(range) = self.append(to, kind, len)
        {
            fill(&mut self.arena[range.start + HEADER_LEN + ETHERNET_LEN..range.end]);
        }
    }

    /// An IPv4 packet of `len` bytes to the guest, whose TCP checksum is seen to here: with `segment` it is more than one
    /// segment of so many bytes. Lost when there is no room, or nobody knows yet where the guest is.
    pub fn send_tcp<R>(
        &mut self,
        len: usize,
        segment: Option<u16>,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let guest = if self.has_room() { self.guest } else { None };
        let range = guest.and_then(|to| self.append(to, EthernetProtocol::Ipv4, len));
        let Some(range) = range else {
            return fill(&mut vec![0; len]);
        };
        let (header, frame) = self.arena[range].split_at_mut(HEADER_LEN);
        let packet = &mut frame[ETHERNET_LEN..];
        let result = fill(packet);
        let offloaded = self.offloads.checksum.load(Ordering::Relaxed) || segment.is_some();
        finish_tcp(header, packet, offloaded, segment);
        result
    }

    /// Makes room for a frame and writes its headers.
    fn append(
        &mut self,
        to: EthernetAddress,
        kind: EthernetProtocol,
        len: usize,
    ) -> Option<Range<usize>> {
        let range = self.end..self.end + HEADER_LEN + ETHERNET_LEN + len;
        let bytes = self.arena.get_mut(range.clone())?;
        let cleared = bytes.len().min(CLEARED);
        bytes[..cleared].fill(0);
        // num_buffers, little-endian.
        bytes[10] = 1;
        let mut frame = EthernetFrame::new_unchecked(&mut bytes[HEADER_LEN..]);
        frame.set_src_addr(self.mac);
        frame.set_dst_addr(to);
        frame.set_ethertype(kind);
        self.end = range.end;
        self.frames.push(range.clone());
        Some(range)
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Fills in the checksum of a TCP segment, or what the other side needs in order to.
fn finish_tcp(header: &mut [u8], packet: &mut [u8], offloaded: bool, segment: Option<u16>) {
    let ip = Ipv4Packet::new_unchecked(&*packet);
    let (source, target) = (ip.src_addr(), ip.dst_addr());
    let start = usize::from(ip.header_len());
    let Some(payload) = packet.get_mut(start..) else {
        return;
    };
    if !offloaded {
        TcpPacket::new_unchecked(payload).fill_checksum(&source.into(), &target.into());
        return;
    }
    let len = payload.len();
    let mut tcp = TcpPacket::new_unchecked(payload);
    let words = [source, target].into_iter().flat_map(|address| {
        let bits = address.to_bits();
        [bits >> 16, bits & 0xffff]
    });
    let mut sum = words.sum::<u32>() + u32::from(u8::from(IpProtocol::Tcp)) + len as u32;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    tcp.set_checksum(sum as u16);
    header[0] = NEEDS_CSUM;
    if let Some(size) = segment {
        let all = ETHERNET_LEN + start + usize::from(tcp.header_len());
        header[1] = GSO_TCPV4;
        header[2..4].copy_from_slice(&(all as u16).to_le_bytes());
        header[4..6].copy_from_slice(&size.to_le_bytes());
    }
    header[6..8].copy_from_slice(&((ETHERNET_LEN + start) as u16).to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
}
