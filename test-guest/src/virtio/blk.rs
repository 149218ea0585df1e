//! Block device (virtio 1.2 §5.2): requests on one or more queues, several in flight.

use super::queue::{Queue, Segment, TABLE_ENTRIES};
use super::{F_INDIRECT, Transport, wait_for};
use crate::dma;
use crate::map::{read, write};
use crate::number;
use crate::outcome::{Outcome, Reason};

/// Device type.
pub const TYPE: u16 = 2;
/// Most queues that this driver uses.
pub const MAX_QUEUES: usize = 8;

/// Feature: most segments in a request.
pub const F_SEG_MAX: u64 = 1 << 2;
/// Feature: read-only.
pub const F_RO: u64 = 1 << 5;
/// Feature: block size.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// Feature: flush.
pub const F_FLUSH: u64 = 1 << 9;
/// Feature: topology.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// Feature: write-back on and off.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// Feature: several queues.
pub const F_MQ: u64 = 1 << 12;
/// Feature: discard.
pub const F_DISCARD: u64 = 1 << 13;
/// Feature: write zeroes.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request: read.
pub const IN: u32 = 0;
/// Request: write.
pub const OUT: u32 = 1;
/// Request: flush.
pub const FLUSH: u32 = 4;
/// Request: the serial number.
pub const GET_ID: u32 = 8;
/// Request: discard.
pub const DISCARD: u32 = 11;
/// Request: write zeroes.
pub const WRITE_ZEROES: u32 = 13;

/// Status: done.
pub const OK: u8 = 0;
/// Status: failed.
pub const IOERR: u8 = 1;
/// Status: not a request that the device knows.
pub const UNSUPP: u8 = 2;

/// How to set the device up.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Features to accept where they are offered.
    pub features: u64,
    /// Queues to use, at most.
    pub queues: u16,
    /// Entries a queue, at most.
    pub size: u16,
    /// Completion by interrupt, or by polling.
    pub interrupts: bool,
}

impl Setup {
    /// Everything that this driver knows, one queue of 64, by interrupt.
    pub const FULL: Self = Self {
        features: u64::MAX >> 34,
        queues: 1,
        size: 64,
        interrupts: true,
    };
}

/// A request that came back.
#[derive(Clone, Copy)]
pub struct Done {
    /// First descriptor of its chain.
    pub head: u16,
    /// Bytes that the device says it wrote, the status among them.
    pub length: u32,
    /// Its status; 0xff when the device wrote none.
    pub status: u8,
}

/// The device, running.
pub struct Blk {
    /// Its transport.
    pub transport: Transport,
    /// Features in use.
    pub features: u64,
    /// How many queues are in use.
    pub count: usize,
    queues: [Option<Queue>; MAX_QUEUES],
    headers: [u64; MAX_QUEUES],
    interrupts: bool,
}

impl Blk {
    /// Resets the device that `blk_index=` names (default the first), and sets it up.
    pub fn open(setup: Setup) -> Outcome<Self> {
        let transport = Transport::find(TYPE, number("blk_index").unwrap_or(0))?;
        let features = transport.negotiate(setup.features)?;
        transport.interrupts()?;
        let has = if features & F_MQ != 0 {
            read(transport.config.at + 34)
        } else {
            1
        };
        let count = setup.queues.min(has).min(transport.queue_count());
        let mut blk = Self {
            transport,
            features,
            count: usize::from(count).min(MAX_QUEUES),
            queues: [const { None }; MAX_QUEUES],
            headers: [0; MAX_QUEUES],
            interrupts: setup.interrupts,
        };
        for index in 0..blk.count {
            let queue = blk.transport.queue(index as u16, setup.size, features)?;
            blk.headers[index] = dma::take(32 * u64::from(queue.size), 16)?;
            queue.ask_for_interrupt(setup.interrupts);
            blk.queues[index] = Some(queue);
        }
        blk.transport.go()?;
        Ok(blk)
    }

    /// Sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        let half = |at| u64::from(read::<u32>(self.transport.config.at + at));
        half(0) | half(4) << 32
    }

    /// Most data segments that a request may have here.
    pub fn segments(&self) -> usize {
        let ours = TABLE_ENTRIES as usize - 2;
        if self.features & F_SEG_MAX == 0 {
            return 1;
        }
        ours.min(read::<u32>(self.transport.config.at + 12) as usize)
    }

    /// A queue in use.
    pub fn queue(&mut self, index: usize) -> Outcome<&mut Queue> {
        let queue = self.queues.get_mut(index).and_then(Option::as_mut);
        queue.ok_or(Reason(
            "no such queue in use",
            index as u64,
            self.count as u64,
        ))
    }

    /// A queue in use and the transport.
    pub fn parts(&mut self, index: usize) -> Outcome<(&mut Queue, &Transport)> {
        let queue = self.queues.get_mut(index).and_then(Option::as_mut);
        let queue = queue.ok_or(Reason("no such queue in use", index as u64, 1))?;
        Ok((queue, &self.transport))
    }

    /// Puts a request into a queue; its head, or `None` when there is no room. `kick` tells the device.
    pub fn start(
        &mut self,
        index: usize,
        kind: u32,
        sector: u64,
        data: &[Segment],
    ) -> Outcome<Option<u16>> {
        let indirect = self.features & F_INDIRECT != 0;
        let base = self.headers[index.min(MAX_QUEUES - 1)];
        let queue = self.queue(index)?;
        let mut chain = [Segment::readable(0, 0); TABLE_ENTRIES as usize];
        let Some(room) = chain.get_mut(1..data.len() + 1) else {
            return Err(Reason(
                "too many segments",
                data.len() as u64,
                TABLE_ENTRIES,
            ));
        };
        room.copy_from_slice(data);
        let Some(head) = queue.next_head() else {
            return Ok(None);
        };
        let header = base + u64::from(head) * 32;
        write(header, kind);
        write(header + 4, 0u32);
        write(header + 8, sector);
        write(header + 16, 0xffu8);
        chain[0] = Segment::readable(header, 16);
        chain[data.len() + 1] = Segment::writable(header + 16, 1);
        Ok(queue.add(&chain[..data.len() + 2], indirect))
    }

    /// Tells the device about new requests, unless it needn't know.
    pub fn kick(&mut self, index: usize) -> Outcome<bool> {
        Ok(self.queue(index)?.kick())
    }

    /// Waits for a request of a queue to come back.
    pub fn finish(&mut self, index: usize) -> Outcome<Done> {
        let (by_interrupt, base) = (self.interrupts, self.headers[index.min(MAX_QUEUES - 1)]);
        let used = wait_for(self.queue(index)?, by_interrupt)?;
        Ok(Done {
            head: used.head,
            length: used.length,
            status: read(base + u64::from(used.head) * 32 + 16),
        })
    }

    /// The status of a request that came back.
    pub fn status(&self, index: usize, head: u16) -> u8 {
        read(self.headers[index.min(MAX_QUEUES - 1)] + u64::from(head) * 32 + 16)
    }

    /// One request, from start to end.
    pub fn run(&mut self, index: usize, kind: u32, sector: u64, data: &[Segment]) -> Outcome<Done> {
        let started = self.start(index, kind, sector, data)?;
        let head = started.ok_or(Reason("the queue is full", 0, 1))?;
        self.kick(index)?;
        let done = self.finish(index)?;
        if done.head != head {
            return Err(Reason(
                "another request came back",
                u64::from(done.head),
                u64::from(head),
            ));
        }
        Ok(done)
    }
}
