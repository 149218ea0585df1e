//! A queue of a block device on its worker: requests go to the disk as they come, one system call a batch, and are answered as the
//! disk completes them, in whatever order.
//!
//! ```text
//!  available ring ──> parse ──> submit ──┐ kick, once a batch
//!        ^                │              v
//!        │                └─ status ─> used ring <── status <── completion
//!        └──── no more than the queue has entries are in flight ────┘
//! ```
//!
//! Such rounds follow each other while there is something to do, and for a little longer ([`Spin`]). The driver does not notify meanwhile;
//! only before the worker sleeps it is asked to, and the ring looked at once more.
#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use block_util::{Completion, DiskIo, IoBuf, LimiterTimer};
use log::debug;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{GuestAddressSpace, GuestMemory};
use vm_virtio::{
    Chain, Context, DeviceMemory, DeviceQueue, EventSet, Fault, Outcome, QueueError, QueueHandler,
    Source, Spin, Taken,
};

use super::SERIAL_LEN;
use super::request::{Request, Status};
use super::shared::Shared;

/// Guest memory as it was when a request came: what keeps its buffers mapped.
type Mapping<M> = <M as GuestAddressSpace>::T;

/// A queue's way into the disk.
pub(super) struct Way {
    pub io: Box<dyn DiskIo>,
    /// Says when requests have to wait.
    pub timer: Option<LimiterTimer>,
}

/// Tokens of what a handler waits for.
const COMPLETIONS: u32 = 0;
const TIMER: u32 = 1;

/// Rounds after which the worker looks whether anybody else wants something, such as that it stops.
const ROUNDS: u32 = 64;

/// What came of a round.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Round {
    /// Requests were taken or answered.
    Busy,
    /// Nothing was there.
    Idle,
    /// The disk takes nothing at the moment: the same again, after others had their turn.
    Refused,
}

/// A request in flight.
struct Slot<M: GuestAddressSpace> {
    chain: Chain,
    /// None while the slot is free.
    mapping: Option<Mapping<M>>,
    /// The disk writes to the chain's buffers.
    reads: bool,
}

/// One queue, its way into the disk, and what is in flight.
pub(super) struct Handler<M: GuestAddressSpace> {
    pub queue: DeviceQueue,
    /// None once it has failed.
    pub way: Option<Way>,
    memory: M,
    flight: Flight<M>,
    /// There was no room for a request: the queue is served again when there is.
    starved: bool,
    spin: Spin,
}

/// What a request needs beside memory and disk.
struct Flight<M: GuestAddressSpace> {
    shared: Arc<Shared>,
    /// Writes are stable when they complete, whatever the driver chooses.
    always_durable: bool,
    slots: Vec<Slot<M>>,
    free: Vec<usize>,
    /// The buffers of one request, until they are submitted.
    buffers: Vec<IoBuf>,
}

impl<M: DeviceMemory> Handler<M> {
    pub fn new(
        queue: DeviceQueue,
        way: Way,
        memory: M,
        shared: Arc<Shared>,
        always_durable: bool,
        spin: Spin,
    ) -> Self {
        let count = usize::from(queue.size()).min(way.io.depth());
        let slot = |_| Slot {
            chain: Chain::new(),
            mapping: None,
            reads: false,
        };
        Self {
            queue,
            way: Some(way),
            memory,
            flight: Flight {
                shared,
                always_durable,
                slots: (0..count).map(slot).collect(),
                free: (0..count).rev().collect(),
                buffers: Vec::new(),
            },
            starved: false,
            spin,
        }
    }

    /// Serves the queue until there is nothing to do and the driver is asked to notify, or others are to have their turn.
    fn work(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.listen(false);
        let ended = self.rounds(context);
        self.listen(true);
        ended
    }

    fn rounds(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let mut worked = false;
        for _ in 0..ROUNDS {
            match self.round(context)? {
                Round::Busy => worked = true,
                Round::Refused => break,
                Round::Idle => {
                    // Where nothing was done nothing is likely to follow.
                    if worked && self.spin()? {
                        continue;
                    }
                    let memory = self.memory.memory();
                    if self.starved || !self.queue.enable_notification(&*memory)? {
                        return Ok(());
                    }
                }
            }
        }
        context.again(self.queue.index());
        Ok(())
    }

