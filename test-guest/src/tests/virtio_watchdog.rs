//! The watchdog (virtio device type 35): the signs of life of a guest, and what follows when they end.

use super::{at_cpl3, ensure, same};
use crate::cpu::wait_for_interrupt;
use crate::outcome::Outcome;
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{Transport, wait_for};
use crate::{dma, line, map};

const TYPE: u16 = 35;

fn open() -> Outcome<(Transport, Queue)> {
    dma::reset();
    let transport = Transport::find(TYPE, 0)?;
    let features = transport.negotiate(u64::MAX >> 34)?;
    transport.interrupts()?;
    let queue = transport.queue(0, 16, features)?;
    transport.go()?;
    Ok((transport, queue))
}

/// Sends one sign of life; it comes back, with its byte set.
fn sign(queue: &mut Queue) -> Outcome {
    let buffer = dma::take(16, 16)?;
    dma::fill(buffer, 16, 0);
    let segments = [
        Segment::readable(buffer, 8),
        Segment::writable(buffer + 8, 1),
    ];
    ensure("room", queue.add(&segments, false).is_some())?;
    queue.kick();
    let used = wait_for(queue, false)?;
    same("bytes written", u64::from(used.length), 1)?;
    same("the byte", u64::from(map::read::<u8>(buffer + 8)), 1)
}

/// Signs come back; after a reset of the device nothing happens any more.
pub fn watchdog() -> Outcome {
    at_cpl3(|| {
        let (transport, mut queue) = open()?;
        same("its configuration", transport.config.length, 0)?;
        for _ in 0..40 {
            sign(&mut queue)?;
        }
        Ok(())
    })
}

/// One sign, and then silence: the machine starts anew before this ends.
pub fn silence() -> Outcome {
    let (_transport, mut queue) = open()?;
    sign(&mut queue)?;
    line!("VALUE watchdog silent");
    loop {
        wait_for_interrupt();
    }
}
