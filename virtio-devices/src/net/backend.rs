//! The host's end of a pair of queues: a queue of a tap, or what else moves packets.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use net_util::{Offloads, TapQueue};

/// Moves packets, each with a header of [`VNET_HEADER_LEN`](net_util::VNET_HEADER_LEN) bytes (virtio 1.2 §5.1.6) before it, and never
/// blocks. Its descriptor polls readable when a packet waits, writable when one can go out, and as an error when neither will be.
pub trait PacketQueue: AsRawFd + Send + Sync {
    /// Takes one packet into `pieces`. What is longer than they are is lost.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when no packet waits. After another error the queue is not read until the driver gives more buffers.
    ///
    /// # Safety
    /// Until this returns the memory of each piece stays mapped and writable, and no Rust reference to it is used.
    unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize>;

    /// Sends what `pieces` hold as one packet.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is no room now. After another error the packet is lost.
    ///
    /// # Safety
    /// Until this returns the memory of each piece stays mapped and readable, and no `&mut` to it is used.
    unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize>;

    /// Whether a [`SendBatch`](net_util::SendBatch) may send through its descriptor, many packets in one system call, and a
    /// [`ReceiveBatch`](net_util::ReceiveBatch) receive. No packet ever waits for room then.
    fn takes_batches(&self) -> bool {
        false
    }

    /// What the reader can do by itself with packets to come.
    ///
    /// # Errors
    /// When that cannot be had.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Whether packets come to this queue, as they do at the start, or to the others only. Called when that changes, and only where
    /// there are several queues.
    ///
    /// # Errors
    /// When that cannot be had.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

impl PacketQueue for TapQueue {
    unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the same is asked of the caller.
        unsafe { TapQueue::read_packet(self, pieces) }
    }

    unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the same is asked of the caller.
        unsafe { TapQueue::write_packet(self, pieces) }
    }

    fn takes_batches(&self) -> bool {
        TapQueue::takes_batches(self)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        TapQueue::set_offloads(self, offloads)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        TapQueue::set_attached(self, attached)
    }
}