    /// Takes what is available, starts it, and answers what is done.
    fn round(&mut self, context: &mut Context<'_>) -> Result<Round, QueueError> {
        let Self {
            queue,
            way: Some(way),
            memory,
            flight,
            starved,
            ..
        } = self
        else {
            return Ok(Round::Idle);
        };
        let mapping = memory.memory();
        let taken = if *starved {
            Ok(Taken::Nothing)
        } else {
            queue.take(&*mapping, |chain| flight.begin(chain, &mapping, way))
        };
        *starved |= matches!(taken, Ok(Taken::Later));
        // Those before a fault are done all the same.
        let kicked = match way.io.kick() {
            Ok(()) => Ok(true),
            Err(error) if is_passing(&error) => {
                debug!("the disk takes no requests at the moment: {error}");
                Ok(false)
            }
            Err(error) => {
                debug!("the disk takes no requests: {error}");
                Err(queue.error(Fault::Request("the disk takes no requests")))
            }
        };
        let reaped = self.reap(context);
        let (taken, kicked, reaped) = (taken?, kicked?, reaped?);
        Ok(if !kicked {
            Round::Refused
        } else if reaped || taken == Taken::Some {
            Round::Busy
        } else {
            Round::Idle
        })
    }

    /// Looks for more to do, while that pays: requests, unless there is no room for them, and completions.
    fn spin(&mut self) -> Result<bool, QueueError> {
        let Self {
            queue,
            way: Some(way),
            memory,
            starved,
            spin,
            ..
        } = self
        else {
            return Ok(false);
        };
        // What can only come with a system call is to be slept for.
        let flying = way.io.in_flight() > 0;
        if flying && way.io.peek().is_none() || !flying && *starved {
            return Ok(false);
        }
        let memory = memory.memory();
        spin.until(|| {
            Ok(flying && way.io.peek() == Some(true) || !*starved && queue.has_chains(&*memory)?)
        })
    }

    /// Whether the disk is to tell of completions.
    fn listen(&mut self, on: bool) {
        if let Some(way) = &mut self.way {
            way.io.listen(on);
        }
    }

    /// Answers what is done, if anything is.
    fn reap(&mut self, context: &mut Context<'_>) -> Result<bool, QueueError> {
        let memory = self.memory.memory();
        let mut any = false;
        while let Some(done) = self.way.as_mut().and_then(|way| way.io.next_completion()) {
            any = true;
            self.starved = false;
            if let Some((head, written)) = self.flight.finish(done) {
                self.queue.stage_used(&*memory, head, written)?;
            }
        }
        self.queue.signal(&*memory, context.interrupt())?;
        Ok(any)
    }

    /// Waits for all that is in flight, and answers it.
    fn finish_all(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let mut answered = Ok(());
        while let Some(way) = &mut self.way
            && way.io.in_flight() > 0
        {
            if let Err(error) = way.io.wait() {
                debug!("waiting for the disk: {error}");
                // Dropping it waits for the kernel to let go of guest memory, all the same.
                self.way = None;
            }
            // Even where the ring is lost, memory must not change after this.
            answered = answered.and(self.reap(context).map(drop));
        }
        let memory = self.memory.memory();
        for index in 0..self.flight.slots.len() {
            let lost = self.flight.end(index, Status::IoError);
            if let Some((head, written)) = lost {
                answered = answered.and(self.queue.add_used(&*memory, head, written));
            }
        }
        answered
    }
}

/// Whether the kernel may take what it refused a little later.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ResourceBusy
            | io::ErrorKind::OutOfMemory
    )
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd, token| Source {
            fd,
            events: EventSet::IN,
            token,
        };
        let Some(way) = &self.way else {
            return Vec::new();
        };
        let timer = way.timer.as_ref();
        std::iter::once(source(way.io.completion_fd().as_raw_fd(), COMPLETIONS))
            .chain(timer.map(|timer| source(timer.as_raw_fd(), TIMER)))
            .collect()
    }

    fn on_queue(&mut self, _index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.starved = false;
        self.work(context)
    }

    fn on_source(
        &mut self,
        token: u32,
        _events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        if token == TIMER
            && let Some(timer) = self.way.as_mut().and_then(|way| way.timer.as_mut())
        {
            let cleared = timer.on_timer();
            cleared.map_err(|error| self.queue.error(timer_fault(&error)))?;
            self.starved = false;
        }
        self.work(context)
    }

    fn on_stop(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.finish_all(context)
    }
}

impl<M: DeviceMemory> Flight<M> {
    /// Sends the request in `chain` on its way, or answers it at once.
    fn begin(
        &mut self,
        chain: &mut Chain,
        mapping: &Mapping<M>,
        way: &mut Way,
    ) -> Result<Outcome, Fault> {
        let memory: &M::M = mapping;
        let request = match Request::parse(memory, chain, &self.shared.limits())? {
            Ok(request) => request,
            Err(status) => return answer(memory, chain, status),
        };
        if !self.gather(memory, chain, &request)? {
            return answer(memory, chain, Status::IoError);
        }
        let durable = self.always_durable || !self.shared.writeback();
        let Some(operation) = request.operation(&self.buffers, durable) else {
            write_serial(memory, chain, &self.shared.serial)?;
            return answer(memory, chain, Status::Ok);
        };
        let Some(index) = self.free.pop() else {
            return Ok(Outcome::Later);
        };
        let bytes = request.bytes();
        if let Some(timer) = &mut way.timer
            && !timer.may(bytes).map_err(|error| timer_fault(&error))?
        {
            self.free.push(index);
            return Ok(Outcome::Later);
        }
        let submitted = way.io.submit(block_util::Request {
            operation,
            user_data: index as u64,
        });
        match self.slots.get_mut(index) {
            Some(slot) if submitted.is_ok() => {
                std::mem::swap(&mut slot.chain, chain);
                slot.mapping = Some(mapping.clone());
                slot.reads = matches!(request, Request::Read { .. });
                Ok(Outcome::InFlight)
            }
            _ => {
                self.free.push(index);
                if let Some(timer) = &way.timer {
                    timer.give_back(bytes);
                }
                Ok(Outcome::Later)
            }
        }
    }

