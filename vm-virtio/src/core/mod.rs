//! A device behind its registers: what a transport is, but for where its registers are.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use std::io;
use thiserror::Error;
use vm_migration::{MigrationError, Section};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::state::{DeviceState, RegistersV1, Transition};
use crate::{
    Activation, DeviceError, DeviceMemory, DeviceQueue, QueueError, Spawn, VirtioDevice,
    VirtioInterrupt,
};

/// What can go wrong with a device behind a transport.
#[derive(Debug, Error)]
pub enum CoreError {
    /// The kernel gave no eventfd.
    #[error("creating the notifications of a virtio device of type {device}")]
    Kick {
        /// Its type.
        device: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The driver put a queue where none can be. The device wants a reset.
    #[error("starting a virtio device of type {device}")]
    Queue {
        /// Its type.
        device: u32,
        /// Which queue, and why.
        #[source]
        source: QueueError,
    },
    /// The device cannot start. It wants a reset.
    #[error("starting a virtio device of type {device}")]
    Start {
        /// Its type.
        device: u32,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// The device cannot stop.
    #[error("stopping a virtio device of type {device}")]
    Stop {
        /// Its type.
        device: u32,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// The saved state is not of such a device.
    #[error("the saved state of virtio device {id:?} has {what}")]
    Mismatch {
        /// Whose state it is.
        id: String,
        /// The difference.
        what: &'static str,
    },
    /// Something is asked of a device at work that needs it paused.
    #[error("a virtio device of type {0} is at work, and must be paused for that")]
    Active(u32),
    /// The state cannot be written or read.
    #[error("saving or restoring a virtio device of type {device}")]
    State {
        /// Its type.
        device: u32,
        /// Why.
        #[source]
        source: MigrationError,
    },
}

/// A device with its registers, its queues while it does not work, and its life: start, pause, resume, reset, save, restore.
///
/// A transport holds it in a lock, maps its own registers to [`registers`](Self::registers), [`write_status`](Self::write_status) and the
/// configuration space, and gives the interrupts.
pub struct DeviceCore<M> {
    device: Box<dyn VirtioDevice<M>>,
    state: DeviceState,
    memory: M,
    spawn: Spawn,
    interrupt: Arc<dyn VirtioInterrupt>,
    kicks: Vec<Arc<EventFd>>,
    /// Offered besides the device's features.
    extra_features: u64,
    active: bool,
    /// The configuration space when the generation was read last.
    seen_config: Vec<u8>,
}

impl<M: DeviceMemory> DeviceCore<M> {
    /// `device` after a reset. `extra_features` are those that the transport or the machine adds:
    /// [`ACCESS_PLATFORM`](crate::feature::ACCESS_PLATFORM) where `memory` translates.
    ///
    /// # Errors
    /// [`CoreError::Kick`].
    pub fn new(
        device: Box<dyn VirtioDevice<M>>,
        extra_features: u64,
        memory: M,
        interrupt: Arc<dyn VirtioInterrupt>,
        spawn: Spawn,
    ) -> Result<Self, CoreError> {
        let kick = |_: &u16| EventFd::new(EFD_NONBLOCK).map(Arc::new);
        let kicks = device
            .queue_max_sizes()
            .iter()
            .map(kick)
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| CoreError::Kick {
                device: device.device_type(),
                source,
            })?;
        let state = DeviceState::new(device.features() | extra_features, device.queue_max_sizes());
        let mut core = Self {
            interrupt: state.interrupt(interrupt),
            device,
            state,
            memory,
            spawn,
            kicks,
            extra_features,
            active: false,
            seen_config: Vec::new(),
        };
        core.seen_config = core.config();
        Ok(core)
    }

    /// Number of the device's type (§5).
    #[must_use]
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// Feature and queue registers, and the status.
    #[must_use]
    pub fn registers(&self) -> &DeviceState {
        &self.state
    }

    /// Feature and queue registers, for the driver's writes.
    pub fn registers_mut(&mut self) -> &mut DeviceState {
        &mut self.state
    }

    /// What the driver's notification of queue `index` has to write to: for an ioeventfd, or by hand.
    #[must_use]
    pub fn kick(&self, index: u16) -> Option<&EventFd> {
        self.kicks.get(usize::from(index)).map(|kick| &**kick)
    }

    /// Copies of the descriptors of all queues' notifications: who notifies by them needs no lock.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn kicks(&self) -> io::Result<Box<[EventFd]>> {
        self.kicks.iter().map(|kick| kick.try_clone()).collect()
    }

    /// The device works: its queues are with it.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The driver writes the status register. This may start the device or, with 0, stop it, and then waits for its workers.
    ///
    /// # Errors
    /// For the log: the driver sees NEEDS_RESET, or a device that is reset all the same.
    pub fn write_status(&mut self, value: u8) -> Result<(), CoreError> {
        match self.state.write_status(value) {
            Transition::None => Ok(()),
            Transition::Reset => self.reset(),
            Transition::Start => self.start(),
        }
    }

    /// Stops the device and forgets what the driver told it: status 0, or the reset of a bus.
    ///
    /// # Errors
    /// [`CoreError::Stop`], after which it is reset all the same.
    pub fn reset(&mut self) -> Result<(), CoreError> {
        let stopped = self.pause();
        self.device.reset();
        self.state
            .reset(self.device.features() | self.extra_features);
        stopped
    }

    /// Stops the device's workers, if it works. Its queues are in the registers then. For a pause, a snapshot, an unplug, a shutdown.
    ///
    /// # Errors
    /// [`CoreError::Stop`].
    pub fn pause(&mut self) -> Result<(), CoreError> {
        if !std::mem::take(&mut self.active) {
            return Ok(());
        }
        let mut queues = self.device.deactivate().map_err(|source| {
            // Its queues are lost: only a reset makes new ones.
            self.interrupt.needs_reset();
            CoreError::Stop {
                device: self.device_type(),
                source,
            }
        })?;
        let memory = self.memory.memory();
        for queue in &mut queues {
            // What was used last must not wait for the resume; a fault shows again then.
            let _ = queue.signal(&*memory, &*self.interrupt);
        }
        self.state
            .take_queues(queues.iter().map(|queue| (queue.index(), queue.state())));
        Ok(())
    }

    /// Lets the device work again after [`pause`](Self::pause) or [`restore`](Self::restore), if its driver had it working.
    ///
    /// # Errors
    /// [`CoreError::Queue`] and [`CoreError::Start`].
    pub fn resume(&mut self) -> Result<(), CoreError> {
        if self.active || !self.state.is_serving() {
            return Ok(());
        }
        self.start()
    }

    fn start(&mut self) -> Result<(), CoreError> {
        let started = self.try_start();
        self.active = started.is_ok();
        if started.is_err() {
            self.interrupt.needs_reset();
        }
        started
    }

    fn try_start(&mut self) -> Result<(), CoreError> {
        let device = self.device_type();
        let queues = self
            .make_queues()
            .map_err(|source| CoreError::Queue { device, source })?;
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                queues,
                features: self.state.features(),
                interrupt: self.interrupt.clone(),
                spawn: self.spawn.clone(),
            })
            .map_err(|source| CoreError::Start { device, source })
    }

    fn make_queues(&self) -> Result<Vec<DeviceQueue>, QueueError> {
        let memory = self.memory.memory();
        let features = self.state.features();
        (0..)
            .zip(self.state.queues())
            .zip(&self.kicks)
            .map(|((index, (queue, max)), kick)| {
                DeviceQueue::new(index, max, queue, features, &*memory, kick.clone())
            })
            .collect()
    }

    /// Bytes of the device's configuration space.
    #[must_use]
    pub fn config_len(&self) -> usize {
        self.device.config_len()
    }

    /// The driver reads the device's configuration space. What is past its end reads as zeros.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((offset, len)) = self.within_config(offset, data.len())
            && let Some(data) = data.get_mut(..len)
        {
            self.device.read_config(offset, data);
        }
    }

    /// The driver writes it. A write that goes past its end is ignored.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some((offset, len)) = self.within_config(offset, data.len())
            && len == data.len()
        {
            self.device.write_config(offset, data);
        }
    }

    /// Offset, and how many of `len` bytes there are in the configuration space.
    fn within_config(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let left = self.config_len().checked_sub(offset)?;
        Some((offset, len.min(left))).filter(|(_, len)| *len > 0)
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; self.config_len()];
        if !config.is_empty() {
            self.device.read_config(0, &mut config);
        }
        config
    }

    /// The driver reads the configuration's generation (§2.5.1): another one than before if the configuration changed since. It is
    /// compared here, so that a device cannot change it unseen between two reads of its parts.
    pub fn config_generation(&mut self) -> u32 {
        let config = self.config();
        if config != self.seen_config {
            self.seen_config = config;
            self.state.next_generation();
        }
        self.state.generation()
    }

    /// Status, features and queues as one section, and the device's own as another, both for the one with `id`.
    ///
    /// # Errors
    /// [`CoreError::Active`], and [`CoreError::State`].
    pub fn save(&self, id: &str) -> Result<[Section; 2], CoreError> {
        if self.active {
            return Err(CoreError::Active(self.device_type()));
        }
        let registers = Section::encode(id, &self.state.save());
        let both = registers.and_then(|registers| Ok([registers, self.device.save(id)?]));
        both.map_err(|source| self.state_error(source))
    }

    /// Takes over what [`save`](Self::save) gave: `registers` and the `device`'s own section. [`resume`](Self::resume) lets it work.
    ///
    /// # Errors
    /// [`CoreError::Active`], [`CoreError::Mismatch`] and [`CoreError::State`].
    pub fn restore(&mut self, registers: &Section, device: &Section) -> Result<(), CoreError> {
        if self.active {
            return Err(CoreError::Active(self.device_type()));
        }
        let saved: RegistersV1 = registers
            .decode()
            .map_err(|source| self.state_error(source))?;
        self.device
            .restore(device)
            .map_err(|source| self.state_error(source))?;
        self.state
            .restore(saved)
            .map_err(|what| CoreError::Mismatch {
                id: registers.id.clone(),
                what,
            })?;
        self.seen_config = self.config();
        Ok(())
    }

    fn state_error(&self, source: MigrationError) -> CoreError {
        CoreError::State {
            device: self.device_type(),
            source,
        }
    }
}

impl<M> Drop for DeviceCore<M> {
    fn drop(&mut self) {
        // Nobody is left to hear of an error.
        if self.active {
            let _ = self.device.deactivate();
        }
    }
}
