//! The PCI transport of every virtio device (virtio 1.2 §4.1): its structures, access by configuration space, interrupt
//! status without MSI-X; and, of the rules that some devices bend, those that keep a late or wrong write harmless.

use super::virtio_rng::{open, request};
use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::outcome::Outcome;
use crate::pci::Function;
use crate::virtio::{
    ACKNOWLEDGE, DRIVER, F_VERSION_1, FEATURES_OK, PATIENCE, Transport, Window, common, wait_for,
};
use crate::{dma, line, map};

const NO_INTX: u16 = 1 << 10;

/// What any device keeps to.
pub fn transport() -> Outcome {
    at_cpl3(|| {
        for function in Transport::all() {
            let transport = Transport::open(function)?;
            line!(
                "VALUE virtio {function} features={:#x} queues={} msix={} multiplier={} config={}",
                transport.offered(),
                transport.queue_count(),
                transport.msix.count,
                transport.multiplier,
                transport.config.length
            );
            structures(&transport)?;
            by_configuration_space(&transport)?;
        }
        interrupt_status()
    })
}

/// Each structure lies in its BAR, no two overlap, and the doorbells are 2 bytes or more apart, or all one.
fn structures(t: &Transport) -> Outcome {
    let f = t.function;
    for (at, _) in f.capabilities().filter(|c| c.1 == 9) {
        if !(1..5).contains(&f.read8(at + 3)) {
            continue;
        }
        let size = f.bar(f.read8(at + 4)).map_or(0, |b| b.size);
        let end = u64::from(f.read32(at + 8)) + u64::from(f.read32(at + 12));
        ensure("a virtio structure lies in its BAR", end <= size)?;
    }
    let parts = [t.common, t.doorbells, t.isr, t.config];
    for (i, a) in parts.iter().enumerate() {
        for b in &parts[i + 1..] {
            let apart = a.at + a.length <= b.at || b.at + b.length <= a.at;
            ensure("virtio structures lie apart", apart)?;
        }
    }
    let step = t.multiplier;
    ensure(
        "the notify multiplier",
        step == 0 || (step.is_power_of_two() && step >= 2),
    )
}

/// The capability for access by configuration space reads and writes what memory shows.
fn by_configuration_space(t: &Transport) -> Outcome {
    let Some(at) = t.access else {
        return Ok(());
    };
    let f: Function = t.function;
    // The common configuration's own capability tells BAR and offset.
    let mut capabilities = f.capabilities().filter(|c| c.1 == 9);
    let Some((own, _)) = capabilities.find(|c| f.read8(c.0 + 3) == 1) else {
        return ensure("a capability of the common configuration", false);
    };
    let aim = |field: u64, length: u32| {
        f.write8(at + 4, f.read8(own + 4));
        f.write32(at + 8, f.read32(own + 8) + field as u32);
        f.write32(at + 12, length);
    };
    aim(common::NUM_QUEUES, 2);
    same(
        "queues by configuration space",
        u64::from(f.read16(at + 16)),
        u64::from(t.queue_count()),
    )?;
    aim(common::STATUS, 1);
    f.write8(at + 16, ACKNOWLEDGE);
    f.write8(at + 16, ACKNOWLEDGE | DRIVER);
    same(
        "status by configuration space",
        u64::from(f.read8(at + 16)),
        3,
    )?;
    same("and by memory", u64::from(t.status()), 3)?;
    aim(common::DEVICE_FEATURE_SELECT, 4);
    f.write32(at + 16, 1);
    aim(common::DEVICE_FEATURE, 4);
    same(
        "features by configuration space",
        u64::from(f.read32(at + 16)),
        t.offered() >> 32,
    )?;
    // Lengths and places that can't be: nothing comes of them.
    for (length, offset) in [
        (3, 0),
        (8, 0),
        (0, 0),
        (4, u32::MAX),
        (4, 0x7fff_fffd),
        (1, 1 << 20),
    ] {
        f.write32(at + 12, length);
        f.write32(at + 8, offset);
        f.write32(at + 16, f.read32(at + 16));
    }
    f.write8(at + 4, 7);
    f.read32(at + 16);
    t.reset()
}

/// Without MSI-X the interrupt status says that a queue has something, once.
fn interrupt_status() -> Outcome {
    let (transport, mut queue) = open()?;
    let function = transport.function;
    let command = function.command();
    function.set_command(command | NO_INTX);
    transport.msix.enable(false, false);
    let buffer = dma::take(64, 64)?;
    map::read::<u8>(transport.isr.at);
    queue.ask_for_interrupt(true);
    request(&mut queue, buffer, 64)?;
    ensure(
        "a request comes back without MSI-X",
        within(PATIENCE, || queue.has_used()),
    )?;
    let Window { at, .. } = transport.isr;
    let mut seen = 0;
    let came = within(PATIENCE, || map::read::<u8>(at) & 1 != 0);
    seen += u64::from(came);
    same("interrupt status after a used chain", seen, 1)?;
    same("and once it was read", u64::from(map::read::<u8>(at)), 0)?;
    function.set_command(command);
    Ok(())
}

/// FEATURES_OK is refused where it must be; writes that come too late change nothing.
pub fn strict() -> Outcome {
    at_cpl3(|| {
        for function in Transport::all() {
            let t = Transport::open(function)?;
            let offered = t.offered();
            let unknown = 1u64 << (!offered & 0xffff_ffff).trailing_zeros();
            for bad in [0, offered & !F_VERSION_1, F_VERSION_1 | unknown] {
                t.reset()?;
                t.set_status(ACKNOWLEDGE | DRIVER);
                t.accept(bad);
                t.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
                same(
                    "FEATURES_OK for what can't be",
                    u64::from(t.status() & FEATURES_OK),
                    0,
                )?;
            }
            t.reset()?;
            t.set_status(ACKNOWLEDGE | DRIVER);
            t.accept(F_VERSION_1);
            t.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
            same(
                "FEATURES_OK for VERSION_1",
                u64::from(t.status() & FEATURES_OK),
                8,
            )?;
            for select in [2u32, 3, u32::MAX] {
                t.set(common::DEVICE_FEATURE_SELECT, select);
                let word: u32 = t.get(common::DEVICE_FEATURE);
                same("feature bits past 63", u64::from(word), 0)?;
            }
            for bad in [0u16, 3, 0xffff] {
                let size = t.select(0);
                t.set(common::QUEUE_SIZE, bad);
                same(
                    "a queue size that can't be",
                    u64::from(t.get::<u16>(common::QUEUE_SIZE)),
                    u64::from(size),
                )?;
            }
        }
        late_writes()
    })
}

/// After DRIVER_OK: queue size, addresses and features stay, and the queue goes on where it was.
fn late_writes() -> Outcome {
    let (t, mut queue) = open()?;
    let buffer = dma::take(64, 64)?;
    t.select(0);
    t.set(common::QUEUE_SIZE, 2u16);
    same(
        "a late queue size",
        u64::from(t.get::<u16>(common::QUEUE_SIZE)),
        u64::from(queue.size),
    )?;
    for (field, address) in [
        (common::QUEUE_DESC, queue.descriptors),
        (common::QUEUE_DRIVER, queue.available),
        (common::QUEUE_DEVICE, queue.used),
    ] {
        t.set_wide(field, 0x1000);
        same("a late address", t.get_wide(field), address)?;
    }
    t.accept(0);
    for _ in 0..40 {
        request(&mut queue, buffer, 64)?;
        wait_for(&mut queue, true)?;
    }
    Ok(())
}