    /// Collects the buffers of a transfer. False if there are more than a request can have.
    fn gather(&mut self, memory: &M::M, chain: &Chain, request: &Request) -> Result<bool, Fault> {
        /// As many as one system call takes.
        const MOST: usize = 1024;
        let buffers = &mut self.buffers;
        buffers.clear();
        let mut add = |ptr: *mut u8, len: usize| {
            if buffers.len() <= MOST {
                // SAFETY: the slice is guest memory, which no Rust reference is made to. Whoever submits the buffer keeps the
                // mapping that it was found in, in the request's slot, until its completion is taken or the DiskIo dropped.
                buffers.push(unsafe { IoBuf::new(ptr, len) });
            }
            Ok(())
        };
        match *request {
            Request::Read { len, .. } => chain.writer(memory).slices(len as usize, |slice| {
                add(slice.ptr_guard_mut().as_ptr(), slice.len())
            })?,
            Request::Write { len, .. } => {
                let mut reader = chain.reader(memory);
                reader.skip(chain.readable_len().saturating_sub(len) as usize)?;
                reader.slices(len as usize, |slice| {
                    add(slice.ptr_guard().as_ptr().cast_mut(), slice.len())
                })?;
            }
            _ => {}
        }
        Ok(self.buffers.len() <= MOST)
    }

    /// Ends the request that is done: its head, and the bytes written.
    fn finish(&mut self, done: Completion) -> Option<(u16, u32)> {
        let status = match done.result {
            Ok(()) => Status::Ok,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Err(error) => {
                debug!("a request of disk {:?} failed: {error}", self.shared.id);
                Status::IoError
            }
        };
        self.end(usize::try_from(done.user_data).ok()?, status)
    }

    /// Ends the request in slot `index`, if there is one.
    fn end(&mut self, index: usize, status: Status) -> Option<(u16, u32)> {
        let slot = self.slots.get_mut(index)?;
        let mapping = slot.mapping.take()?;
        let memory: &M::M = mapping.deref();
        self.free.push(index);
        // Where memory keeps no note of what is written, there is nothing to look up.
        if slot.reads && size_of::<BS<'_, <M::M as GuestMemory>::Bitmap>>() > 0 {
            // The disk wrote through pointers, which told nobody; where it failed, any part of it.
            let data = slot.chain.writable_len().saturating_sub(1) as usize;
            let marked = slot.chain.writer(memory).slices(data, |slice| {
                slice.bitmap().mark_dirty(0, slice.len());
                Ok(())
            });
            if let Err(fault) = marked {
                debug!("buffers of a request went away: {fault}");
            }
        }
        // Memory that was there when the chain was popped is in the mapping still.
        let written = write_status(memory, &slot.chain, status).unwrap_or(0);
        Some((slot.chain.head(), written))
    }
}

fn timer_fault(error: &io::Error) -> Fault {
    debug!("the timer of a rate limiter: {error}");
    Fault::Request("the timer of the disk's rate limiter cannot be set")
}

/// Answers `chain` with nothing but a status.
fn answer<M: GuestMemory>(memory: &M, chain: &Chain, status: Status) -> Result<Outcome, Fault> {
    write_status(memory, chain, status).map(Outcome::Used)
}

/// Writes the status, and gives the bytes that the driver may look at: all of them.
fn write_status<M: GuestMemory>(memory: &M, chain: &Chain, status: Status) -> Result<u32, Fault> {
    let len = chain.writable_len();
    let mut writer = chain.writer(memory);
    writer.skip(len.saturating_sub(1) as usize)?;
    writer.write(&[status.byte()])?;
    Ok(len)
}

fn write_serial<M: GuestMemory>(
    memory: &M,
    chain: &Chain,
    serial: &[u8; SERIAL_LEN],
) -> Result<(), Fault> {
    let room = (chain.writable_len().saturating_sub(1) as usize).min(SERIAL_LEN);
    chain.writer(memory).write(&serial[..room])
}
