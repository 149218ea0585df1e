//! Many packets in one system call, by io_uring (io_uring(7)).
#![allow(unsafe_code)]

use std::io::{self, ErrorKind};
use std::os::fd::RawFd;

use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

/// Packets that a [`SendBatch`] or [`ReceiveBatch`] takes at once.
pub const MAX_BATCH: usize = 64;

/// Sends packets with one system call for all of them, through a descriptor that says so by
/// [`TapQueue::takes_batches`](crate::TapQueue::takes_batches).
pub struct SendBatch(Batch);

impl SendBatch {
    /// A ring of its own, for one thread at a time.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, or forbids it.
    pub fn new() -> io::Result<SendBatch> {
        Batch::new().map(SendBatch)
    }

    /// Sends the packets, each a header and a packet in pieces, in their order. `done` hears of each, in order too, as
    /// [`TapQueue::write_packet`](crate::TapQueue::write_packet) would have answered. Packets past [`MAX_BATCH`] are not looked at.
    ///
    /// # Errors
    /// When the kernel takes no requests at all: some packets may have been sent, `done` has heard of none, and this batch
    /// is not to be used again.
    ///
    /// # Safety
    /// As for `write_packet`, for all packets. `end` does not block.
    pub unsafe fn write_packets<'a>(
        &mut self,
        end: RawFd,
        packets: impl Iterator<Item = &'a [libc::iovec]>,
        done: impl FnMut(io::Result<usize>),
    ) -> io::Result<()> {
        // SAFETY: the pieces are good until this returns, by the caller's word.
        unsafe { self.0.run(packets.map(|packet| write(end, packet)), done) }
    }
}

/// Receives packets with one system call for all of them, through a descriptor that says so by
/// [`TapQueue::takes_batches`](crate::TapQueue::takes_batches).
pub struct ReceiveBatch(Batch);

impl ReceiveBatch {
    /// A ring of its own, for one thread at a time.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, or forbids it.
    pub fn new() -> io::Result<ReceiveBatch> {
        Batch::new().map(ReceiveBatch)
    }

    /// Takes a packet into each of `places`, in their order. `done` hears of each, in order too, as
    /// [`TapQueue::read_packet`](crate::TapQueue::read_packet) would have answered: so [`ErrorKind::WouldBlock`] where no packet waited; one
    /// that comes at that very moment may be in a later place. Places past [`MAX_BATCH`] are not looked at.
    ///
    /// # Errors
    /// When the kernel takes no requests at all: packets may be lost, `done` has heard of none, and this batch is not to be used
    /// again.
    ///
    /// # Safety
    /// As for `read_packet`, for all places, of which no two overlap.
    pub unsafe fn read_packets<'a>(
        &mut self,
        end: RawFd,
        places: impl Iterator<Item = &'a [libc::iovec]>,
        done: impl FnMut(io::Result<usize>),
    ) -> io::Result<()> {
        // SAFETY: the pieces are good until this returns, by the caller's word.
        unsafe { self.0.run(places.map(|place| read(end, place)), done) }
    }
}

struct Batch {
    ring: IoUring,
    /// Results by number, as the kernel counts them.
    results: [i32; MAX_BATCH],
}

// The kernel is done with all requests whenever `run` returns, or the ring is gone: nothing outlives a call.
impl Batch {
    fn new() -> io::Result<Self> {
        Ok(Self {
            ring: IoUring::new(MAX_BATCH as u32)?,
            results: [0; MAX_BATCH],
        })
    }

    /// Makes requests, which the kernel carries out one after the other as none of them waits, and tells `done` their results.
    ///
    /// # Safety
    /// What the requests point at is good for them until this returns.
    unsafe fn run(
        &mut self,
        requests: impl Iterator<Item = io::Result<Entry>>,
        mut done: impl FnMut(io::Result<usize>),
    ) -> io::Result<()> {
        let mut count = 0;
        for (number, request) in requests.take(MAX_BATCH).enumerate() {
            let entry = request?.user_data(number as u64);
            // SAFETY: what it points at is good until this function returns, and it returns after the kernel is done with it.
            // There is room: the ring has as many entries as a batch, and is empty.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
            count += 1;
        }
        let mut left = count;
        while left > 0 {
            match self.ring.submit_and_wait(left) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
            for completion in self.ring.completion() {
                let slot = usize::try_from(completion.user_data()).ok();
                if let Some(result) = slot.and_then(|slot| self.results.get_mut(slot)) {
                    *result = completion.result();
                }
                left = left.saturating_sub(1);
            }
        }
        for result in self.results.iter().take(count) {
            done(usize::try_from(*result).map_err(|_| io::Error::from_raw_os_error(-result)));
        }
        Ok(())
    }
}

/// Of one packet. What is in one piece, as most are, costs the kernel less than a list.
fn write(end: RawFd, packet: &[libc::iovec]) -> io::Result<Entry> {
    if let [piece] = packet
        && let Ok(len) = u32::try_from(piece.iov_len)
    {
        return Ok(opcode::Write::new(Fd(end), piece.iov_base.cast(), len).build());
    }
    Ok(opcode::Writev::new(Fd(end), packet.as_ptr(), count(packet)?).build())
}

/// Into one place, without waiting for a packet.
fn read(end: RawFd, place: &[libc::iovec]) -> io::Result<Entry> {
    Ok(opcode::Readv::new(Fd(end), place.as_ptr(), count(place)?)
        .rw_flags(libc::RWF_NOWAIT)
        .build())
}

fn count(pieces: &[libc::iovec]) -> io::Result<u32> {
    u32::try_from(pieces.len()).map_err(|_| io::Error::from(ErrorKind::InvalidInput))
}
