//! The socket device (virtio 1.2 §5.10) against a program of the host.
//!
//! `virtio_vsock`: everything sent to port 5000 comes back, then each half is closed; nobody listens at port 5009; a program connects to
//! port 99 of ours after `READY virtio_vsock`, and gets back what it sends until it closes.
//! `virtio_vsock_left`: connects to port 5003, and leaves the device and the stream as they are.
//! `virtio_vsock_bulk`: sends `vsock_mib=N` MiB to port 5001 and receives as many from port 5002 (bytes: the low byte of offset / 8).

use super::{at_cpl3, ensure, same};
use crate::map::{read, write};
use crate::outcome::Outcome;
use crate::virtio::vsock::{MOST, NO_SEND, NOTHING, Stream, Vsock, op};
use crate::{line, number};

/// Bytes of the echo.
const ECHO: u64 = 300_001;

/// The byte at an offset of a stream.
fn byte(offset: u64) -> u8 {
    (offset / 8) as u8
}

/// Writes what a stream has from `offset` on.
fn fill(at: u64, offset: u64, length: u32) {
    let length = u64::from(length);
    if !(at | offset | length).is_multiple_of(8) {
        for i in 0..length {
            write(at + i, byte(offset + i));
        }
        return;
    }
    for i in (0..length).step_by(8) {
        write(at + i, u64::from(byte(offset + i)) * 0x0101_0101_0101_0101);
    }
}

/// The bytes of a packet are those of the stream from `offset` on.
fn check(at: u64, offset: u64, length: u32) -> Outcome {
    let length = u64::from(length);
    let mut i = 0;
    while i < length {
        let whole = i + 8 <= length && (at + i).is_multiple_of(8) && (offset + i).is_multiple_of(8);
        if whole {
            let wanted = u64::from(byte(offset + i)) * 0x0101_0101_0101_0101;
            same("bytes of a stream", read(at + i), wanted)?;
            i += 8;
        } else {
            let got: u8 = read(at + i);
            same("a byte of a stream", got.into(), byte(offset + i).into())?;
            i += 1;
        }
    }
    Ok(())
}

/// Connects, is connected to, echoes both ways, closes each half, is refused.
pub fn vsock() -> Outcome {
    at_cpl3(|| {
        let mut vsock = Vsock::open()?;
        line!("VALUE vsock_cid {}", vsock.cid);
        let mut stream = vsock.connect(5000, 1024)?;
        echo(&mut vsock, &mut stream)?;
        // We send no more; the peer sees the end, says goodbye, and closes.
        vsock.send(&mut stream, op::SHUTDOWN, NO_SEND, 0, |_| {})?;
        let packet = vsock.expect(&mut stream, op::RW)?;
        same("bytes of the goodbye", packet.length.into(), 3)?;
        vsock.done(&mut stream, &packet)?;
        closed(&mut vsock, &mut stream)?;

        let mut nobody = Stream::new(5009, 1025);
        vsock.send(&mut nobody, op::REQUEST, 0, 0, |_| {})?;
        let packet = vsock.expect(&mut nobody, op::RST)?;
        vsock.done(&mut nobody, &packet)?;

        line!("READY virtio_vsock");
        serve(&mut vsock)
    })
}

/// Connects, and does nothing more: the device still works for us when the test is over.
pub fn left() -> Outcome {
    at_cpl3(|| {
        let mut vsock = Vsock::open()?;
        vsock.connect(5003, 1026)?;
        core::mem::forget(vsock);
        Ok(())
    })
}

/// Sends and gets back at the same time.
fn echo(vsock: &mut Vsock, stream: &mut Stream) -> Outcome {
    let (mut sent, mut received) = (0, 0);
    while received < ECHO {
        // Of lengths that are no multiple of anything.
        let most = (ECHO - sent).min(1 + sent * 7 % 4096);
        let offset = sent;
        sent += u64::from(vsock.push(stream, most, |at, length| fill(at, offset, length))?);
        let packet = if sent == ECHO || stream.credit() == 0 {
            Some(vsock.receive()?)
        } else {
            vsock.poll()?
        };
        if let Some(packet) = packet {
            if packet.op == op::RW {
                check(packet.bytes, received, packet.length)?;
                received += u64::from(packet.length);
            } else {
                same(
                    "a packet meanwhile",
                    packet.op.into(),
                    op::CREDIT_UPDATE.into(),
                )?;
            }
            vsock.done(stream, &packet)?;
        }
    }
    same("bytes that came back", received, ECHO)
}

