//! Virtio devices behind PCI, modern transport (virtio 1.2 §3.1, §4.1).

pub mod blk;
pub mod net;
pub mod queue;
pub mod vsock;

use crate::clock::within;
use crate::cpu::{apic, idt};
use crate::map;
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason, ensure, same};
use crate::pci::msix::Msix;
use crate::pci::{COMMAND_MASTER, COMMAND_MEMORY, Function, functions};
use queue::{MAX_SIZE, Queue};

/// Status: the driver saw the device.
pub const ACKNOWLEDGE: u8 = 1;
/// Status: the driver knows how to drive it.
pub const DRIVER: u8 = 2;
/// Status: go.
pub const DRIVER_OK: u8 = 4;
/// Status: the features are agreed.
pub const FEATURES_OK: u8 = 8;
/// Status: the device met an error that only a reset mends.
pub const NEEDS_RESET: u8 = 0x40;

/// Feature: indirect descriptors.
pub const F_INDIRECT: u64 = 1 << 28;
/// Feature: notification by index.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature: the standard and not what came before.
pub const F_VERSION_1: u64 = 1 << 32;

/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xffff;
/// How long a device may take for anything, in milliseconds.
pub const PATIENCE: u64 = 20_000;

const VENDOR: u16 = 0x1af4;
const CAPABILITY: u8 = 9;

/// Offsets in the common configuration (virtio 1.2 §4.1.4.3).
pub mod common {
    /// Selects 32 feature bits that the device offers.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// Those bits.
    pub const DEVICE_FEATURE: u64 = 4;
    /// Selects 32 feature bits of the driver.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// Those bits.
    pub const DRIVER_FEATURE: u64 = 12;
    /// MSI-X vector of configuration changes.
    pub const CONFIG_VECTOR: u64 = 16;
    /// How many queues there are.
    pub const NUM_QUEUES: u64 = 18;
    /// Device status.
    pub const STATUS: u64 = 20;
    /// Generation of the device configuration.
    pub const GENERATION: u64 = 21;
    /// Selects a queue.
    pub const QUEUE_SELECT: u64 = 22;
    /// Its size.
    pub const QUEUE_SIZE: u64 = 24;
    /// Its MSI-X vector.
    pub const QUEUE_VECTOR: u64 = 26;
    /// Whether it runs.
    pub const QUEUE_ENABLE: u64 = 28;
    /// Its place among the doorbells.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// Address of its descriptors.
    pub const QUEUE_DESC: u64 = 32;
    /// Address of its available ring.
    pub const QUEUE_DRIVER: u64 = 40;
    /// Address of its used ring.
    pub const QUEUE_DEVICE: u64 = 48;
}

/// One structure of a device, reachable.
#[derive(Clone, Copy)]
pub struct Window {
    /// Address.
    pub at: u64,
    /// Bytes.
    pub length: u64,
}

/// A device; it is reset when this goes.
pub struct Transport {
    /// Where it is.
    pub function: Function,
    /// Common configuration.
    pub common: Window,
    /// Doorbells.
    pub doorbells: Window,
    /// Bytes between two of them.
    pub multiplier: u32,
    /// Interrupt status.
    pub isr: Window,
    /// Device configuration; of no length where there is none.
    pub config: Window,
    /// Offset of the capability that gives access by configuration space.
    pub access: Option<u16>,
    /// Its MSI-X.
    pub msix: Msix,
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.set_status(0);
        self.msix.enable(false, false);
    }
}

impl Transport {
    /// The device number `nth` (from 0) of a type, reset.
    pub fn find(kind: u16, nth: u64) -> Outcome<Self> {
        let mut all = functions().filter(|f| f.ids() == (VENDOR, 0x1040 + kind));
        match all.nth(nth as usize) {
            Some(function) => Self::open(function),
            None => Err(Reason("no such virtio device", nth, u64::from(kind))),
        }
    }

    /// Virtio devices on bus 0 that speak the modern transport.
    pub fn all() -> impl Iterator<Item = Function> {
        functions().filter(|f| f.ids().0 == VENDOR && f.ids().1 >= 0x1040)
    }

