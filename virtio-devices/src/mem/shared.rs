//! What the device, its thread and those who change it share: its blocks, and how many there should be.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use vm_memory::GuestAddress;
use vm_virtio::VirtioInterrupt;

use super::blocks::{Blocks, Fill};
use super::request::{Answer, Request};
use super::{BLOCK, CONFIG_LEN, MemConfig, MemError, MemV1};
use crate::discard::DiscardRam;

/// Shared by device, worker and handles.
pub(super) struct Shared {
    start: u64,
    size: u64,
    ram: Arc<dyn DiscardRam>,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Bytes that should be plugged.
    requested: u64,
    /// The request of which the driver knows.
    told: u64,
    plugged: Blocks,
    /// While the device works.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

impl Inner {
    /// Tells the driver what it does not know yet. If it cannot be told now, it is when the device works again.
    fn tell(&mut self) {
        if let Some(interrupt) = &self.interrupt
            && self.told != self.requested
        {
            self.told = self.requested;
            interrupt.config_changed();
        }
    }

    fn plugged(&self) -> u64 {
        self.plugged.count() * BLOCK
    }
}

impl Shared {
    pub fn new(config: &MemConfig, ram: Arc<dyn DiscardRam>) -> Result<Self, MemError> {
        let MemConfig { start, size, .. } = *config;
        let aligned = start.is_multiple_of(BLOCK) && size.is_multiple_of(BLOCK) && size > 0;
        if !aligned || start.checked_add(size).is_none() {
            return Err(MemError::Region { start, size });
        }
        let shared = Self {
            start,
            size,
            ram,
            inner: Mutex::new(Inner {
                requested: 0,
                told: 0,
                plugged: Blocks::default(),
                interrupt: None,
            }),
        };
        shared.resize(config.requested)?;
        shared.reset();
        Ok(shared)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space (§5.15.4).
    pub fn config(&self) -> [u8; CONFIG_LEN] {
        let inner = self.lock();
        let fields = [
            BLOCK,
            // No node: that feature is not offered.
            0,
            self.start,
            self.size,
            // The usable part: all of it.
            self.size,
            inner.plugged(),
            inner.requested,
        ];
        let mut config = [0; CONFIG_LEN];
        for (to, field) in config.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        config
    }

    pub fn resize(&self, requested: u64) -> Result<(), MemError> {
        if requested > self.size || !requested.is_multiple_of(BLOCK) {
            return Err(MemError::Size {
                wanted: requested,
                most: self.size,
            });
        }
        let mut inner = self.lock();
        inner.requested = requested;
        inner.tell();
        Ok(())
    }

    /// Bytes that should be plugged, and that are.
    pub fn sizes(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.requested, inner.plugged())
    }

    /// Does what the driver asks. Called from the device's thread alone.
    pub fn answer(&self, request: Request) -> Answer {
        let (kind, address, count) = match request {
            Request::UnplugAll => return self.unplug_all(),
            Request::Unknown => return Answer::Error,
            Request::Plug(address, count) => (Kind::Plug, address, count),
            Request::Unplug(address, count) => (Kind::Unplug, address, count),
            Request::State(address, count) => (Kind::State, address, count),
        };
        let Some((first, count)) = self.blocks(address, count) else {
            return Answer::Error;
        };
        let mut inner = self.lock();
        match (kind, inner.plugged.fill(first, count)) {
            (Kind::State, fill) => Answer::State(fill),
            (Kind::Plug, Fill::None) => {
                if inner.plugged() + count * BLOCK > inner.requested {
                    return Answer::Nack;
                }
                inner.plugged.insert(first, count);
                Answer::Ack
            }
            (Kind::Unplug, Fill::All) => {
                inner.plugged.remove(first, count);
                // Takes a while, and nobody waits for this thread: only it plugs.
                drop(inner);
                self.discard(first, count);
                Answer::Ack
            }
            _ => Answer::Error,
        }
    }

    fn unplug_all(&self) -> Answer {
        self.lock().plugged = Blocks::default();
        // Blocks that are not plugged too: the guest may have written to them.
        self.discard(0, self.size / BLOCK);
        Answer::Ack
    }

    /// First block and count, if all are whole blocks of the region.
    fn blocks(&self, address: u64, count: u16) -> Option<(u64, u64)> {
        let offset = address.checked_sub(self.start)?;
        let (first, count) = (offset / BLOCK, u64::from(count));
        let within = first.checked_add(count)? <= self.size / BLOCK;
        (offset.is_multiple_of(BLOCK) && count > 0 && within).then_some((first, count))
    }

    /// Gives blocks of the region back to the host.
    fn discard(&self, first: u64, count: u64) {
        let start = GuestAddress(self.start + first * BLOCK);
        if let Err(error) = self.ram.discard(start, count * BLOCK) {
            debug!("unplugging memory: {error}");
        }
    }

    /// From now on `interrupt` leads to the driver.
    pub fn attach(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        let mut inner = self.lock();
        inner.interrupt = Some(interrupt);
        inner.tell();
    }

    /// From now on there is no way to the driver.
    pub fn detach(&self) {
        self.lock().interrupt = None;
    }

    /// Another driver, which will read all. What is plugged stays so (§5.15.6).
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.told = inner.requested;
    }

    pub fn save(&self) -> MemV1 {
        let inner = self.lock();
        MemV1 {
            size: self.size,
            requested: inner.requested,
            told: inner.told,
            plugged: inner.plugged.runs().collect(),
        }
    }

    /// False where the state is not of such a device.
    pub fn restore(&self, state: &MemV1) -> bool {
        let all = self.size / BLOCK;
        let mut plugged = Blocks::default();
        for &(first, count) in &state.plugged {
            let end = first.checked_add(count);
            if count == 0
                || end.is_none_or(|end| end > all)
                || plugged.fill(first, count) != Fill::None
            {
                return false;
            }
            plugged.insert(first, count);
        }
        if state.size != self.size || state.requested > self.size {
            return false;
        }
        let mut inner = self.lock();
        inner.requested = state.requested;
        inner.told = state.told;
        inner.plugged = plugged;
        true
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Plug,
    Unplug,
    State,
}

/// Changes a memory device and looks at it while it is behind a transport, from any thread.
#[derive(Clone)]
pub struct MemControl(Arc<Shared>);

impl MemControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The guest should have `requested` bytes of the device's memory, a multiple of [`MEM_BLOCK`](crate::MEM_BLOCK). The driver
    /// hears of it now, or when the device works again; it takes its time, and does what it can.
    ///
    /// # Errors
    /// [`MemError::Size`]. Nothing changes then.
    pub fn resize(&self, requested: u64) -> Result<(), MemError> {
        self.0.resize(requested)
    }

    /// Bytes that the guest should have.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.0.sizes().0
    }

    /// Bytes that it has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.0.sizes().1
    }
}
