//! The device's side of a split virtqueue (virtio 1.2 §2.7): chains popped and checked, used ring, notifications both ways.

mod area;
mod away;
mod chain;
mod cursor;
mod fault;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};
use vmm_sys_util::eventfd::EventFd;

pub use chain::{Buffer, Chain, MAX_INDIRECT};
pub use cursor::{Reader, Slice, Writer};
pub use fault::{Fault, QueueError};

use crate::VirtioInterrupt;
use area::Area;
use chain::Table;

/// Where the driver put a queue, how far the device is with it, and whether it is served: as it is saved.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct QueueV1 {
    /// Entries: a power of two, up to the device's maximum.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Chains popped so far, modulo 2^16.
    pub next_available: u16,
    /// Chains given back so far, modulo 2^16.
    pub next_used: u16,
    /// A fault was found in it.
    pub broken: bool,
}

/// What became of a chain that [`DeviceQueue::serve`] popped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The request is done, and so many bytes were written from the start of the writable buffers.
    Used(u32),
    /// The request is in flight; the device will call [`DeviceQueue::add_used`]. It may have taken the chain.
    InFlight,
    /// The device cannot take it now. It stays in the ring; the device serves the queue again once it can.
    Later,
}

/// What [`DeviceQueue::take`] found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Taken {
    /// No chains.
    Nothing,
    /// Chains, which were handled. There may be more by now.
    Some,
    /// After none or some, a chain that the device cannot take now.
    Later,
}

/// Whether a queue has more to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Next {
    /// Nothing until the driver notifies, or the device has room again.
    Wait,
    /// There is more, but it is the turn of others: serve the queue again without waiting.
    Again,
}

/// The rings that the driver writes.
struct Rings<'a, M: GuestMemory> {
    available: Area<'a, M>,
    descriptors: Table<'a, M>,
}

/// One queue as the device uses it. A queue that the driver did not enable, or that had a fault, has no chains.
///
/// Every error means that the driver broke the rules. The one who gets it hands it on to the worker, which stops
/// serving the queue.
#[derive(Debug)]
pub struct DeviceQueue {
    index: u16,
    ring: Queue,
    /// INDIRECT_DESC was negotiated.
    indirect: bool,
    broken: bool,
    /// The driver's index into the available ring as last seen: up to there, chains may be popped without looking.
    seen: u16,
    /// Chains were given back that the driver was not notified of.
    unsignalled: bool,
    /// The used index of the last look whether the driver wants to be notified.
    signalled: u16,
    /// Chains whose place in the used ring is filled, past those that the driver was shown.
    staged: u16,
    /// The driver was told that it need not notify.
    quiet: bool,
    /// Turning notifications on, chains were seen that nobody has popped.
    promised: bool,
    kick: Arc<EventFd>,
    /// For `serve`.
    chain: Chain,
}

impl DeviceQueue {
    /// Queue `index` as the driver made it, or as it was saved. `max_size` is the device's limit; `kick` gets an event
    /// for each notification of the driver's; `features` are those negotiated.
    ///
    /// # Errors
    /// Rings that are not aligned or not in `memory`, a size that is none, more chains in flight than entries. A queue
    /// that is not ready is not looked at.
    pub fn new<M: GuestMemory>(
        index: u16,
        max_size: u16,
        state: &QueueV1,
        features: u64,
        memory: &M,
        kick: Arc<EventFd>,
    ) -> Result<Self, QueueError> {
        let mut queue = Self {
            index,
            ring: Queue::default(),
            indirect: features & crate::feature::INDIRECT_DESC != 0,
            broken: state.broken,
            seen: state.next_available,
            unsignalled: false,
            signalled: state.next_used,
            staged: 0,
            quiet: false,
            promised: false,
            kick,
            chain: Chain::new(),
        };
        if state.ready {
            queue
                .set_up(max_size, state, features, memory)
                .map_err(|fault| queue.error(fault))?;
        }
        Ok(queue)
    }

