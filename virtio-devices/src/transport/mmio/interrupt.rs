//! The one interrupt of a virtio device on MMIO, and what it was for (virtio 1.2 §4.2.2, InterruptStatus and InterruptACK).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use log::debug;
use vm_device::Trigger;
use vm_virtio::VirtioInterrupt;

/// A queue wants the driver.
const QUEUE: u32 = 1;
/// The configuration changed.
const CONFIG: u32 = 2;

/// Takes no lock.
pub(super) struct MmioInterrupt {
    status: AtomicU32,
    line: Arc<dyn Trigger>,
}

impl MmioInterrupt {
    /// Nothing happened yet.
    pub fn new(line: Arc<dyn Trigger>) -> Self {
        Self {
            status: AtomicU32::new(0),
            line,
        }
    }

    /// What happened since the driver acknowledged it.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The driver has seen to `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Becomes what was saved, or 0 at a reset.
    pub fn set(&self, status: u32) {
        self.status
            .store(status & (QUEUE | CONFIG), Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // Each time, even if the bit was set: the driver may have read it before, and then waits for an edge after its look.
        if let Err(error) = self.line.trigger() {
            debug!("interrupt of a virtio device: {error}");
        }
    }
}

impl VirtioInterrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.raise(QUEUE);
    }

    fn config_changed(&self) {
        self.raise(CONFIG);
    }
}
