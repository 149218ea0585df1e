//! The memory device (virtio 1.2 §5.15): blocks plugged, used, unplugged; requests that make no sense.
//!
//! Words: `mem_size=BYTES` of the region, `mem_requested=BYTES` of it. `READY` as in the test of the balloon.

use super::{at_cpl3, ensure, same};
use crate::outcome::Outcome;
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{Transport, wait_for};
use crate::{dma, line, map, number, serial};

const TYPE: u16 = 24;
const PAGE: u64 = 4096;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
/// Bytes of a request, and where the answer is behind it.
const REQUEST: u64 = 24;
const ANSWER: u32 = 10;

struct Mem {
    transport: Transport,
    queue: Queue,
    /// Where a request is made.
    at: u64,
    block: u64,
    start: u64,
    size: u64,
}

impl Mem {
    fn open() -> Outcome<Self> {
        dma::reset();
        let transport = Transport::find(TYPE, 0)?;
        let features = transport.negotiate(u64::MAX >> 34)?;
        transport.interrupts()?;
        let queue = transport.queue(0, 64, features)?;
        transport.go()?;
        let field = |offset| map::read::<u64>(transport.config.at + offset);
        let (block, start, size) = (field(0), field(16), field(24));
        line!("VALUE mem {start:#x} {size} {block}");
        ensure(
            "blocks of 2 MiB or more",
            block >= 2 << 20 && block.is_power_of_two(),
        )?;
        same("the start's alignment", start % (128 << 20), 0)?;
        if let Some(wanted) = number("mem_size") {
            same("the region's size", size, wanted)?;
        }
        same("its usable part", field(32), size)?;
        Ok(Self {
            at: dma::take(REQUEST + 16, 8)?,
            transport,
            queue,
            block,
            start,
            size,
        })
    }

    fn plugged(&self) -> u64 {
        map::read(self.transport.config.at + 40)
    }

    fn requested(&self) -> u64 {
        map::read(self.transport.config.at + 48)
    }

    /// Asks; type and state of the answer.
    fn ask(&mut self, kind: u16, address: u64, blocks: u16) -> Outcome<(u16, u16)> {
        map::write(self.at, u64::from(kind));
        map::write(self.at + 8, address);
        map::write(self.at + 16, u64::from(blocks));
        map::write(self.at + REQUEST, u64::MAX);
        map::write(self.at + REQUEST + 8, u64::MAX);
        let segments = [
            Segment::readable(self.at, REQUEST as u32),
            Segment::writable(self.at + REQUEST, ANSWER),
        ];
        ensure("room", self.queue.add(&segments, false).is_some())?;
        self.queue.kick();
        let used = wait_for(&mut self.queue, false)?;
        same("bytes of the answer", u64::from(used.length), ANSWER.into())?;
        let answer = self.at + REQUEST;
        Ok((map::read(answer), map::read(answer + 8)))
    }

    fn expect(&mut self, kind: u16, block: u64, blocks: u16, wanted: u16) -> Outcome {
        let address = self.start + block * self.block;
        let (answer, _) = self.ask(kind, address, blocks)?;
        same("the answer", answer.into(), wanted.into())
    }

    fn state(&mut self, block: u64, blocks: u16, wanted: u16) -> Outcome {
        let (answer, state) = self.ask(STATE, self.start + block * self.block, blocks)?;
        same("the answer", answer.into(), ACK.into())?;
        same("the state", state.into(), wanted.into())
    }
}

fn ready(what: &str) {
    line!("READY {what}");
    while serial::poll().is_none() {}
}

/// All that is requested is plugged and is memory; unplugged, the host has it, and it comes back as zeros.
pub fn mem() -> Outcome {
    at_cpl3(|| {
        let mut mem = Mem::open()?;
        let requested = mem.requested();
        if let Some(wanted) = number("mem_requested") {
            same("bytes requested", requested, wanted)?;
        }
        same("bytes plugged at first", mem.plugged(), 0)?;
        let blocks = (requested / mem.block) as u16;
        let pages = requested / PAGE;
        mem.state(0, blocks, 1)?;
        mem.expect(PLUG, 0, blocks, ACK)?;
        same("bytes plugged", mem.plugged(), requested)?;
        mem.state(0, blocks, 0)?;
        for round in 0..2 {
            for page in 0..pages {
                let at = mem.start + page * PAGE;
                same("what was in a page", map::read(at), 0)?;
                map::write(at, at + round);
            }
            for page in 0..pages {
                let at = mem.start + page * PAGE;
                same("what is in a page", map::read(at), at + round)?;
            }
            ready("full");
            if round == 0 {
                mem.expect(UNPLUG, 0, blocks, ACK)?;
                mem.state(0, blocks, 1)?;
            } else {
                let (answer, _) = mem.ask(UNPLUG_ALL, 0, 0)?;
                same("the answer", answer.into(), ACK.into())?;
            }
            same("bytes plugged", mem.plugged(), 0)?;
            ready("unplugged");
            mem.expect(PLUG, 0, blocks, ACK)?;
        }
        same("what was in a page", map::read(mem.start), 0)
    })
}

/// Devices reach what is plugged: a request can lie there.
pub fn dma() -> Outcome {
    at_cpl3(|| {
        let mut mem = Mem::open()?;
        mem.ask(UNPLUG_ALL, 0, 0)?;
        mem.expect(PLUG, 0, 1, ACK)?;
        mem.at = mem.start + mem.block - 64;
        mem.state(0, 1, 0)
    })
}

/// Requests that make no sense are told so, and change nothing.
pub fn hostile() -> Outcome {
    at_cpl3(|| {
        let mut mem = Mem::open()?;
        mem.ask(UNPLUG_ALL, 0, 0)?;
        let all = mem.size / mem.block;
        let requested = (mem.requested() / mem.block) as u16;
        mem.expect(PLUG, 0, requested + 1, NACK)?;
        mem.expect(PLUG, 0, 0, ERROR)?;
        mem.expect(PLUG, all, 1, ERROR)?;
        mem.expect(PLUG, all - 1, 2, ERROR)?;
        mem.expect(PLUG, 0, u16::MAX, ERROR)?;
        mem.expect(UNPLUG, 0, 1, ERROR)?;
        mem.expect(PLUG, 1, 1, ACK)?;
        mem.expect(PLUG, 0, 2, ERROR)?;
        mem.expect(UNPLUG, 0, 2, ERROR)?;
        mem.state(0, 2, 2)?;
        for address in [
            0,
            mem.start + PAGE,
            mem.start - mem.block,
            u64::MAX,
            1 << 63,
        ] {
            for kind in [PLUG, UNPLUG, STATE] {
                let (answer, _) = mem.ask(kind, address, 1)?;
                same("an answer", answer.into(), ERROR.into())?;
            }
        }
        for kind in [4, 77, u16::MAX] {
            let (answer, _) = mem.ask(kind, mem.start, 1)?;
            same("an answer", answer.into(), ERROR.into())?;
        }
        same("bytes plugged", mem.plugged(), mem.block)?;
        mem.ask(UNPLUG_ALL, 0, 0)?;
        same("bytes plugged", mem.plugged(), 0)
    })
}
