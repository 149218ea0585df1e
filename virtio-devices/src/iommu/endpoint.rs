//! One device behind the IOMMU: what it sees of memory now, and what it did wrong (virtio 1.2 §5.13.6.9).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use log::debug;
use vm_memory::Permissions;
use vmm_sys_util::eventfd::EventFd;

use super::mappings::Mappings;

/// Most faults that wait for the driver; more are lost.
const WAITING: usize = 64;

/// What a device sees.
#[derive(Clone, Debug)]
pub(super) enum Table {
    /// Guest-physical memory.
    Physical,
    /// Nothing: it belongs to no domain.
    Nothing,
    /// What is mapped.
    Mapped(Mappings),
}

/// A device that the IOMMU translates for, by its number.
#[derive(Debug)]
pub struct Endpoint {
    id: u32,
    table: ArcSwap<Table>,
    faults: Arc<Faults>,
}

impl Endpoint {
    pub(super) fn new(id: u32, table: Table, faults: Arc<Faults>) -> Self {
        Self {
            id,
            table: ArcSwap::from_pointee(table),
            faults,
        }
    }

    /// Its number, as the driver knows it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What the device sees now. It may keep this: a later change makes another one.
    pub(super) fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    pub(super) fn set(&self, table: Table) {
        self.table.store(Arc::new(table));
    }

    /// The device wanted to do `access` at `address`, and cannot.
    pub(super) fn fault(&self, reason: Reason, address: u64, access: Permissions) {
        self.faults.push(Fault {
            endpoint: self.id,
            reason,
            address,
            access,
        });
    }
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Reason {
    /// The endpoint belongs to no domain.
    Domain = 1,
    /// The domain has no such mapping, or does not let it.
    Mapping = 2,
}

/// One fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    pub endpoint: u32,
    pub reason: Reason,
    pub address: u64,
    pub access: Permissions,
}

/// Faults on their way to the driver.
#[derive(Debug)]
pub(super) struct Faults {
    waiting: Mutex<VecDeque<Fault>>,
    wake: EventFd,
}

impl Faults {
    /// `wake` gets an event for each fault.
    pub fn new(wake: EventFd) -> Self {
        Self {
            waiting: Mutex::default(),
            wake,
        }
    }

    fn push(&self, fault: Fault) {
        debug!("virtual IOMMU: {fault:x?}");
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < WAITING {
            waiting.push_back(fault);
            drop(waiting);
            // Refused only when it is readable anyway.
            let _ = self.wake.write(1);
        }
    }

    /// The oldest.
    pub fn take(&self) -> Option<Fault> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    }

    /// Forgets all.
    pub fn clear(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.clear();
    }

    /// Readable after a fault.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}