    fn set_up<M: GuestMemory>(
        &mut self,
        max_size: u16,
        state: &QueueV1,
        features: u64,
        memory: &M,
    ) -> Result<(), Fault> {
        let size = state.size;
        let entries = usize::from(size);
        let event_idx = features & crate::feature::EVENT_IDX != 0;
        // §2.7: alignment and bytes of each ring; the event fields are there only if negotiated.
        let event = if event_idx { 2 } else { 0 };
        let rings = [
            (
                "descriptor table",
                state.descriptors,
                16,
                16 * entries,
                Permissions::Read,
            ),
            (
                "available ring",
                state.available,
                2,
                4 + 2 * entries + event,
                Permissions::Read,
            ),
            (
                "used ring",
                state.used,
                4,
                4 + 8 * entries + event,
                Permissions::Write,
            ),
        ];
        for (ring, address, align, bytes, access) in rings {
            let fits = GuestAddress(address)
                .checked_add(bytes as u64)
                .is_some_and(|_| memory.check_range(GuestAddress(address), bytes, access));
            if !fits || !address.is_multiple_of(align) {
                return Err(Fault::Ring {
                    ring,
                    address,
                    size,
                });
            }
        }
        let wrong_size = |_| Fault::Request("the size of the queue is no power of two in range");
        let mut ring = Queue::new(max_size).map_err(wrong_size)?;
        ring.try_set_size(size).map_err(wrong_size)?;
        // Aligned as checked above.
        let place = |_| Fault::Request("the rings of the queue are not aligned");
        ring.try_set_desc_table_address(GuestAddress(state.descriptors))
            .map_err(place)?;
        ring.try_set_avail_ring_address(GuestAddress(state.available))
            .map_err(place)?;
        ring.try_set_used_ring_address(GuestAddress(state.used))
            .map_err(place)?;
        ring.set_next_avail(state.next_available);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        self.ring = ring;
        if self.in_flight() > size {
            return Err(Fault::Offered {
                count: self.in_flight(),
                size,
            });
        }
        Ok(())
    }

    /// Its state, to be saved or to be told to a back end in another process. Of a queue that is not ready, only that.
    #[must_use]
    pub fn state(&self) -> QueueV1 {
        let ready = self.ring.ready();
        QueueV1 {
            size: self.ring.size(),
            ready,
            descriptors: if ready { self.ring.desc_table() } else { 0 },
            available: if ready { self.ring.avail_ring() } else { 0 },
            used: if ready { self.ring.used_ring() } else { 0 },
            next_available: self.ring.next_avail(),
            next_used: self.ring.next_used(),
            broken: self.broken,
        }
    }

