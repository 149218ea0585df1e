//! The system calls that std has no words for: the pair of sockets to the device, many frames a call, connecting
//! without waiting.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::net::{SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// Frames a call, at most.
pub const MAX_BATCH: usize = 32;

/// What a buffer in the kernel may hold of frames in each direction: what it grants to anybody.
const LINK_BUFFER: libc::c_int = 212_992;

/// Two sockets that carry messages to each other, neither of which blocks.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two descriptors.
    let result = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    check(result)?;
    // SAFETY: both are open and nobody else's.
    let pair = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    for end in [&pair.0, &pair.1] {
        set_option(end, libc::SOL_SOCKET, libc::SO_SNDBUF, &LINK_BUFFER)?;
    }
    Ok(pair)
}

/// Takes up to [`MAX_BATCH`] messages, the n-th into the n-th `room` bytes of `buffer`; their lengths come into `lengths`.
/// The end of a longer one is lost.
pub fn receive(
    socket: &OwnedFd,
    buffer: &mut [u8],
    room: usize,
    lengths: &mut Vec<usize>,
) -> io::Result<()> {
    lengths.clear();
    // SAFETY: all zero is a valid value of both, which say: no memory.
    let (mut pieces, mut messages): ([libc::iovec; MAX_BATCH], [libc::mmsghdr; MAX_BATCH]) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    let mut count = 0;
    for ((part, piece), message) in buffer
        .chunks_exact_mut(room)
        .zip(&mut pieces)
        .zip(&mut messages)
    {
        piece.iov_base = part.as_mut_ptr().cast();
        piece.iov_len = part.len();
        message.msg_hdr.msg_iov = piece;
        message.msg_hdr.msg_iovlen = 1;
        count += 1;
    }
    // SAFETY: `count` messages point to pieces, which point to parts of `buffer`; all of them live until the call returns.
    let received = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count,
            0,
            ptr::null_mut(),
        )
    };
    let received = check(received)? as usize;
    lengths.extend(messages.iter().take(received).map(|m| m.msg_len as usize));
    Ok(())
}

/// Sends the first [`MAX_BATCH`] of `messages`, in order. How many were taken: at least one.
pub fn send<'a>(socket: &OwnedFd, messages: impl Iterator<Item = &'a [u8]>) -> io::Result<usize> {
    // SAFETY: all zero is a valid value of both, which say: no memory.
    let (mut pieces, mut headers): ([libc::iovec; MAX_BATCH], [libc::mmsghdr; MAX_BATCH]) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    let mut count = 0;
    for ((bytes, piece), header) in messages.zip(&mut pieces).zip(&mut headers) {
        piece.iov_base = bytes.as_ptr().cast_mut().cast();
        piece.iov_len = bytes.len();
        header.msg_hdr.msg_iov = piece;
        header.msg_hdr.msg_iovlen = 1;
        count += 1;
    }
    // SAFETY: `count` headers point to pieces, which point to messages; all of them live until the call returns, and the
    // kernel only reads the messages.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count,
            libc::MSG_NOSIGNAL,
        )
    };
    Ok(check(sent)? as usize)
}

/// Begins to connect. The socket becomes writable when that has ended; [`TcpStream::take_error`] then tells how.
pub fn connect(to: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = socket(libc::SOCK_STREAM, 0)?;
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: to.ip().to_bits().to_be(),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: the kernel reads an address of the length that it is told.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_in>() as libc::socklen_t,
        )
    };
    match check(result) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(TcpStream::from(socket)),
    }
}

/// A socket for echo requests, which needs no rights where `net.ipv4.ping_group_range` has the process's group.
pub fn ping_socket() -> io::Result<UdpSocket> {
    Ok(UdpSocket::from(socket(
        libc::SOCK_DGRAM,
        libc::IPPROTO_ICMP,
    )?))
}

fn socket(kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = unsafe {
        libc::socket(
            libc::AF_INET,
            kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            protocol,
        )
    };
    check(fd)?;
    // SAFETY: it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the connection end with a reset when `stream` is closed.
pub fn reset_on_close(stream: &TcpStream) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    set_option(stream, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// How many descriptors the process may have.
pub fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes one rlimit.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    if result < 0 { 0 } else { limit.rlim_cur }
}

fn set_option<T>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the value has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