/// The peer has closed; we let go.
fn closed(vsock: &mut Vsock, stream: &mut Stream) -> Outcome {
    let packet = vsock.expect(stream, op::SHUTDOWN)?;
    vsock.done(stream, &packet)?;
    if packet.flags == NOTHING {
        return vsock.send(stream, op::RST, 0, 0, |_| {});
    }
    same("the half that is done", packet.flags.into(), NO_SEND.into())?;
    vsock.send(stream, op::SHUTDOWN, NOTHING, 0, |_| {})?;
    let packet = vsock.expect(stream, op::RST)?;
    vsock.done(stream, &packet)
}

/// A program of the host connects; it gets back what it sends.
fn serve(vsock: &mut Vsock) -> Outcome {
    let request = vsock.receive()?;
    same("what it asks", request.op.into(), op::REQUEST.into())?;
    same("the port it asks for", request.dst_port.into(), 99)?;
    let mut stream = Stream::new(request.src_port, request.dst_port);
    vsock.done(&mut stream, &request)?;
    vsock.send(&mut stream, op::RESPONSE, 0, 0, |_| {})?;
    loop {
        let packet = vsock.receive()?;
        if packet.op == op::SHUTDOWN {
            let flags = packet.flags;
            vsock.done(&mut stream, &packet)?;
            if flags == NOTHING {
                return vsock.send(&mut stream, op::RST, 0, 0, |_| {});
            }
            vsock.send(&mut stream, op::SHUTDOWN, NOTHING, 0, |_| {})?;
            let packet = vsock.expect(&mut stream, op::RST)?;
            return vsock.done(&mut stream, &packet);
        }
        if packet.op == op::RW {
            ensure("a program sends little", u64::from(packet.length) <= MOST)?;
            ensure("there is credit", stream.credit() >= packet.length)?;
            let (from, length) = (packet.bytes, packet.length);
            vsock.send(&mut stream, op::RW, 0, length, |at| {
                for i in 0..u64::from(length) {
                    write(at + i, read::<u8>(from + i));
                }
            })?;
        }
        vsock.done(&mut stream, &packet)?;
    }
}

/// Many bytes each way, for figures.
pub fn bulk() -> Outcome {
    at_cpl3(|| {
        let total = number("vsock_mib").unwrap_or(4) << 20;
        let mut vsock = Vsock::open()?;
        let mut stream = vsock.connect(5001, 2000)?;
        let mut sent = 0;
        while sent < total {
            let offset = sent;
            sent += u64::from(vsock.push(&mut stream, total - sent, |at, length| {
                fill(at, offset, length);
            })?);
            let packet = if stream.credit() == 0 {
                Some(vsock.receive()?)
            } else {
                vsock.poll()?
            };
            if let Some(packet) = packet {
                same(
                    "a packet meanwhile",
                    packet.op.into(),
                    op::CREDIT_UPDATE.into(),
                )?;
                vsock.done(&mut stream, &packet)?;
            }
        }
        vsock.send(&mut stream, op::SHUTDOWN, NO_SEND, 0, |_| {})?;
        closed(&mut vsock, &mut stream)?;

        let mut stream = vsock.connect(5002, 2001)?;
        let (mut received, mut told) = (0, 0);
        loop {
            let packet = vsock.receive()?;
            match packet.op {
                op::RW => {
                    check(packet.bytes, received, packet.length)?;
                    received += u64::from(packet.length);
                    vsock.done(&mut stream, &packet)?;
                    if received - told >= 4 * MOST {
                        vsock.send(&mut stream, op::CREDIT_UPDATE, 0, 0, |_| {})?;
                        told = received;
                    }
                }
                op::CREDIT_REQUEST => {
                    vsock.done(&mut stream, &packet)?;
                    vsock.send(&mut stream, op::CREDIT_UPDATE, 0, 0, |_| {})?;
                    told = received;
                }
                _ => {
                    same("the end", packet.op.into(), op::SHUTDOWN.into())?;
                    vsock.done(&mut stream, &packet)?;
                    vsock.send(&mut stream, op::RST, 0, 0, |_| {})?;
                    return same("bytes received", received, total);
                }
            }
        }
    })
}
