//! The entropy device (virtio 1.2 §5.4), and with it what MSI-X does when masked (PCI 3.0 §6.8.2).

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::cpu::{apic, idt, wait_for_interrupt};
use crate::outcome::{Outcome, Reason};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{NO_VECTOR, PATIENCE, Transport, common, wait_for};
use crate::{dma, line, map};

const TYPE: u16 = 4;
const CANARY: u8 = 0xa5;

/// The device with its one queue, running.
pub fn open() -> Outcome<(Transport, Queue)> {
    dma::reset();
    let transport = Transport::find(TYPE, 0)?;
    let features = transport.negotiate(u64::MAX >> 34)?;
    line!("VALUE virtio_rng_features {features:#x}");
    transport.interrupts()?;
    let queue = transport.queue(0, 16, features)?;
    transport.go()?;
    Ok((transport, queue))
}

/// Asks for bytes.
pub fn request(queue: &mut Queue, at: u64, length: u32) -> Outcome {
    ensure(
        "the queue has room",
        queue.add(&[Segment::writable(at, length)], false).is_some(),
    )?;
    queue.kick();
    Ok(())
}

/// Bytes arrive, by polling at CPL 3 and by an interrupt out of HLT at CPL 0; no byte past the end changes.
pub fn rng() -> Outcome {
    at_cpl3(|| {
        let (_transport, mut queue) = open()?;
        let buffer = dma::take(8192, 4096)?;
        for (by_interrupt, length) in [
            (false, 64),
            (false, 1),
            (true, 64),
            (true, 4096),
            (false, 4095),
        ] {
            dma::fill(buffer, 8192, CANARY);
            queue.ask_for_interrupt(by_interrupt);
            request(&mut queue, buffer, length)?;
            let used = wait_for(&mut queue, by_interrupt)?;
            line!("VALUE virtio_rng {length} {}", used.length);
            ensure("bytes in the request", (1..=length).contains(&used.length))?;
            let filled = u64::from(used.length);
            ensure(
                "nothing past the end",
                dma::all(buffer + filled, 8192 - filled, CANARY),
            )?;
            if filled >= 32 {
                let first: u8 = map::read(buffer);
                ensure(
                    "the bytes aren't all equal",
                    !dma::all(buffer, filled, first),
                )?;
                let halves = (0..16)
                    .all(|i| map::read::<u8>(buffer + i) == map::read::<u8>(buffer + 16 + i));
                ensure("the bytes don't repeat", !halves)?;
            }
        }
        Ok(())
    })?;
    let (_transport, mut queue) = open()?;
    let buffer = dma::take(64, 1)?;
    let vector = Transport::queue_vector(0);
    let seen = idt::count(vector);
    queue.ask_for_interrupt(true);
    request(&mut queue, buffer, 64)?;
    while idt::count(vector) == seen {
        wait_for_interrupt();
    }
    let used = queue
        .take()?
        .ok_or(Reason("an interrupt without a used chain", 0, 1))?;
    ensure("bytes after HLT", used.length > 0)?;
    ensure(
        "they aren't all zero",
        !dma::all(buffer, u64::from(used.length), 0),
    )
}

/// What is masked waits, pending, and comes once when it is let through; without a vector nothing comes.
pub fn msix() -> Outcome {
    at_cpl3(|| {
        let (transport, mut queue) = open()?;
        let buffer = dma::take(64, 64)?;
        let msix = transport.msix;
        let vector = Transport::queue_vector(0);
        line!("VALUE msix_entries {}", msix.count);
        let (address, data, control) = msix.read(1);
        same("an entry's address", address & 0xfff0_0000, 0xfee0_0000)?;
        same("an entry's data", u64::from(data), u64::from(vector))?;
        same("an entry's mask", u64::from(control & 1), 0)?;

        for whole in [false, true] {
            let hold = |on: bool| {
                if whole {
                    msix.enable(true, on);
                } else {
                    msix.mask(1, on);
                }
            };
            hold(true);
            let seen = idt::count(vector);
            queue.ask_for_interrupt(true);
            request(&mut queue, buffer, 64)?;
            ensure(
                "the request comes back",
                within(PATIENCE, || queue.has_used()),
            )?;
            ensure(
                "a masked entry is pending",
                within(PATIENCE, || msix.is_pending(1)),
            )?;
            same(
                "interrupts while masked",
                u64::from(idt::count(vector) - seen),
                0,
            )?;
            hold(false);
            ensure(
                "the interrupt comes, unmasked",
                within(PATIENCE, || idt::count(vector) != seen),
            )?;
            ensure("and is pending no more", !msix.is_pending(1))?;
            same(
                "interrupts when unmasked",
                u64::from(idt::count(vector) - seen),
                1,
            )?;
            queue.take()?;
        }

        // Masked, routed elsewhere, let through: it comes by the new vector.
        let other = Transport::queue_vector(5);
        msix.route(1, other, apic::boot_id());
        let (old, seen) = (idt::count(vector), idt::count(other));
        queue.ask_for_interrupt(true);
        request(&mut queue, buffer, 64)?;
        ensure(
            "an interrupt by the new vector",
            within(PATIENCE, || idt::count(other) != seen),
        )?;
        same(
            "interrupts by the old vector",
            u64::from(idt::count(vector) - old),
            0,
        )?;
        queue.take()?;

        drop(transport);
        no_vector(buffer)
    })
}

/// A queue without a vector is served all the same, in silence.
fn no_vector(buffer: u64) -> Outcome {
    let transport = Transport::find(TYPE, 0)?;
    let features = transport.negotiate(0)?;
    let mut queue = transport.queue(0, 16, features)?;
    transport.select(0);
    transport.set(common::QUEUE_VECTOR, NO_VECTOR);
    let vector = transport.get::<u16>(common::QUEUE_VECTOR);
    same("no vector reads back", u64::from(vector), 0xffff)?;
    // A vector that the table hasn't got is refused.
    transport.set(common::CONFIG_VECTOR, transport.msix.count);
    let vector = transport.get::<u16>(common::CONFIG_VECTOR);
    same("a vector past the table", u64::from(vector), 0xffff)?;
    transport.go()?;
    let counts = || {
        (0..8)
            .map(|i| idt::count(Transport::queue_vector(i)))
            .sum::<u32>()
    };
    let before = counts();
    request(&mut queue, buffer, 64)?;
    ensure(
        "it is served without a vector",
        within(PATIENCE, || queue.has_used()),
    )?;
    same(
        "interrupts without a vector",
        u64::from(counts() - before),
        0,
    )
}
