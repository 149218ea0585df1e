//! Many packets in one system call, by io_uring (io_uring(7)).
#![allow(unsafe_code)]

use std::io::{self, ErrorKind};
use std::os::fd::RawFd;

use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

/// Packets that a [`SendBatch`] takes at once.
pub const MAX_BATCH: usize = 64;

/// Sends packets with one system call for all of them, through a descriptor that says so by
/// [`TapQueue::takes_batches`](crate::TapQueue::takes_batches).
pub struct SendBatch {
    ring: IoUring,
    /// Results by number, as the kernel counts them.
    results: [i32; MAX_BATCH],
}

// The kernel is done with all requests whenever `write_packets` returns, or the ring is gone: nothing outlives a call.
impl SendBatch {
    /// A ring of its own, for one thread at a time.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, or forbids it.
    pub fn new() -> io::Result<SendBatch> {
        Ok(SendBatch {
            ring: IoUring::new(MAX_BATCH as u32)?,
            results: [0; MAX_BATCH],
        })
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
        mut done: impl FnMut(io::Result<usize>),
    ) -> io::Result<()> {
        let mut count = 0;
        for (number, packet) in packets.take(MAX_BATCH).enumerate() {
            let entry = request(end, packet)?.user_data(number as u64);
            // SAFETY: the pieces are good until this function returns, and it returns after the kernel is done with them.
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
fn request(end: RawFd, packet: &[libc::iovec]) -> io::Result<Entry> {
    if let [piece] = packet
        && let Ok(len) = u32::try_from(piece.iov_len)
    {
        return Ok(opcode::Write::new(Fd(end), piece.iov_base.cast(), len).build());
    }
    let pieces =
        u32::try_from(packet.len()).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    Ok(opcode::Writev::new(Fd(end), packet.as_ptr(), pieces).build())
}
