//! The device on the bus: its page, and the life of what is behind it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use vm_device::{BusDevice, Trigger};
use vm_virtio::{CoreError, DeviceCore, DeviceMemory, Spawn, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::MmioError;
use super::interrupt::MmioInterrupt;
use super::notify::Notifications;
use super::registers::{self, CONFIG, INTERRUPT_ACK, INTERRUPT_STATUS, QUEUE_NOTIFY};

/// Bytes of a device's registers and its configuration space together.
pub const SIZE: u64 = 0x1000;
/// Bytes that a configuration space can have.
pub const MAX_CONFIG: usize = (SIZE - CONFIG) as usize;

/// What a device needs of the machine around it.
#[derive(Clone)]
pub struct Host {
    /// Its interrupt, an edge for each event.
    pub line: Arc<dyn Trigger>,
    /// Brings its driver's notifications.
    pub notifications: Arc<dyn Notifications>,
    /// Starts its threads.
    pub spawn: Spawn,
    /// Features offered besides the device's: [`ACCESS_PLATFORM`](vm_virtio::feature::ACCESS_PLATFORM) where memory
    /// translates.
    pub extra_features: u64,
}

/// A virtio device on MMIO. Dropping it stops the device.
///
/// Notifications and the interrupt status take no lock.
pub struct VirtioMmioDevice<M> {
    pub(super) id: String,
    core: Mutex<DeviceCore<M>>,
    pub(super) interrupt: Arc<MmioInterrupt>,
    kicks: Box<[EventFd]>,
    notifications: Arc<dyn Notifications>,
    /// Queues whose notifications are connected.
    connected: Vec<u16>,
}

impl<M: DeviceMemory> VirtioMmioDevice<M> {
    /// `device` after a reset, on no bus yet. `id` is its name in errors and saved state.
    ///
    /// # Errors
    /// [`MmioError::Device`] if it does not fit, and what the kernel refuses.
    pub fn new(
        id: &str,
        device: Box<dyn VirtioDevice<M>>,
        memory: M,
        host: Host,
    ) -> Result<Self, MmioError> {
        let Host {
            line,
            notifications,
            spawn,
            extra_features,
        } = host;
        let config_len = device.config_len();
        if config_len > MAX_CONFIG {
            let id = id.to_owned();
            return Err(MmioError::Device { id, config_len });
        }
        let interrupt = Arc::new(MmioInterrupt::new(line));
        let core = DeviceCore::new(device, extra_features, memory, interrupt.clone(), spawn)
            .map_err(|source| MmioError::Core {
                id: id.to_owned(),
                source,
            })?;
        let kicks = core.kicks().map_err(|source| MmioError::Notification {
            id: id.to_owned(),
            source,
        })?;
        let mut connected = Vec::new();
        for (queue, kick) in (0..).zip(&kicks) {
            match notifications.connect(queue, kick) {
                Ok(()) => connected.push(queue),
                // Its notifications come by hand then.
                Err(error) => debug!("virtio device {id:?}, queue {queue}: {error}"),
            }
        }
        Ok(Self {
            id: id.to_owned(),
            core: Mutex::new(core),
            interrupt,
            kicks,
            notifications,
            connected,
        })
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The device works: its driver has it running, and it is not paused.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.core().is_active()
    }

    /// Stops the device's workers, if it works: for a pause, a snapshot, a shutdown.
    ///
    /// # Errors
    /// A worker is gone; the device wants a reset.
    pub fn pause(&self) -> Result<(), MmioError> {
        let paused = self.core().pause();
        paused.map_err(|source| self.core_error(source))
    }

    /// Lets it work again after [`pause`](Self::pause) or [`restore`](Self::restore), if its driver had it working.
    ///
    /// # Errors
    /// It cannot start; the device wants a reset.
    pub fn resume(&self) -> Result<(), MmioError> {
        let resumed = self.core().resume();
        resumed.map_err(|source| self.core_error(source))
    }

    /// Stops the device and forgets what the driver told it: the machine is reset.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause); it is reset all the same.
    pub fn reset(&self) -> Result<(), MmioError> {
        let mut core = self.core();
        let reset = core.reset();
        self.interrupt.set(0);
        drop(core);
        reset.map_err(|source| self.core_error(source))
    }

    pub(super) fn core(&self) -> MutexGuard<'_, DeviceCore<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn core_error(&self, source: CoreError) -> MmioError {
        MmioError::Core {
            id: self.id.clone(),
            source,
        }
    }

    fn kick(&self, queue: u32) {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|index| self.kicks.get(index));
        if let Some(kick) = kick
            && let Err(error) = kick.write(1)
        {
            debug!("notifying virtio device {:?}: {error}", self.id);
        }
    }
}

impl<M: DeviceMemory> BusDevice for VirtioMmioDevice<M> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core().read_config(offset, data);
        } else if data.len() == 4 {
            let value = match offset {
                INTERRUPT_STATUS => self.interrupt.status(),
                _ => registers::read(&mut self.core(), offset),
            };
            data.copy_from_slice(&value.to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core().write_config(offset, data);
        } else if let Ok(value) = data.try_into().map(u32::from_le_bytes) {
            match offset {
                QUEUE_NOTIFY => self.kick(value),
                INTERRUPT_ACK => self.interrupt.acknowledge(value),
                _ => registers::write(&mut self.core(), &self.interrupt, offset, value),
            }
        }
    }
}

impl<M> Drop for VirtioMmioDevice<M> {
    fn drop(&mut self) {
        for queue in self.connected.drain(..) {
            if let Some(kick) = self.kicks.get(usize::from(queue))
                && let Err(error) = self.notifications.disconnect(queue, kick)
            {
                debug!("virtio device {:?}, queue {queue}: {error}", self.id);
            }
        }
    }
}
