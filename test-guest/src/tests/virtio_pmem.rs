//! Persistent memory (virtio 1.2 §5.19): read and written through the mapping, flushed by the queue, reached by other devices.
//!
//! Words: `pmem=N` devices (1), `pmem_size=BYTES` of each, `pmem_before=VALUE` that the first 8 bytes have.

use super::{at_cpl3, ensure, same};
use crate::outcome::Outcome;
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{Transport, wait_for};
use crate::{dma, line, map, number};

const TYPE: u16 = 27;
const ALIGNMENT: u64 = 2 << 20;
const FLUSH: u32 = 0;
const OK: u32 = 0;
const EIO: u32 = 1;

/// A device that runs, and where its memory is.
struct Pmem {
    transport: Transport,
    queue: Queue,
    size: u64,
    /// Where the memory is mapped.
    at: u64,
}

impl Pmem {
    fn open(nth: u64) -> Outcome<Self> {
        let transport = Transport::find(TYPE, nth)?;
        let features = transport.negotiate(u64::MAX >> 34)?;
        transport.interrupts()?;
        let queue = transport.queue(0, 64, features)?;
        transport.go()?;
        same("bytes of configuration", transport.config.length, 16)?;
        let start: u64 = map::read(transport.config.at);
        let size: u64 = map::read(transport.config.at + 8);
        line!("VALUE pmem {start:#x} {size}");
        same("the start's alignment", start % ALIGNMENT, 0)?;
        ensure("it lies above 4 GiB", start >= 4 << 30)?;
        if let Some(wanted) = number("pmem_size") {
            same("its size", size, wanted)?;
        }
        let at = map::device(start, size).unwrap_or(0);
        ensure("its memory can be mapped", at != 0)?;
        Ok(Self {
            transport,
            queue,
            size,
            at,
        })
    }

    fn ask(&mut self, kind: u32, by_interrupt: bool) -> Outcome<u32> {
        let buffers = dma::take(16, 16)?;
        map::write(buffers, kind);
        map::write(buffers + 8, u32::MAX);
        let segments = [
            Segment::readable(buffers, 4),
            Segment::writable(buffers + 8, 4),
        ];
        self.queue.ask_for_interrupt(by_interrupt);
        ensure("room", self.queue.add(&segments, false).is_some())?;
        self.queue.kick();
        let used = wait_for(&mut self.queue, by_interrupt)?;
        same("bytes of the answer", u64::from(used.length), 4)?;
        Ok(map::read(buffers + 8))
    }
}

/// Bytes are there and stay, at both ends; a flush is answered; no device has memory of another's.
pub fn pmem() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let count = number("pmem").unwrap_or(1);
        for nth in 0..count {
            let mut pmem = Pmem::open(nth)?;
            let before = number("pmem_before").unwrap_or(0);
            same("what was there", map::read(pmem.at), before)?;
            let page = pmem.size / 4096 - 1;
            for at in [0, 4096 * (page / 2), 4096 * page + 4088] {
                map::write(pmem.at + at, 0x5eed_0000 + nth * 0x1_0000 + at);
            }
            for by_interrupt in [false, true] {
                same(
                    "a flush",
                    u64::from(pmem.ask(FLUSH, by_interrupt)?),
                    u64::from(OK),
                )?;
            }
            same(
                "no such request",
                u64::from(pmem.ask(1, false)?),
                u64::from(EIO),
            )?;
        }
        // All are there after the last was written.
        for nth in 0..count {
            let pmem = Pmem::open(nth)?;
            let page = pmem.size / 4096 - 1;
            for at in [0, 4096 * (page / 2), 4096 * page + 4088] {
                let value = map::read(pmem.at + at);
                same("what was written", value, 0x5eed_0000 + nth * 0x1_0000 + at)?;
            }
        }
        Ok(())
    })
}

/// Other devices read and write it: the queue's own answer can lie in it.
pub fn dma() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        // Nothing follows the last.
        let mut pmem = Pmem::open(number("pmem").unwrap_or(1) - 1)?;
        let start: u64 = map::read(pmem.transport.config.at);
        let place = start + pmem.size - 16;
        let seen = pmem.at + pmem.size - 16;
        map::write(seen, FLUSH);
        map::write(seen + 8, u32::MAX);
        let segments = [Segment::readable(place, 4), Segment::writable(place + 8, 4)];
        ensure("room", pmem.queue.add(&segments, false).is_some())?;
        pmem.queue.kick();
        wait_for(&mut pmem.queue, false)?;
        same("the answer", u64::from(map::read::<u32>(seen + 8)), 0)?;
        // The page after it is nobody's: a request there is a fault.
        let segments = [
            Segment::readable(place, 4),
            Segment::writable(place + 12, 8),
        ];
        ensure("room", pmem.queue.add(&segments, false).is_some())?;
        pmem.queue.kick();
        let broken = crate::clock::within(crate::virtio::PATIENCE, || {
            pmem.transport.status() & crate::virtio::NEEDS_RESET != 0
        });
        ensure("a buffer past its end wants a reset", broken)
    })
}
