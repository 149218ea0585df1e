//! The trait that every virtio device implements, and what it is given to work with (virtio 1.2 §2, §3).

use std::error::Error;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestAddressSpace;
use vm_migration::{MigrationError, Section};

use crate::{DeviceQueue, WorkerError};

/// How a device reaches its driver. Called from any thread; never waits, and takes no lock that is held while a device
/// is activated or deactivated.
pub trait VirtioInterrupt: Send + Sync {
    /// Chains of queue `index` were used.
    fn queue(&self, index: u16);
    /// The device's configuration changed.
    fn config_changed(&self);
    /// The device cannot go on until the driver resets it (§2.1.2). The transport sends a configuration notification.
    fn needs_reset(&self) {
        self.config_changed();
    }
}

/// Guest memory as devices hold it: physical, or as an IOMMU lets the device see it. What
/// [`memory`](GuestAddressSpace::memory) gives can be kept for as long as a request is in flight, and with it the mapping.
pub trait DeviceMemory: GuestAddressSpace<T: Send> + Send + Sync + 'static {}

impl<T: GuestAddressSpace<T: Send> + Send + Sync + 'static> DeviceMemory for T {}

/// What a thread is to do.
pub type Job = Box<dyn FnOnce() + Send>;

/// Starts a thread of the given name: the one place where the VMM names its threads, filters their system calls and hears of
/// their panics.
pub type Spawn = Arc<dyn Fn(String, Job) -> io::Result<()> + Send + Sync>;

/// What a device works with from the driver's DRIVER_OK on, or from where it was stopped.
pub struct Activation<M> {
    /// Guest memory.
    pub memory: M,
    /// All of the device's queues, in their order. Those that the driver did not enable have no chains.
    pub queues: Vec<DeviceQueue>,
    /// The features that were negotiated.
    pub features: u64,
    /// To the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
    /// Starts the device's threads.
    pub spawn: Spawn,
}

/// What can go wrong with a device, the guest aside.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// Its workers do not start or do not stop.
    #[error("running its workers")]
    Worker(#[from] WorkerError),
    /// What it says itself.
    #[error("{0}")]
    Device(&'static str, #[source] Box<dyn Error + Send + Sync>),
}

/// A virtio device, whatever transport it is behind. [`DeviceCore`](crate::DeviceCore) calls it, in this order:
/// [`features`](Self::features), [`activate`](Self::activate), [`deactivate`](Self::deactivate), and perhaps activate again with the same queues;
/// [`reset`](Self::reset) only while it is not active.
pub trait VirtioDevice<M>: Send {
    /// Number of the device's type (§5), for example 2 for a block device.
    fn device_type(&self) -> u32;

    /// The features that it offers. [`RING_FEATURES`](crate::feature::RING_FEATURES) are among them where its queues are
    /// [`DeviceQueue`]s.
    fn features(&self) -> u64;

    /// The most entries of each of its queues: powers of two up to 32768.
    fn queue_max_sizes(&self) -> &[u16];

    /// Bytes of its configuration space.
    fn config_len(&self) -> usize {
        0
    }

    /// The driver reads its configuration space at `offset`. All of it lies within [`config_len`](Self::config_len).
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let _ = offset;
        data.fill(0);
    }

    /// The driver writes its configuration space at `offset`. All of it lies within [`config_len`](Self::config_len). May come at
    /// any time.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Starts working.
    ///
    /// # Errors
    /// What the user or the host is to blame for. What the driver did wrong goes to the interrupt instead.
    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError>;

    /// Stops working and gives all queues back, in their order; every chain that was popped is in the used ring, or back in the
    /// available one. Pause, reset, snapshot, unplug and shutdown are all this. Gives no queue if it is not active.
    ///
    /// # Errors
    /// A worker ended by itself: its queues are lost.
    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError>;

    /// Forgets what the driver told it.
    fn reset(&mut self) {}

    /// The state that is its own, for the one with `id`. Not active meanwhile.
    fn save(&self, id: &str) -> Result<Section, MigrationError>;

    /// Takes over what [`save`](Self::save) of an equal device gave. Not active meanwhile.
    fn restore(&mut self, section: &Section) -> Result<(), MigrationError>;
}

/// The part of `config` at `offset`, for devices that hold their configuration space as bytes. What is past its end reads as zeros.
pub fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
        *to = *from;
    }
}
