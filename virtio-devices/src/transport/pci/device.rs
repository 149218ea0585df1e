//! The device on the bus: configuration space, the BAR and its parts, and the life of what is behind them.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use pci::{Bars, ConfigurationSpace, MsiSink, MsixTable, PciDevice};
use vm_virtio::{DeviceCore, DeviceMemory, Spawn, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::PciInterrupt;
use super::layout::{
    BAR, BAR_SIZE, COMMON, DEVICE, Function, ISR, NOTIFY, NOTIFY_MULTIPLIER, PART, Window,
};
use super::notify::Notifications;
use super::{TransportError, common};

/// What a device needs of the machine around it.
#[derive(Clone)]
pub struct Host {
    /// Delivers its MSI-X vectors: 0 is usually that of the configuration, but that is the driver's choice. There are
    /// as many as [`VirtioPciDevice::vectors`] says.
    pub msi: Arc<dyn MsiSink>,
    /// Brings its driver's notifications.
    pub notifications: Arc<dyn Notifications>,
    /// Starts its threads.
    pub spawn: Spawn,
    /// Features offered besides the device's: [`ACCESS_PLATFORM`](vm_virtio::feature::ACCESS_PLATFORM) where memory
    /// translates.
    pub extra_features: u64,
}

/// A virtio device on PCI. Dropping it stops the device.
///
/// Locks: configuration space and device each have one, and none is held while the other is taken. Notifications take none.
pub struct VirtioPciDevice<M> {
    pub(super) id: String,
    pub(super) core: Mutex<DeviceCore<M>>,
    pub(super) config: Mutex<ConfigurationSpace>,
    pub(super) interrupt: Arc<PciInterrupt>,
    table: Arc<MsixTable>,
    /// Offset of the window capability in configuration space.
    window: u16,
    kicks: Box<[EventFd]>,
    notifications: Arc<dyn Notifications>,
    /// Where each queue's notification is connected.
    connected: Mutex<Vec<(u64, usize)>>,
}

impl<M: DeviceMemory> VirtioPciDevice<M> {
    /// MSI-X vectors that `device` will have: one for its configuration and one a queue.
    #[must_use]
    pub fn vectors(device: &dyn VirtioDevice<M>) -> u16 {
        u16::try_from(device.queue_max_sizes().len()).map_or(u16::MAX, |n| n.saturating_add(1))
    }

    /// `device` after a reset, on no bus yet. `id` is its name in errors and saved state.
    ///
    /// # Errors
    /// [`TransportError::Device`] if it cannot be on PCI, and what the kernel refuses.
    pub fn new(
        id: &str,
        device: Box<dyn VirtioDevice<M>>,
        memory: M,
        host: Host,
    ) -> Result<Self, TransportError> {
        let Host {
            msi,
            notifications,
            spawn,
            extra_features,
        } = host;
        let queues = device.queue_max_sizes().len();
        let function = Function::new(id, device.device_type(), queues, device.config_len(), msi)?;
        let interrupt = Arc::new(PciInterrupt::new(function.table.clone(), queues));
        let core = DeviceCore::new(device, extra_features, memory, interrupt.clone(), spawn)
            .map_err(|source| TransportError::Core {
                id: id.to_owned(),
                source,
            })?;
        let kicks = core
            .kicks()
            .map_err(|source| TransportError::Notification {
                id: id.to_owned(),
                source,
            })?;
        Ok(Self {
            id: id.to_owned(),
            core: Mutex::new(core),
            config: Mutex::new(function.config),
            interrupt,
            table: function.table,
            window: function.window,
            kicks,
            notifications,
            connected: Mutex::default(),
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

    /// Stops the device's workers, if it works: for a pause, a snapshot, an unplug, a shutdown.
    ///
    /// # Errors
    /// A worker is gone; the device wants a reset.
    pub fn pause(&self) -> Result<(), TransportError> {
        let paused = self.core().pause();
        paused.map_err(|source| self.core_error(source))
    }

    /// Lets it work again after [`pause`](Self::pause) or [`restore`](Self::restore), if its driver had it working.
    ///
    /// # Errors
    /// It cannot start; the device wants a reset.
    pub fn resume(&self) -> Result<(), TransportError> {
        let resumed = self.core().resume();
        resumed.map_err(|source| self.core_error(source))
    }

    /// Stops the device and forgets what the driver told it: the machine is reset. BARs and MSI-X stay.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause); it is reset all the same.
    pub fn reset(&self) -> Result<(), TransportError> {
        let mut core = self.core();
        let reset = core.reset();
        self.interrupt.reset();
        drop(core);
        reset.map_err(|source| self.core_error(source))
    }

    pub(super) fn core(&self) -> MutexGuard<'_, DeviceCore<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn config(&self) -> MutexGuard<'_, ConfigurationSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn core_error(&self, source: vm_virtio::CoreError) -> TransportError {
        TransportError::Core {
            id: self.id.clone(),
            source,
        }
    }

    fn window(&self, offset: u16, len: usize) -> Option<Window> {
        Window::reached(&self.config(), self.window, offset, len)
    }

    fn kick(&self, offset: u64) {
        let kick = usize::try_from(offset / NOTIFY_MULTIPLIER)
            .ok()
            .and_then(|index| self.kicks.get(index));
        if let Some(kick) = kick
            && let Err(error) = kick.write(1)
        {
            debug!("notifying virtio device {:?}: {error}", self.id);
        }
    }
}

impl<M> VirtioPciDevice<M> {
    fn connected(&self) -> MutexGuard<'_, Vec<(u64, usize)>> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn disconnect(&self) {
        for (address, queue) in self.connected().drain(..) {
            if let Some(kick) = self.kicks.get(queue)
                && let Err(error) = self.notifications.disconnect(address, kick)
            {
                debug!("virtio device {:?}, queue {queue}: {error}", self.id);
            }
        }
    }
}

impl<M: DeviceMemory> PciDevice for VirtioPciDevice<M> {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if let Some(window) = self.window(offset, data.len()) {
            let mut seen = [0; 4];
            let seen = &mut seen[..window.len];
            self.read_bar(BAR, window.offset, seen);
            self.config().put(window.data, seen);
        }
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        drop(config);
        if let Some(window) = self.window(offset, data.len()) {
            let mut written = [0; 4];
            let written = &mut written[..window.len];
            self.config().read(window.data, written);
            self.write_bar(BAR, window.offset, written);
        }
    }

    fn bars(&self) -> Bars {
        self.config().bars()
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if self.table.read(bar, offset, data) {
            return;
        }
        data.fill(0);
        if bar != BAR || offset >= BAR_SIZE {
            return;
        }
        let at = offset % PART;
        match offset - at {
            COMMON => common::read(&mut self.core(), &self.interrupt, at as usize, data),
            ISR if at == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.interrupt.take_isr();
                }
            }
            DEVICE => self.core().read_config(at, data),
            _ => {}
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        if self.table.write(bar, offset, data) || bar != BAR || offset >= BAR_SIZE {
            return;
        }
        let at = offset % PART;
        match offset - at {
            COMMON => common::write(&mut self.core(), &self.interrupt, at as usize, data),
            DEVICE => self.core().write_config(at, data),
            NOTIFY => self.kick(at),
            _ => {}
        }
    }

    fn bar_mapped(&self, bar: usize, address: u64) -> io::Result<()> {
        if bar != BAR {
            return Ok(());
        }
        let mut connected = self.connected();
        for (queue, kick) in self.kicks.iter().enumerate() {
            let offset = NOTIFY + NOTIFY_MULTIPLIER * queue as u64;
            let Some(place) = address.checked_add(offset) else {
                continue;
            };
            match self.notifications.connect(place, kick) {
                Ok(()) => connected.push((place, queue)),
                // Its notifications come by hand then.
                Err(error) => debug!("virtio device {:?}, queue {queue}: {error}", self.id),
            }
        }
        Ok(())
    }

    fn bar_unmapped(&self, bar: usize, _address: u64) {
        if bar == BAR {
            self.disconnect();
        }
    }
}

impl<M> Drop for VirtioPciDevice<M> {
    fn drop(&mut self) {
        self.disconnect();
    }
}