    /// Walks the capabilities, switches memory and bus mastering on, resets.
    pub fn open(function: Function) -> Outcome<Self> {
        function.set_command(function.command() | COMMAND_MEMORY | COMMAND_MASTER);
        let mut found: [Option<(Window, u16)>; 5] = [None; 5];
        let mut access = None;
        for (at, id) in function.capabilities().filter(|c| c.1 == CAPABILITY) {
            let kind = function.read8(at + 3);
            if id == CAPABILITY && kind == 5 {
                access = Some(at);
            }
            if !(1..5).contains(&kind) || found[usize::from(kind)].is_some() {
                continue;
            }
            let bar = function.bar_address(function.read8(at + 4));
            let bar = bar.ok_or(Reason("a virtio capability names no BAR", u64::from(at), 0))?;
            let offset = u64::from(function.read32(at + 8));
            let length = u64::from(function.read32(at + 12));
            let place = map::device(bar + offset, length);
            let place = place.ok_or(Reason("no room to map a BAR", bar, length))?;
            found[usize::from(kind)] = Some((Window { at: place, length }, at));
        }
        let part = |kind: usize| {
            found[kind].ok_or(Reason("a virtio structure is missing", 0, kind as u64))
        };
        let doorbells = part(2)?;
        let transport = Self {
            function,
            common: part(1)?.0,
            doorbells: doorbells.0,
            multiplier: function.read32(doorbells.1 + 16),
            isr: part(3)?.0,
            config: part(4).map_or(Window { at: 0, length: 0 }, |p| p.0),
            access,
            msix: Msix::open(function).ok_or(Reason("a virtio device has no MSI-X", 0, 1))?,
        };
        ensure(
            "the common configuration is 56 bytes or more",
            transport.common.length >= 56,
        )?;
        transport.reset()?;
        Ok(transport)
    }

    /// Reads a field of the common configuration.
    pub fn get<T: Copy>(&self, field: u64) -> T {
        read(self.common.at + field)
    }

    /// Writes a field of the common configuration.
    pub fn set<T: Copy>(&self, field: u64, value: T) {
        write(self.common.at + field, value);
    }

    /// Writes 8 bytes as two halves.
    pub fn set_wide(&self, field: u64, value: u64) {
        self.set(field, value as u32);
        self.set(field + 4, (value >> 32) as u32);
    }

    /// Reads 8 bytes as two halves.
    pub fn get_wide(&self, field: u64) -> u64 {
        u64::from(self.get::<u32>(field)) | u64::from(self.get::<u32>(field + 4)) << 32
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        self.get(common::STATUS)
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u8) {
        self.set(common::STATUS, status);
    }

