//! One queue of a tap: packets in and out, each with a virtio-net header before it (virtio 1.2 §5.1.6), never blocking.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Bytes of the header before each packet: `virtio_net_hdr_v1`, with `num_buffers`, little-endian.
pub const VNET_HEADER_LEN: usize = 12;

/// The longest packet with its header: what TCP segmentation hands over, Ethernet with a VLAN tag, and the header.
pub const MAX_PACKET_LEN: usize = 65_535 + 18 + VNET_HEADER_LEN;

/// A queue of a tap or macvtap. Readable when a packet waits, writable when one can go out.
///
/// One packet moves a call, header first. [`io::ErrorKind::WouldBlock`] when there is none, or no room. Memory of our own is
/// read and written by [`Read`] and [`Write`] on `&TapQueue`, a guest's by [`Self::read_packet`] and [`Self::write_packet`].
#[derive(Debug)]
pub struct TapQueue {
    fd: OwnedFd,
}

impl TapQueue {
    /// Takes a descriptor that is attached, has headers of [`VNET_HEADER_LEN`] bytes and does not block.
    pub(crate) fn new(fd: OwnedFd) -> TapQueue {
        TapQueue { fd }
    }

    /// Takes a packet into `pieces`, in order: bytes of the header and the packet, as far as they fit in. The end of a
    /// longer packet is lost, and nothing tells: give [`MAX_PACKET_LEN`] bytes of room, or with no segmentation offload
    /// set the MTU, 18 bytes of Ethernet and the header.
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
        // SAFETY: the pieces are good by the caller's word, and `count` bounds their number.
        moved(unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), count(pieces.len())?) })
    }

    /// Sends what `pieces` hold, a header and a packet, as one packet.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when there is no room, [`io::ErrorKind::InvalidInput`] for a header or packet that the
    /// kernel does not take; whatever it says else, as when the interface is down.
    ///
    /// # Safety
    ///
    /// Until this returns the memory of each piece stays mapped and readable, and no `&mut` to it is used. Others (a
    /// guest's CPUs) may change it at the same time: what is sent is then unspecified.
    pub unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the pieces are good by the caller's word, and `count` bounds their number.
        moved(unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), count(pieces.len())?) })
    }

    /// Whether a [`SendBatch`](crate::SendBatch) may send through it, and a [`ReceiveBatch`](crate::ReceiveBatch) receive: the kernel then
    /// takes and gives each packet at once and in order, since it can do so without waiting, and has no limit after which a packet would
    /// have to wait.
    pub fn takes_batches(&self) -> bool {
        let mut limit: libc::c_int = 0;
        // SAFETY: TUNGETSNDBUF writes one int.
        let told = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNGETSNDBUF, &raw mut limit) };
        if told < 0 || limit != libc::c_int::MAX {
            return false;
        }
        let byte = 0u8;
        let piece = libc::iovec {
            iov_base: (&raw const byte).cast_mut().cast(),
            iov_len: 1,
        };
        // SAFETY: the kernel reads one byte, which is no packet: it is shorter than a header.
        let sent = unsafe { libc::pwritev2(self.fd.as_raw_fd(), &piece, 1, -1, libc::RWF_NOWAIT) };
        // A file that cannot write without waiting says EOPNOTSUPP before it looks at the packet.
        sent < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
    }

    /// Another descriptor of the same queue.
    ///
    /// # Errors
    ///
    /// When there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<TapQueue> {
        Ok(TapQueue {
            fd: self.fd.try_clone()?,
        })
    }
}

/// How many pieces a packet is in, if the kernel takes so many.
pub(crate) fn count(pieces: usize) -> io::Result<i32> {
    if pieces > libc::UIO_MAXIOV as usize {
        // A part of the packet would be another packet.
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    Ok(pieces as i32)
}

/// What a system call that moves bytes answered.
pub(crate) fn moved(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Read for &TapQueue {
    /// As [`TapQueue::read_packet`].
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(buf)])
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        // SAFETY: an IoSliceMut is laid out as an iovec, and these are borrowed mutably until the call returns.
        unsafe {
            let pieces = std::slice::from_raw_parts(bufs.as_ptr().cast(), bufs.len());
            self.read_packet(pieces)
        }
    }
}

impl Write for &TapQueue {
    /// As [`TapQueue::write_packet`].
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        // SAFETY: an IoSlice is laid out as an iovec, and these are borrowed until the call returns.
        unsafe {
            let pieces = std::slice::from_raw_parts(bufs.as_ptr().cast(), bufs.len());
            self.write_packet(pieces)
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
