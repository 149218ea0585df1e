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

/// Sends.
pub fn transmit() -> Outcome {
    at_cpl3(|| {
        run(5001, GUEST_TX, |vsock, stream, _| {
            // What the buffers hold is as good as anything.
            let sent = vsock.push(stream, MOST, |_, _| {})?;
            while let Some(packet) = vsock.poll()? {
                same("only credit", packet.op.into(), op::CREDIT_UPDATE.into())?;
                vsock.done(stream, &packet)?;
            }
            Ok(sent)
        })
    })
}

/// Receives.
pub fn receive() -> Outcome {
    at_cpl3(|| {
        let mut told = 0;
        run(5002, GUEST_RX, |vsock, stream, before| {
            let packet = vsock.receive()?;
            take(vsock, stream, &packet)?;
            let all = before + u64::from(packet.length);
            if packet.op == op::CREDIT_REQUEST || all - told >= 4 * MOST {
                vsock.send(stream, op::CREDIT_UPDATE, 0, 0, |_| {})?;
                told = all;
            }
            Ok(packet.length)
        })
    })
}

/// Measures a stream from `ours` to `port` of the host. `step` moves bytes, given how many were moved before it, and gives how many.
fn run(
    port: u32,
    ours: u32,
    mut step: impl FnMut(&mut Vsock, &mut Stream, u64) -> Outcome<u32>,
) -> Outcome {
    let mut vsock = Vsock::open()?;
    let mut stream = vsock.connect(port, ours)?;
    measure(|limit| {
        let kicks = vsock.kicks;
        let start = rdtsc();
        let mut operations = 0;
        loop {
            operations += u64::from(step(&mut vsock, &mut stream, operations)?);
            let ticks = rdtsc().wrapping_sub(start);
            if limit.reached(operations, ticks) {
                return Ok(Count {
                    operations,
                    ticks,
                    kicks: vsock.kicks - kicks,
                });
            }
        }
    })?;
    leave(&mut vsock, &mut stream)
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