    /// Resets and waits for the end of it.
    pub fn reset(&self) -> Outcome {
        self.set_status(0);
        ensure(
            "the device ends its reset",
            within(PATIENCE, || self.status() == 0),
        )
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.get::<u32>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Writes the driver's features.
    pub fn accept(&self, features: u64) {
        for select in 0..2u32 {
            self.set(common::DRIVER_FEATURE_SELECT, select);
            self.set(common::DRIVER_FEATURE, (features >> (32 * select)) as u32);
        }
    }

    /// From reset to FEATURES_OK with VERSION_1 and those of `wanted` that are offered; which they are.
    pub fn negotiate(&self, wanted: u64) -> Outcome<u64> {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let offered = self.offered();
        ensure("the device offers VERSION_1", offered & F_VERSION_1 != 0)?;
        let features = offered & wanted | F_VERSION_1;
        self.accept(features);
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.set_status(status);
        same(
            "status after FEATURES_OK",
            u64::from(self.status()),
            u64::from(status),
        )?;
        Ok(features)
    }

    /// Vector that interrupts of configuration changes come by.
    pub const fn config_vector() -> u8 {
        idt::DEVICE
    }

    /// Vector that interrupts of a queue come by.
    pub fn queue_vector(index: u16) -> u8 {
        idt::DEVICE + 1 + (index as u8).min(idt::DEVICE_COUNT - 2)
    }

    /// Switches MSI-X on, and routes configuration changes.
    pub fn interrupts(&self) -> Outcome {
        self.msix.enable(true, false);
        self.msix.route(0, Self::config_vector(), apic::boot_id());
        self.set(common::CONFIG_VECTOR, 0u16);
        same(
            "the configuration's vector",
            u64::from(self.get::<u16>(common::CONFIG_VECTOR)),
            0,
        )
    }

    /// How many queues the device has.
    pub fn queue_count(&self) -> u16 {
        self.get(common::NUM_QUEUES)
    }

    /// Selects a queue; the largest size it can have.
    pub fn select(&self, index: u16) -> u16 {
        self.set(common::QUEUE_SELECT, index);
        self.get(common::QUEUE_SIZE)
    }

    /// Lays out a queue of at most `size` entries and tells the device, with an interrupt where MSI-X has an entry for it.
    pub fn prepare(&self, index: u16, size: u16, features: u64) -> Outcome<Queue> {
        let most = self.select(index).min(size).min(MAX_SIZE);
        ensure("the queue has a size", most > 0)?;
        let size = 1 << most.ilog2();
        let mut queue = Queue::new(index, size, features & F_EVENT_IDX != 0)?;
        self.set(common::QUEUE_SIZE, size);
        same(
            "the queue's size",
            u64::from(self.get::<u16>(common::QUEUE_SIZE)),
            u64::from(size),
        )?;
        if index + 1 < self.msix.count {
            self.msix
                .route(index + 1, Self::queue_vector(index), apic::boot_id());
            self.set(common::QUEUE_VECTOR, index + 1);
            same(
                "the queue's vector",
                u64::from(self.get::<u16>(common::QUEUE_VECTOR)),
                u64::from(index + 1),
            )?;
        }
        self.set_wide(common::QUEUE_DESC, queue.descriptors);
        self.set_wide(common::QUEUE_DRIVER, queue.available);
        self.set_wide(common::QUEUE_DEVICE, queue.used);
        same(
            "the descriptors' address",
            self.get_wide(common::QUEUE_DESC),
            queue.descriptors,
        )?;
        same(
            "the available ring's address",
            self.get_wide(common::QUEUE_DRIVER),
            queue.available,
        )?;
        same(
            "the used ring's address",
            self.get_wide(common::QUEUE_DEVICE),
            queue.used,
        )?;
        let offset =
            u64::from(self.get::<u16>(common::QUEUE_NOTIFY_OFF)) * u64::from(self.multiplier);
        ensure(
            "the doorbell lies among the doorbells",
            offset + 2 <= self.doorbells.length,
        )?;
        queue.doorbell = self.doorbells.at + offset;
        Ok(queue)
    }

    /// Lets the device use the selected queue.
    pub fn enable(&self) -> Outcome {
        self.set(common::QUEUE_ENABLE, 1u16);
        let enabled: u16 = self.get(common::QUEUE_ENABLE);
        same("the queue is enabled", u64::from(enabled), 1)
    }

    /// Prepares a queue and enables it.
    pub fn queue(&self, index: u16, size: u16, features: u64) -> Outcome<Queue> {
        let queue = self.prepare(index, size, features)?;
        self.enable()?;
        Ok(queue)
    }

    /// DRIVER_OK.
    pub fn go(&self) -> Outcome {
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.set_status(status);
        same(
            "status after DRIVER_OK",
            u64::from(self.status()),
            u64::from(status),
        )
    }
}

/// Waits for a used chain: by polling, or by an interrupt without which nothing counts.
pub fn wait_for(queue: &mut Queue, by_interrupt: bool) -> Outcome<queue::Used> {
    let vector = Transport::queue_vector(queue.index);
    loop {
        if let Some(used) = queue.take()? {
            return Ok(used);
        }
        let seen = idt::count(vector);
        queue.ask_for_interrupt(by_interrupt);
        if queue.has_used() {
            continue;
        }
        let came = within(PATIENCE, || {
            if by_interrupt {
                idt::count(vector) != seen
            } else {
                queue.has_used()
            }
        });
        match (came, queue.has_used()) {
            (true, _) => {}
            (false, true) => return Err(Reason("a chain was used without an interrupt", 0, 1)),
            (false, false) => return Err(Reason("the device doesn't answer", 0, 1)),
        }
    }
}
