//! One end of a socket that keeps packets apart (unix(7), SOCK_SEQPACKET), whose other end is a network in software: packets in and
//! out, each with a virtio-net header before it (virtio 1.2 §5.1.6), never blocking.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use crate::queue::{count, moved};

/// The end of such a socket, used as a [`TapQueue`](crate::TapQueue) is. Readable when a packet waits, writable when one can go out,
/// hung up when nobody is at the other end any more.
///
/// ```
/// use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
///
/// use net_util::SocketQueue;
///
/// # #[allow(unsafe_code)]
/// # fn main() -> std::io::Result<()> {
/// let mut ends = [0; 2];
/// // SAFETY: the call writes two descriptors, which are ours alone.
/// let (end, other) = unsafe {
///     let made = libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, ends.as_mut_ptr());
///     assert_eq!(made, 0);
///     (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
/// };
/// let (end, other) = (SocketQueue::new(end), SocketQueue::new(other));
/// let mut packet = *b"header......a packet";
/// let piece = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
/// // SAFETY: the piece is memory of ours, to which there are no references meanwhile.
/// unsafe {
///     assert_eq!(end.write_packet(&[piece])?, 20);
///     assert_eq!(other.read_packet(&[piece])?, 20);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct SocketQueue {
    fd: OwnedFd,
}

impl SocketQueue {
    /// Takes a connected socket that keeps packets apart: SOCK_SEQPACKET or SOCK_DGRAM.
    #[must_use]
    pub fn new(fd: OwnedFd) -> SocketQueue {
        SocketQueue { fd }
    }

    /// Takes a packet into `pieces`, in order, as far as it fits in them. The end of a longer packet is lost. 0 when the other end is
    /// closed.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when no packet waits; whatever the kernel says else.
    ///
    /// # Safety
    ///
    /// Until this returns the memory of each piece stays mapped and writable, and no Rust reference to it is used. Others
    /// (a guest's CPUs) may use it at the same time.
    pub unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let mut message = message(pieces)?;
        // SAFETY: the pieces are good by the caller's word; the message names nothing else.
        moved(unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
    }

    /// Sends what `pieces` hold, a header and a packet, as one packet.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when there is no room, [`io::ErrorKind::BrokenPipe`] when the other end is closed; whatever the
    /// kernel says else.
    ///
    /// # Safety
    ///
    /// Until this returns the memory of each piece stays mapped and readable, and no `&mut` to it is used. Others (a
    /// guest's CPUs) may change it at the same time: what is sent is then unspecified.
    pub unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let message = message(pieces)?;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pieces are good by the caller's word; the message names nothing else, and the kernel only reads them.
        moved(unsafe { libc::sendmsg(self.as_raw_fd(), &raw const message, flags) })
    }
}

/// A message of these pieces, which keep their place until the call.
fn message(pieces: &[libc::iovec]) -> io::Result<libc::msghdr> {
    count(pieces.len())?;
    // SAFETY: a message of zeros has no address, no pieces and no control data.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = ptr::from_ref(pieces).cast_mut().cast();
    message.msg_iovlen = pieces.len();
    Ok(message)
}

impl AsFd for SocketQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for SocketQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::FromRawFd;

    use super::*;
    use crate::MAX_PACKET_LEN;

    fn pair() -> (SocketQueue, SocketQueue) {
        let mut ends = [0; 2];
        // SAFETY: the call writes two descriptors, which nobody else has.
        unsafe {
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
            let made = libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr());
            assert_eq!(made, 0, "{}", io::Error::last_os_error());
            let [a, b] = ends.map(|fd| SocketQueue::new(OwnedFd::from_raw_fd(fd)));
            (a, b)
        }
    }

    fn piece(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }
    }

    fn send(end: &SocketQueue, mut bytes: Vec<u8>) -> io::Result<usize> {
        let (first, second) = bytes.split_at_mut(12);
        // SAFETY: the pieces are memory of ours, and nobody uses it meanwhile.
        unsafe { end.write_packet(&[piece(first), piece(second)]) }
    }

    fn receive(end: &SocketQueue) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; MAX_PACKET_LEN];
        let (first, second) = bytes.split_at_mut(100);
        // SAFETY: the pieces are memory of ours, and nobody uses it meanwhile.
        let len = unsafe { end.read_packet(&[piece(first), piece(second)])? };
        bytes.truncate(len);
        Ok(bytes)
    }

    #[test]
    fn packets_stay_apart_up_to_the_longest() {
        let (a, b) = pair();
        let packets = [12, 13, 99, 100, 101, 1526, MAX_PACKET_LEN]
            .map(|len| (0..len).map(|i| (i * 7 + len) as u8).collect::<Vec<u8>>());
        for packet in &packets {
            assert_eq!(send(&a, packet.clone()).unwrap(), packet.len());
        }
        for packet in &packets {
            assert_eq!(&receive(&b).unwrap(), packet);
        }
        assert_eq!(receive(&b).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_full_socket_says_so_and_loses_nothing() {
        let (a, b) = pair();
        let mut sent = 0u32;
        loop {
            let packet = [[0; 12].to_vec(), sent.to_le_bytes().to_vec(), vec![1; 1400]].concat();
            match send(&a, packet) {
                Ok(_) => sent += 1,
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        for number in 0..sent {
            assert_eq!(receive(&b).unwrap()[12..16], number.to_le_bytes());
        }
        send(&a, vec![0; 60]).unwrap();
    }

    #[test]
    fn a_closed_end_is_an_error_and_no_signal() {
        let (a, b) = pair();
        drop(b);
        assert!(receive(&a).unwrap().is_empty());
        let error = send(&a, vec![0; 60]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_packet_in_too_many_pieces_is_refused() {
        let (a, _b) = pair();
        let mut byte = [0];
        let pieces = vec![piece(&mut byte); 1025];
        // SAFETY: the piece is memory of ours, which is only read.
        let sent = unsafe { a.write_packet(&pieces) };
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
