//! The registers that every transport has, and the rules of their use (virtio 1.2 §2.1, §2.2, §3.1), without a word of where they are.
//!
//! ```text
//!  reset ──ACKNOWLEDGE, DRIVER──> negotiating ──FEATURES_OK──> setting up queues ──DRIVER_OK──> running
//!    ^                             features that were not offered,       │                        │
//!    │                             or no VERSION_1: the bit stays off    └── a fault: NEEDS_RESET ─┤
//!    └───────────────────────────────────────── status 0 ──────────────────────────────────────────┘
//! ```

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vm_migration::Schema;

use crate::feature::{ACCESS_PLATFORM, VERSION_1};
use crate::{QueueV1, VirtioInterrupt};

/// Bits of the device status (§2.1).
pub mod status {
    use super::*;

    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
    /// It knows how to drive it.
    pub const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
    /// It drives it.
    pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
    /// The features are negotiated.
    pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
    /// The driver has given up.
    pub const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
}

/// What a write to the status asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transition {
    /// Nothing that the device would notice.
    None,
    /// Stop and forget.
    Reset,
    /// Start.
    Start,
}

/// What the worker threads change: without a lock.
#[derive(Debug, Default)]
struct Shared {
    needs_reset: AtomicBool,
    generation: AtomicU32,
}

/// Registers of a transport, as they are saved with the state of its queues.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RegistersV1 {
    /// Status bits, NEEDS_RESET among them.
    pub status: u8,
    /// Features that the driver wants, or that were negotiated.
    pub driver_features: u64,
    /// The driver wanted features beyond the 64 that there are.
    pub unknown_features: bool,
    /// Which 32 of the device's features are seen.
    pub device_feature_select: u32,
    /// Which 32 of the driver's features are seen.
    pub driver_feature_select: u32,
    /// Which queue's registers are seen.
    pub queue_select: u16,
    /// Of the configuration space.
    pub config_generation: u32,
    /// All of the device's queues.
    pub queues: Vec<QueueV1>,
}

impl Schema for RegistersV1 {
    const KIND: &'static str = "virtio";
    const VERSION: u32 = 1;
}

/// The state machine of one device: status, feature and queue registers. A transport maps its registers to these
/// methods; [`DeviceCore`](crate::DeviceCore) acts on the status.
///
/// Nothing that the driver writes is an error: what makes no sense changes nothing, or leads to a refused FEATURES_OK, or to
/// NEEDS_RESET.
#[derive(Debug)]
pub struct DeviceState {
    /// NEEDS_RESET is in `shared`.
    status: u8,
    offered: u64,
    driver_features: u64,
    unknown_features: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    max_sizes: Vec<u16>,
    queues: Vec<QueueV1>,
    shared: Arc<Shared>,
}

/// An address register of a queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum QueueAddress {
    /// Of the descriptor table.
    Descriptors,
    /// Of the available ring, which the driver writes.
    Available,
    /// Of the used ring, which the device writes.
    Used,
}

/// Which half of a 64-bit register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Half {
    /// Bits 0–31.
    Low,
    /// Bits 32–63.
    High,
}

impl Half {
    fn shift(self) -> u32 {
        match self {
            Self::Low => 0,
            Self::High => 32,
        }
    }
}

/// The 32 bits of `word` that `select` chooses; there are two choices.
fn window(word: u64, select: u32) -> u32 {
    match select {
        0 => word as u32,
        1 => (word >> 32) as u32,
        _ => 0,
    }
}

impl DeviceState {
    /// After a reset. `offered` are the device's features, `max_sizes` those of its queues.
    #[must_use]
    pub fn new(offered: u64, max_sizes: &[u16]) -> Self {
        let mut state = Self {
            status: 0,
            offered,
            driver_features: 0,
            unknown_features: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            max_sizes: max_sizes.to_vec(),
            queues: Vec::new(),
            shared: Arc::default(),
        };
        state.reset(offered);
        state
    }

    /// As after power-on, but for the generation: who reads a changed configuration shall see another one.
    pub(crate) fn reset(&mut self, offered: u64) {
        self.status = 0;
        self.offered = offered;
        self.driver_features = 0;
        self.unknown_features = false;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.queues = self
            .max_sizes
            .iter()
            .map(|&size| QueueV1 {
                size,
                ..QueueV1::default()
            })
            .collect();
        self.shared.needs_reset.store(false, Ordering::Release);
    }

