//! What passes an interface, by a packet socket (packet(7)).

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Bytes that wait for [`Sniffer::frames`]; what comes later is lost.
static ROOM: libc::c_int = 32 << 20;
/// Ethernet and IPv4, or IPv6 up to the protocol.
const HEADERS: usize = 34;

/// Collects the frames of one interface from the moment it is made.
pub struct Sniffer(OwnedFd);

/// A frame with IPv4 or IPv6 in it.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// It was sent by this host; else it came from the other end.
    pub outgoing: bool,
    /// 4 or 6.
    pub version: u8,
    /// The protocol of RFC 790: 1 is ICMP, 6 TCP, 17 UDP.
    pub protocol: u8,
    /// Bytes with the Ethernet header.
    pub len: usize,
}

impl Sniffer {
    /// At the interface `name` in the network namespace of this thread.
    pub fn new(name: &str) -> Self {
        let protocol = u16::to_be(0x0003); // ETH_P_ALL
        let name = CString::new(name).expect("a name");
        // SAFETY: the calls get descriptors, the address and the number of this block, all of them alive.
        unsafe {
            let fd = libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                0,
            );
            assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
            let fd = OwnedFd::from_raw_fd(fd);
            let size = size_of::<libc::c_int>() as libc::socklen_t;
            let result = libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const ROOM).cast(),
                size,
            );
            assert_eq!(result, 0, "its buffer: {}", io::Error::last_os_error());
            let mut address: libc::sockaddr_ll = mem::zeroed();
            address.sll_family = libc::AF_PACKET as libc::c_ushort;
            address.sll_protocol = protocol;
            address.sll_ifindex =
                libc::c_int::try_from(libc::if_nametoindex(name.as_ptr())).expect("a number");
            assert_ne!(address.sll_ifindex, 0, "no interface {name:?}");
            let result = libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            );
            assert_eq!(result, 0, "{name:?}: {}", io::Error::last_os_error());
            Self(fd)
        }
    }

    /// The frames until now.
    pub fn frames(&self) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            let mut bytes = [0u8; HEADERS];
            // SAFETY: zeros are an address; the buffers and lengths are this block's own.
            let (len, address) = unsafe {
                let mut address: libc::sockaddr_ll = mem::zeroed();
                let mut size = size_of_val(&address) as libc::socklen_t;
                let len = libc::recvfrom(
                    self.0.as_raw_fd(),
                    bytes.as_mut_ptr().cast(),
                    bytes.len(),
                    libc::MSG_TRUNC,
                    (&raw mut address).cast(),
                    &raw mut size,
                );
                (len, address)
            };
            let Ok(len) = usize::try_from(len) else {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return frames,
                    // The interface went down meanwhile.
                    _ if error.raw_os_error() == Some(libc::ENETDOWN) => continue,
                    _ => panic!("packet socket: {error}"),
                }
            };
            let (version, protocol) = match bytes[12..14] {
                [0x08, 0x00] => (4, bytes[23]),
                [0x86, 0xdd] => (6, bytes[20]),
                _ => continue,
            };
            frames.push(Frame {
                outgoing: address.sll_pkttype == libc::PACKET_OUTGOING,
                version,
                protocol,
                len,
            });
        }
    }
}
