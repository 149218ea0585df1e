//! Interrupts of a virtio device on PCI (virtio 1.2 §4.1.4.5, §4.1.5.1.2, §4.1.5.3, §4.1.5.4): MSI-X vectors, and the ISR status.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use log::debug;
use pci::MsixTable;
use vm_virtio::VirtioInterrupt;

/// The value of a vector register that stands for none (§4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status: a queue wants the driver.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// Which MSI-X vector each event has. Takes no lock but that of one vector.
pub(super) struct PciInterrupt {
    table: Arc<MsixTable>,
    isr: AtomicU8,
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
}

impl PciInterrupt {
    /// No event has a vector.
    pub fn new(table: Arc<MsixTable>, queues: usize) -> Self {
        Self {
            table,
            isr: AtomicU8::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        self.isr.store(0, Ordering::Relaxed);
        self.config.store(NO_VECTOR, Ordering::Relaxed);
        for queue in &self.queues {
            queue.store(NO_VECTOR, Ordering::Relaxed);
        }
    }

    /// The driver reads the ISR status, which clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// Vector of changes of the configuration.
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Relaxed)
    }

    /// The driver writes it. A vector that there is not becomes none (§4.1.4.3.1).
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::Relaxed);
    }

    /// Vector of queue `index`; none where there is no such queue.
    pub fn queue_vector(&self, index: u16) -> u16 {
        self.queues
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// The driver writes it. A vector that there is not becomes none.
    pub fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            queue.store(self.existing(vector), Ordering::Relaxed);
        }
    }

    /// What to save: ISR status, vector of the configuration, vectors of the queues.
    pub fn save(&self) -> (u8, u16, Vec<u16>) {
        (
            self.isr.load(Ordering::Acquire),
            self.config_vector(),
            self.queues
                .iter()
                .map(|vector| vector.load(Ordering::Relaxed))
                .collect(),
        )
    }

    /// Becomes what was saved. False, and nothing changed, if it was of another number of queues.
    pub fn restore(&self, isr: u8, config: u16, queues: &[u16]) -> bool {
        if queues.len() != self.queues.len() {
            return false;
        }
        self.isr
            .store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
        self.set_config_vector(config);
        for (index, vector) in (0..).zip(queues) {
            self.set_queue_vector(index, *vector);
        }
        true
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.table.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn set_isr(&self, bit: u8) {
        // With MSI-X nobody reads it, so that it stays as it is and the queues do not fight for it.
        if self.isr.load(Ordering::Acquire) & bit == 0 {
            self.isr.fetch_or(bit, Ordering::AcqRel);
        }
    }

    fn trigger(&self, vector: u16) {
        if vector == NO_VECTOR {
            return;
        }
        if let Err(error) = self.table.trigger(vector) {
            debug!("MSI-X vector {vector}: {error}");
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        self.set_isr(ISR_QUEUE);
        self.trigger(self.queue_vector(index));
    }

    fn config_changed(&self) {
        self.set_isr(ISR_CONFIG);
        self.trigger(self.config_vector());
    }
}