    /// The device status.
    #[must_use]
    pub fn status(&self) -> u8 {
        if self.shared.needs_reset.load(Ordering::Acquire) {
            self.status | status::NEEDS_RESET
        } else {
            self.status
        }
    }

    /// The device runs: its queues' registers do not change any more.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// The device is, or would be, at work: it runs, and needs no reset.
    pub(crate) fn is_serving(&self) -> bool {
        self.is_running() && !self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// The driver writes the status. Bits once set stay until a reset.
    pub(crate) fn write_status(&mut self, value: u8) -> Transition {
        if value == 0 {
            return Transition::Reset;
        }
        let known = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        self.status |= value & known;

        let found = status::ACKNOWLEDGE | status::DRIVER;
        if value & status::FEATURES_OK != 0
            && self.status & found == found
            && self.features_acceptable()
        {
            self.status |= status::FEATURES_OK;
        }
        let may_run = self.status & status::FEATURES_OK != 0
            && self.status & status::FAILED == 0
            && self.status() & status::NEEDS_RESET == 0;
        if value & status::DRIVER_OK != 0 && may_run && !self.is_running() {
            self.status |= status::DRIVER_OK;
            return Transition::Start;
        }
        Transition::None
    }

    fn features_acceptable(&self) -> bool {
        let required = VERSION_1 | (self.offered & ACCESS_PLATFORM);
        !self.unknown_features
            && self.driver_features & !self.offered == 0
            && self.driver_features & required == required
    }

    /// The features the device offers.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// The features the driver wants; negotiated once FEATURES_OK is set.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// Register `device_feature_select`.
    #[must_use]
    pub fn device_feature_select(&self) -> u32 {
        self.device_feature_select
    }

    /// The driver writes it.
    pub fn select_device_features(&mut self, select: u32) {
        self.device_feature_select = select;
    }

    /// The 32 selected bits of the offered features.
    #[must_use]
    pub fn device_features(&self) -> u32 {
        window(self.offered, self.device_feature_select)
    }

    /// Register `driver_feature_select`.
    #[must_use]
    pub fn driver_feature_select(&self) -> u32 {
        self.driver_feature_select
    }

    /// The driver writes it.
    pub fn select_driver_features(&mut self, select: u32) {
        self.driver_feature_select = select;
    }

    /// The 32 selected bits of the features the driver wants.
    #[must_use]
    pub fn driver_features(&self) -> u32 {
        window(self.driver_features, self.driver_feature_select)
    }

    /// The driver writes them. After FEATURES_OK they stay.
    pub fn write_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => self.unknown_features |= value != 0,
        }
    }

    /// Queues of the device.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// Register `queue_select`.
    #[must_use]
    pub fn queue_select(&self) -> u16 {
        self.queue_select
    }

    /// The driver writes it.
    pub fn select_queue(&mut self, select: u16) {
        self.queue_select = select;
    }

    /// The most entries of the selected queue; 0 if there is none.
    #[must_use]
    pub fn queue_max_size(&self) -> u16 {
        self.max_sizes
            .get(usize::from(self.queue_select))
            .copied()
            .unwrap_or(0)
    }

    /// Entries of the selected queue; 0 if there is none.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.selected().map_or(0, |queue| queue.size)
    }

    /// The driver writes them. What is no power of two up to the maximum is ignored.
    pub fn write_queue_size(&mut self, size: u16) {
        let max = self.queue_max_size();
        if let Some(queue) = self.changeable()
            && size.is_power_of_two()
            && size <= max
        {
            queue.size = size;
        }
    }

    /// The selected queue is enabled.
    #[must_use]
    pub fn queue_ready(&self) -> bool {
        self.selected().is_some_and(|queue| queue.ready)
    }

    /// The driver enables the selected queue, or, before DRIVER_OK, disables it again (which only MMIO allows).
    pub fn write_queue_ready(&mut self, ready: bool) {
        let running = self.is_running();
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !running
        {
            queue.ready = ready;
        }
    }

    /// An address of the selected queue; 0 if there is none.
    #[must_use]
    pub fn queue_address(&self, which: QueueAddress, half: Half) -> u32 {
        let address = self.selected().map_or(0, |queue| match which {
            QueueAddress::Descriptors => queue.descriptors,
            QueueAddress::Available => queue.available,
            QueueAddress::Used => queue.used,
        });
        (address >> half.shift()) as u32
    }

    /// The driver writes half of it.
    pub fn write_queue_address(&mut self, which: QueueAddress, half: Half, value: u32) {
        if let Some(queue) = self.changeable() {
            let address = match which {
                QueueAddress::Descriptors => &mut queue.descriptors,
                QueueAddress::Available => &mut queue.available,
                QueueAddress::Used => &mut queue.used,
            };
            let other_half = *address & 0xffff_ffff_0000_0000_u64 >> half.shift();
            *address = other_half | u64::from(value) << half.shift();
        }
    }

    fn selected(&self) -> Option<&QueueV1> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue while it may be changed: before it is enabled.
    fn changeable(&mut self) -> Option<&mut QueueV1> {
        let running = self.is_running();
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.ready && !running)
    }

    /// All queues and their largest sizes.
    pub(crate) fn queues(&self) -> impl Iterator<Item = (&QueueV1, u16)> {
        self.queues.iter().zip(self.max_sizes.iter().copied())
    }

    /// The registers, with the queues as the device left them.
    pub(crate) fn save(&self) -> RegistersV1 {
        RegistersV1 {
            status: self.status(),
            driver_features: self.driver_features,
            unknown_features: self.unknown_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            config_generation: self.generation(),
            queues: self.queues.clone(),
        }
    }

    /// Takes over saved registers. Says what is wrong with them if they are not such a device's.
    pub(crate) fn restore(&mut self, saved: RegistersV1) -> Result<(), &'static str> {
        let all = status::ACKNOWLEDGE
            | status::DRIVER
            | status::DRIVER_OK
            | status::FEATURES_OK
            | status::NEEDS_RESET
            | status::FAILED;
        let negotiated = saved.status & (status::FEATURES_OK | status::DRIVER_OK) != 0;
        let sizes_fit = saved
            .queues
            .iter()
            .zip(&self.max_sizes)
            .all(|(queue, max)| queue.size.is_power_of_two() && queue.size <= *max);
        if saved.status & !all != 0 {
            return Err("a status that there is not");
        } else if saved.queues.len() != self.max_sizes.len() {
            return Err("another number of queues");
        } else if !sizes_fit {
            return Err("queues of sizes that this device does not have");
        }
        self.driver_features = saved.driver_features;
        self.unknown_features = saved.unknown_features;
        if negotiated && !self.features_acceptable() {
            return Err("features that this device does not offer");
        }
        self.status = saved.status & !status::NEEDS_RESET;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.queue_select = saved.queue_select;
        self.queues = saved.queues;
        let shared = &self.shared;
        shared
            .needs_reset
            .store(saved.status & status::NEEDS_RESET != 0, Ordering::Release);
        shared
            .generation
            .store(saved.config_generation, Ordering::Release);
        Ok(())
    }

    /// Takes over what the device did with its queues.
    pub(crate) fn take_queues(&mut self, states: impl Iterator<Item = (u16, QueueV1)>) {
        for (index, state) in states {
            if let Some(queue) = self.queues.get_mut(usize::from(index))
                && queue.ready
            {
                *queue = state;
            }
        }
    }

    /// Register `config_generation`; narrower transports take its lowest bits.
    pub(crate) fn generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    pub(crate) fn next_generation(&self) {
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// The interrupt that devices get: it sets status and generation, then calls `transport`'s.
    pub(crate) fn interrupt(
        &self,
        transport: Arc<dyn VirtioInterrupt>,
    ) -> Arc<dyn VirtioInterrupt> {
        Arc::new(StateInterrupt {
            shared: self.shared.clone(),
            transport,
        })
    }
}

struct StateInterrupt {
    shared: Arc<Shared>,
    transport: Arc<dyn VirtioInterrupt>,
}

impl VirtioInterrupt for StateInterrupt {
    fn queue(&self, index: u16) {
        self.transport.queue(index);
    }

    fn config_changed(&self) {
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.transport.config_changed();
    }

    fn needs_reset(&self) {
        self.shared.needs_reset.store(true, Ordering::Release);
        self.transport.needs_reset();
    }
}
