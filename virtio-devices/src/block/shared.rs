//! What the device, its workers and its control have in common.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_util::{DiskError, DiskFile, DiskIo, Engine, IoOptions};
use vm_virtio::VirtioInterrupt;

use super::config::{Facts, MAX_RANGE};
use super::request::Limits;
use super::{BlockError, SERIAL_LEN};

/// What the device, its workers and its control share.
pub(super) struct Shared {
    pub id: String,
    pub serial: [u8; SERIAL_LEN],
    pub facts: Facts,
    pub disk: Arc<dyn DiskFile>,
    pub engine: Engine,
    /// Bytes, as the driver is told.
    pub capacity: AtomicU64,
    pub writeback: AtomicBool,
    pub driver: Mutex<Driver>,
}

/// Whom to tell of a new capacity.
#[derive(Default)]
pub(super) struct Driver {
    /// While the device works.
    pub interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// It changed meanwhile.
    pub changed: bool,
}

impl Shared {
    pub fn limits(&self) -> Limits {
        let facts = &self.facts;
        Limits {
            capacity: self.capacity.load(Ordering::Acquire),
            read_only: facts.read_only,
            discard: facts.discards().then_some(MAX_RANGE),
            write_zeroes: (!facts.read_only).then_some(MAX_RANGE),
        }
    }

    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_capacity(&self, capacity: u64) {
        if self.capacity.swap(capacity, Ordering::AcqRel) == capacity {
            return;
        }
        let mut driver = self.driver();
        match &driver.interrupt {
            Some(interrupt) => interrupt.config_changed(),
            None => driver.changed = true,
        }
    }

    pub fn open_io(&self) -> Result<Box<dyn DiskIo>, DiskError> {
        self.disk.open_io(&IoOptions {
            depth: usize::from(self.facts.queue_size).min(IoOptions::MAX_DEPTH),
            engine: self.engine,
        })
    }
}

/// Changes a disk while its device is behind a transport.
#[derive(Clone)]
pub struct BlockControl(pub(super) Arc<Shared>);

impl BlockControl {
    /// Makes the disk `size` bytes long, and tells the driver, now or when the device works again.
    ///
    /// # Errors
    /// [`BlockError::Disk`].
    pub fn resize(&self, size: u64) -> Result<(), BlockError> {
        let resized = self.0.disk.resize(size);
        resized.map_err(|source| BlockError::Disk {
            id: self.0.id.clone(),
            source,
        })?;
        self.0.set_capacity(self.0.disk.size());
        Ok(())
    }
}
