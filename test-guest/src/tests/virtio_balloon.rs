//! The balloon (virtio 1.2 §5.5): pages that go to the host and come back as zeros, free pages reported.
//!
//! Words: `balloon=BYTES` that the device is to ask for. The tests say `READY` where the host looks at the VMM's memory, and go on
//! when a byte comes.

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::outcome::{Outcome, Reason};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{NEEDS_RESET, PATIENCE, Transport, wait_for};
use crate::{dma, line, map, number, serial};

const TYPE: u16 = 5;
const STATS_VQ: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where the pages are that this plays with; the guest's image and the devices' memory lie below.
const START: u64 = 48 * MIB;
/// Pages of them.
const COUNT: u64 = 64 * MIB / PAGE;
/// Page numbers in a request, as many as Linux has in one.
const BATCH: u64 = 256;

struct Balloon {
    transport: Transport,
    inflate: Queue,
    deflate: Queue,
    features: u64,
    /// Where a request's page numbers are.
    numbers: u64,
}

impl Balloon {
    fn open() -> Outcome<Self> {
        dma::reset();
        let transport = Transport::find(TYPE, 0)?;
        let features = transport.negotiate(u64::MAX >> 34)?;
        line!("VALUE balloon_features {features:#x}");
        transport.interrupts()?;
        let inflate = transport.queue(0, 128, features)?;
        let deflate = transport.queue(1, 128, features)?;
        transport.go()?;
        Ok(Self {
            transport,
            inflate,
            deflate,
            features,
            numbers: dma::take(4 * BATCH, PAGE)?,
        })
    }

    /// Pages that the device wants.
    fn target(&self) -> u32 {
        map::read(self.transport.config.at)
    }

    fn set_actual(&self, pages: u32) {
        map::write(self.transport.config.at + 4, pages);
    }
}

/// Puts all pages into one of the queues, the last ones first, as kernels hand them out.
fn move_pages(queue: &mut Queue, numbers: u64) -> Outcome {
    let mut left = COUNT;
    while left > 0 {
        for i in 0..BATCH {
            map::write(numbers + 4 * i, (START / PAGE + left - 1 - i) as u32);
        }
        let list = [Segment::readable(numbers, 4 * BATCH as u32)];
        ensure("room", queue.add(&list, false).is_some())?;
        queue.kick();
        let used = wait_for(queue, false)?;
        same("bytes written", u64::from(used.length), 0)?;
        left -= BATCH;
    }
    Ok(())
}

/// Writes a value to each page that has `before`, or fails.
fn touch(before: u64) -> Outcome {
    for page in 0..COUNT {
        let at = START + page * PAGE;
        same("what was in a page", map::read(at), before * at)?;
        map::write(at, at);
    }
    Ok(())
}

/// The host looks.
fn ready(what: &str) {
    line!("READY {what}");
    while serial::poll().is_none() {}
}

/// Pages go into the balloon, and are zeros when they come out of it.
pub fn balloon() -> Outcome {
    at_cpl3(|| {
        let mut balloon = Balloon::open()?;
        if let Some(bytes) = number("balloon") {
            same("pages wanted", balloon.target().into(), bytes / PAGE)?;
        }
        dma::fill(START, COUNT * PAGE, 0);
        touch(0)?;
        ready("full");
        move_pages(&mut balloon.inflate, balloon.numbers)?;
        balloon.set_actual(COUNT as u32);
        let actual: u32 = map::read(balloon.transport.config.at + 4);
        same("pages in it", actual.into(), COUNT)?;
        ready("inflated");
        move_pages(&mut balloon.deflate, balloon.numbers)?;
        balloon.set_actual(0);
        touch(0)?;
        touch(1)
    })
}

/// Free pages go to the host, at the queue where Linux has it and at the one of the standard.
pub fn reporting() -> Outcome {
    at_cpl3(|| {
        for index in [3, 4] {
            let mut balloon = Balloon::open()?;
            ensure("reporting", balloon.features & REPORTING != 0)?;
            ensure("statistics", balloon.features & STATS_VQ != 0)?;
            // The queue comes before DRIVER_OK.
            let features = {
                balloon.transport.reset()?;
                balloon.transport.negotiate(balloon.features)?
            };
            let mut queue = balloon.transport.queue(index, 32, features)?;
            balloon.transport.go()?;
            dma::fill(START, COUNT * PAGE, 0);
            touch(0)?;
            ready("full");
            let mut pieces = [Segment::writable(0, 0); 16];
            for (i, piece) in pieces.iter_mut().enumerate() {
                *piece = Segment::writable(START + 4 * MIB * i as u64, 4 * MIB as u32);
            }
            ensure("room", queue.add(&pieces, true).is_some())?;
            queue.kick();
            let used = wait_for(&mut queue, false)?;
            same("bytes written", u64::from(used.length), 0)?;
            ready("reported");
            touch(0)?;
            balloon.inflate = queue;
        }
        Ok(())
    })
}

/// Pages that are no RAM are refused, and a reset mends it.
pub fn hostile() -> Outcome {
    at_cpl3(|| {
        for wrong in [0xf_0000u32, 0x10_0000, u32::MAX] {
            let mut balloon = Balloon::open()?;
            map::write(START, 7u64);
            map::write(balloon.numbers, (START / PAGE) as u32);
            map::write(balloon.numbers + 4, wrong);
            let list = [Segment::readable(balloon.numbers + 4, 4)];
            ensure("room", balloon.inflate.add(&list, false).is_some())?;
            balloon.inflate.kick();
            let broken = within(PATIENCE, || balloon.transport.status() & NEEDS_RESET != 0);
            if !broken {
                return Err(Reason("a page that is no RAM", wrong.into(), 0));
            }
            same("a page that was not named", map::read(START), 7)?;
        }
        let mut balloon = Balloon::open()?;
        map::write(balloon.numbers, (START / PAGE) as u32);
        let list = [Segment::readable(balloon.numbers, 4)];
        ensure("room", balloon.inflate.add(&list, false).is_some())?;
        balloon.inflate.kick();
        wait_for(&mut balloon.inflate, true)?;
        same("a page in the balloon", map::read(START), 0)
    })
}
