//! The socket device under load: one stream, packets of up to 64 KiB. Operations are bytes.
//!
//! `bench_vsock_tx` sends to port 5001 of the host as fast as there is credit; `bench_vsock_rx` receives from port 5002 whatever comes.

use super::{Count, measure};
use crate::cpu::rdtsc;
use crate::outcome::{Outcome, Reason, same};
use crate::tests::at_cpl3;
use crate::virtio::vsock::{MOST, NOTHING, Packet, Stream, Vsock, op};

/// Ports of ours.
const GUEST_TX: u32 = 2000;
const GUEST_RX: u32 = 2001;

const NONE: Count = Count {
    operations: 0,
    ticks: 0,
    kicks: 0,
};

/// Sends.
pub fn transmit() -> Outcome {
    at_cpl3(|| {
        let mut vsock = Vsock::open()?;
        let mut stream = vsock.connect(5001, GUEST_TX)?;
        measure(|limit| {
            let mut count = NONE;
            let before = vsock.kicks;
            let start = rdtsc();
            loop {
                // What the buffers hold is as good as anything.
                count.operations += u64::from(vsock.push(&mut stream, MOST, |_, _| {})?);
                while let Some(packet) = vsock.poll()? {
                    same("only credit", packet.op.into(), op::CREDIT_UPDATE.into())?;
                    vsock.done(&mut stream, &packet)?;
                }
                count.ticks = rdtsc().wrapping_sub(start);
                if limit.reached(count.operations, count.ticks) {
                    count.kicks = vsock.kicks - before;
                    return Ok(count);
                }
            }
        })?;
        leave(&mut vsock, &mut stream)
    })
}

/// Receives.
pub fn receive() -> Outcome {
    at_cpl3(|| {
        let mut vsock = Vsock::open()?;
        let mut stream = vsock.connect(5002, GUEST_RX)?;
        measure(|limit| {
            let mut count = NONE;
            let before = vsock.kicks;
            let start = rdtsc();
            let mut told = 0;
            loop {
                let packet = vsock.receive()?;
                take(&mut vsock, &mut stream, &packet)?;
                count.operations += u64::from(packet.length);
                if packet.op == op::CREDIT_REQUEST || count.operations - told >= 4 * MOST {
                    vsock.send(&mut stream, op::CREDIT_UPDATE, 0, 0, |_| {})?;
                    told = count.operations;
                }
                count.ticks = rdtsc().wrapping_sub(start);
                if limit.reached(count.operations, count.ticks) {
                    count.kicks = vsock.kicks - before;
                    return Ok(count);
                }
            }
        })?;
        leave(&mut vsock, &mut stream)
    })
}

fn take(vsock: &mut Vsock, stream: &mut Stream, packet: &Packet) -> Outcome {
    if !matches!(packet.op, op::RW | op::CREDIT_REQUEST | op::CREDIT_UPDATE) {
        return Err(Reason("the host ends the stream", packet.op.into(), 0));
    }
    vsock.done(stream, packet)
}

/// Ends the stream, whatever is still under way.
fn leave(vsock: &mut Vsock, stream: &mut Stream) -> Outcome {
    vsock.send(stream, op::SHUTDOWN, NOTHING, 0, |_| {})?;
    loop {
        let packet = vsock.receive()?;
        let over = packet.op == op::RST;
        vsock.done(stream, &packet)?;
        if over {
            return Ok(());
        }
    }
}