    /// Which of the device's queues it is.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The driver has enabled it and no fault was found in it.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.ring.ready() && !self.broken
    }

    /// No more chains come out of it until the driver resets the device.
    pub fn set_broken(&mut self) {
        self.broken = true;
    }

    /// Gets an event when the driver notifies the device of new chains.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Chains popped that were not given back yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.ring.next_avail().wrapping_sub(self.ring.next_used())
    }

    /// `fault` in this queue.
    #[must_use]
    pub fn error(&self, fault: Fault) -> QueueError {
        QueueError {
            queue: self.index,
            fault,
        }
    }

    /// Pops the next available chain into `chain`. False if there is none.
    ///
    /// # Errors
    /// A chain that breaks the rules; see [`Fault`].
    pub fn pop<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        if !self.is_served() {
            return Ok(false);
        }
        self.try_pop(memory, &self.rings(memory), chain)
            .map_err(|fault| self.error(fault))
    }

    /// Flags and index of the available ring.
    fn available_head<'a, M: GuestMemory>(&self, memory: &'a M) -> Area<'a, M> {
        let start = GuestAddress(self.ring.avail_ring());
        Area::new(memory, start, 4, Permissions::Read)
    }

    fn rings<'a, M: GuestMemory>(&self, memory: &'a M) -> Rings<'a, M> {
        let size = self.ring.size();
        let entries = usize::from(size);
        let area = |start, len| Area::new(memory, GuestAddress(start), len, Permissions::Read);
        Rings {
            available: area(self.ring.avail_ring(), 4 + 2 * entries),
            descriptors: Table {
                area: area(self.ring.desc_table(), 16 * entries),
                size,
                indirect: self.indirect,
            },
        }
    }

    fn try_pop<'a, M: GuestMemory>(
        &mut self,
        memory: &'a M,
        rings: &Rings<'a, M>,
        chain: &mut Chain,
    ) -> Result<bool, Fault> {
        if !self.look(&rings.available)? {
            return Ok(false);
        }
        let (next, size) = (self.ring.next_avail(), self.ring.size());
        if self.in_flight() >= size {
            return Err(Fault::Offered {
                count: self.in_flight().saturating_add(1),
                size,
            });
        }
        let slot = 4 + 2 * usize::from(next & (size - 1));
        let head = rings.available.load(slot, Ordering::Relaxed);
        let head = head.map(u16::from_le).map_err(in_available)?;
        chain.fill(memory, &rings.descriptors, head)?;
        self.promised = false;
        self.ring.set_next_avail(next.wrapping_add(1));
        Ok(true)
    }

    /// Whether there are chains to pop.
    fn look<M: GuestMemory>(&mut self, available: &Area<'_, M>) -> Result<bool, Fault> {
        let next = self.ring.next_avail();
        if self.seen == next {
            let index = available_index(available)?;
            let count = index.wrapping_sub(next);
            if count > self.ring.size() {
                return Err(Fault::Offered {
                    count,
                    size: self.ring.size(),
                });
            }
            self.seen = index;
        }
        Ok(self.seen != next)
    }

    /// Puts the chain that was popped last back into the available ring, untouched.
    pub fn undo_pop(&mut self) {
        self.ring
            .set_next_avail(self.ring.next_avail().wrapping_sub(1));
    }

    /// Gives the chain `head` back to the driver: the device wrote `written` bytes from the start of its writable buffers.
    ///
    /// # Errors
    /// The used ring is no longer in memory.
    pub fn add_used<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.stage_used(memory, head, written)?;
        self.publish(memory)
    }

    /// As [`add_used`](Self::add_used), but the driver sees it only after [`publish`](Self::publish) or [`signal`](Self::signal), with all
    /// others: its cache line is taken from it once for all.
    ///
    /// # Errors
    /// The used ring is no longer in memory, or more chains come back than were popped.
    pub fn stage_used<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let size = self.ring.size();
        if head >= size {
            return Err(self.error(Fault::Index {
                index: head,
                size: u32::from(size),
            }));
        }
        if self.staged >= size {
            return Err(self.error(Fault::Request("more chains are given back than there are")));
        }
        let slot = self.ring.next_used().wrapping_add(self.staged);
        // Within the ring, which was in memory when the queue was set up.
        let place =
            GuestAddress(self.ring.used_ring()).unchecked_add(4 + 8 * u64::from(slot & (size - 1)));
        let element = u64::from(head) | u64::from(written) << 32;
        memory
            .write_obj(element.to_le(), place)
            .map_err(|source| self.error(in_used(source)))?;
        self.staged += 1;
        Ok(())
    }

    /// Shows the driver all chains that were [staged](Self::stage_used).
    ///
    /// # Errors
    /// The used ring is no longer in memory.
    pub fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        if self.staged == 0 {
            return Ok(());
        }
        let used = self
            .ring
            .next_used()
            .wrapping_add(std::mem::take(&mut self.staged));
        // Release: the elements, and the data, are seen before the index is.
        memory
            .store(
                used.to_le(),
                GuestAddress(self.ring.used_ring()).unchecked_add(2),
                Ordering::Release,
            )
            .map_err(|source| self.error(in_used(source)))?;
        self.ring.set_next_used(used);
        self.unsignalled = true;
        Ok(())
    }

    /// Gives several chains back at once, each with the bytes written to it: the driver sees none of them before it sees all (§5.1.6.4).
    ///
    /// # Errors
    /// As [`add_used`](Self::add_used). None is given back then.
    pub fn add_used_together<M: GuestMemory>(
        &mut self,
        memory: &M,
        used: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        self.publish(memory)?;
        for &(head, written) in used {
            if let Err(error) = self.stage_used(memory, head, written) {
                self.staged = 0;
                return Err(error);
            }
        }
        self.publish(memory)
    }

    /// Sends the driver an interrupt if chains were given back since the last call and it wants to know. Those staged are published first.
    ///
    /// # Errors
    /// The rings are no longer in memory.
    pub fn signal<M: GuestMemory>(
        &mut self,
        memory: &M,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<(), QueueError> {
        self.publish(memory)?;
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(());
        }
        // §2.7.7.2: flag and event are read after the used index is written.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.ring.avail_ring());
        let load = |offset| -> Result<u16, QueueError> {
            memory
                .load(available.unchecked_add(offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|source| self.error(in_available(source)))
        };
        let used = self.ring.next_used();
        let wanted = if self.ring.event_idx_enabled() {
            // §2.7.10: the driver's event is among the indexes that were used since the last look.
            let event = load(4 + 2 * u64::from(self.ring.size()))?;
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(self.signalled)
        } else {
            u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.signalled = used;
        if wanted {
            interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver to notify of new chains. True if there are some already, of which it may not have notified.
    ///
    /// # Errors
    /// The rings are no longer in memory.
    pub fn enable_notification<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if !self.is_served() {
            return Ok(false);
        }
        self.quiet = false;
        self.promised = self
            .ring
            .enable_notification(memory)
            .map_err(|e| self.ring_error(e))?;
        Ok(self.promised)
    }

    /// Tells the driver that it need not notify of new chains.
    ///
    /// # Errors
    /// The rings are no longer in memory.
    pub fn disable_notification<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        if !self.is_served() || self.quiet {
            return Ok(());
        }
        self.ring
            .disable_notification(memory)
            .map_err(|e| self.ring_error(e))?;
        self.quiet = true;
        Ok(())
    }

    /// Whether there are chains to pop: a look into memory that changes nothing.
    ///
    /// # Errors
    /// The driver offers more than the queue has entries, or the ring is no longer in memory.
    pub fn has_chains<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if !self.is_served() {
            return Ok(false);
        }
        let available = self.available_head(memory);
        self.look(&available).map_err(|fault| self.error(fault))
    }

    /// Serves what the driver made available: pops chains and has `request` handle them, gives those back that are done,
    /// and sends one interrupt for all if the driver wants it. Notifications are off meanwhile, and no chain is lost
    /// between the last look and turning them on. After as many chains as the queue has entries it is the turn of
    /// others: [`Next::Again`].
    ///
    /// # Errors
    /// A chain that breaks the rules, or what `request` finds wrong. Requests before it are complete.
    pub fn serve<M: GuestMemory>(
        &mut self,
        memory: &M,
        interrupt: &dyn VirtioInterrupt,
        mut request: impl FnMut(&mut Chain) -> Result<Outcome, Fault>,
    ) -> Result<Next, QueueError> {
        let mut chain = std::mem::take(&mut self.chain);
        let served = self.serve_with(memory, &mut chain, &mut request);
        self.chain = chain;
        self.signal(memory, interrupt)?;
        served
    }

    fn serve_with<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &mut Chain,
        request: &mut impl FnMut(&mut Chain) -> Result<Outcome, Fault>,
    ) -> Result<Next, QueueError> {
        let mut turns = self.size();
        loop {
            match self.take_with(memory, chain, &mut turns, request)? {
                Taken::Later => return Ok(Next::Wait),
                Taken::Some if turns == 0 => return Ok(Next::Again),
                _ => {}
            }
            if !self.enable_notification(memory)? {
                return Ok(Next::Wait);
            }
        }
    }

    /// Half of [`serve`](Self::serve), for a device that looks again before it waits: pops chains and has `request` handle them, at most as
    /// many as the queue has entries. Those that are done are staged, and notifications stay off. Before it waits,
    /// [`signal`](Self::signal) and [`enable_notification`](Self::enable_notification) follow; if the latter says so, `take` again.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn take<M: GuestMemory>(
        &mut self,
        memory: &M,
        mut request: impl FnMut(&mut Chain) -> Result<Outcome, Fault>,
    ) -> Result<Taken, QueueError> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut turns = self.size();
        let taken = self.take_with(memory, &mut chain, &mut turns, &mut request);
        self.chain = chain;
        taken
    }

    fn take_with<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &mut Chain,
        turns: &mut u16,
        request: &mut impl FnMut(&mut Chain) -> Result<Outcome, Fault>,
    ) -> Result<Taken, QueueError> {
        if !self.is_served() {
            return Ok(Taken::Nothing);
        }
        self.disable_notification(memory)?;
        let promised = std::mem::take(&mut self.promised);
        let mut taken = Taken::Nothing;
        let rings = self.rings(memory);
        while *turns > 0
            && self
                .try_pop(memory, &rings, chain)
                .map_err(|fault| self.error(fault))?
        {
            taken = Taken::Some;
            let head = chain.head();
            match request(chain).map_err(|fault| self.error(fault))? {
                Outcome::Used(written) => self.stage_used(memory, head, written)?,
                Outcome::InFlight => {}
                Outcome::Later => {
                    self.undo_pop();
                    return Ok(Taken::Later);
                }
            }
            *turns -= 1;
        }
        if promised && taken == Taken::Nothing {
            // An index that the driver takes back, or rings on top of each other, where turning notifications on and off
            // changes it: without an end, if it went on.
            return Err(self.error(Fault::Request("the available index goes back")));
        }
        Ok(taken)
    }

    fn ring_error(&self, error: virtio_queue::Error) -> QueueError {
        let fault = match error {
            virtio_queue::Error::GuestMemory(source) => Fault::Memory {
                what: "rings",
                source,
            },
            _ => Fault::Request("the rings of the queue cannot be used"),
        };
        self.error(fault)
    }
}

/// How many chains the driver has made available so far.
fn available_index<M: GuestMemory>(available: &Area<'_, M>) -> Result<u16, Fault> {
    // Acquire: what the driver wrote before it moved the index is seen after.
    let index = available.load(2, Ordering::Acquire);
    index.map(u16::from_le).map_err(in_available)
}

fn in_available(source: GuestMemoryError) -> Fault {
    Fault::Memory {
        what: "available ring",
        source,
    }
}

fn in_used(source: GuestMemoryError) -> Fault {
    Fault::Memory {
        what: "used ring",
        source,
    }
}
