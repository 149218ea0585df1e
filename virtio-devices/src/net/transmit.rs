//! Packets from the driver (virtio 1.2 §5.1.6.2): the kernel takes each straight from the driver's buffers. When it takes no more,
//! they stay in the queue.
#![allow(unsafe_code)]

use std::io::ErrorKind;

use log::debug;
use net_util::{MAX_PACKET_LEN, VNET_HEADER_LEN};
use vm_memory::GuestMemory;
use vm_virtio::{Chain, Context, DeviceQueue, Fault, Outcome, QueueError};

use super::backend::PacketQueue;
use crate::pieces::{MOST, Pieces};

/// Packets before it is the turn of others.
const TURN: usize = 64;

/// What one queue needs to transmit.
#[derive(Default)]
pub(super) struct Transmitter {
    /// The host's end takes nothing until it says otherwise.
    pub blocked: bool,
    pieces: Pieces,
}

impl Transmitter {
    /// Sends what the driver gave, as far as the host's end takes it.
    pub fn transmit<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        end: &dyn PacketQueue,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        if self.blocked {
            return Ok(());
        }
        let mut left = TURN;
        context.serve(queue, memory, |chain| {
            if left == 0 {
                return Ok(Outcome::Later);
            }
            left -= 1;
            self.send(memory, chain, end)
        })?;
        if left == 0 && !self.blocked {
            context.again(queue.index());
        }
        Ok(())
    }

    fn send<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain,
        end: &dyn PacketQueue,
    ) -> Result<Outcome, Fault> {
        let len = chain.readable_len() as usize;
        if len < VNET_HEADER_LEN {
            return Err(Fault::Short {
                wanted: VNET_HEADER_LEN,
                left: len,
            });
        }
        if len > MAX_PACKET_LEN {
            debug!("a packet of {len} bytes is too long to be sent");
            return Ok(Outcome::Used(0));
        }
        self.pieces.clear();
        chain.reader(memory).slices(len, |slice| {
            // One more than there may be shows that there are too many.
            if self.pieces.len() <= MOST {
                self.pieces.push(&slice);
            }
            Ok(())
        })?;
        if self.pieces.len() > MOST {
            debug!("a packet in more than {MOST} pieces cannot be sent");
            return Ok(Outcome::Used(0));
        }
        // SAFETY: the pieces were found in guest memory just now, whose mapping the caller borrows; nobody makes references to them.
        match unsafe { end.write_packet(self.pieces.as_slice()) } {
            Ok(_) => Ok(Outcome::Used(0)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => {
                    self.blocked = true;
                    Ok(Outcome::Later)
                }
                kind => {
                    debug!("a packet is not sent: {kind}");
                    Ok(Outcome::Used(0))
                }
            },
        }
    }
}
