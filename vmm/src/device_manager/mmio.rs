//! Virtio devices on memory-mapped registers instead of PCI, where the VMM is built with the feature `mmio`: a page and a pin of
//! the IOAPIC each, which the DSDT tells of.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::acpi::VirtioMmio;
use devices::ioapic::{Ioapic, PINS};
use hypervisor::{IoEventAddress, Vm};
use virtio_devices::transport::mmio::{Host, Notifications, QUEUE_NOTIFY, SIZE, VirtioMmioDevice};
use vm_allocator::{AddressAllocator, AllocatorError, IdAllocator};
use vm_device::Bus;
use vm_virtio::{Spawn, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::virtio::Memory;
use super::{DeviceError, REGISTERS_SIZE, REGISTERS_START, place};

const NAME: &str = "virtio device";
/// The upper half of what is there for registers that ACPI tells of.
const PAGES_SIZE: u64 = REGISTERS_SIZE / 2;
const PAGES_START: u64 = REGISTERS_START + PAGES_SIZE;
/// Below are pins of the PC's own devices, the clock's 8 the last of them.
const FIRST_PIN: u32 = 9;

/// The devices, and where more can be.
pub(super) struct Mmio {
    vm: Arc<dyn Vm>,
    bus: Arc<Bus>,
    ioapic: Arc<Ioapic>,
    state: Mutex<State>,
}

struct State {
    pages: AddressAllocator,
    pins: IdAllocator,
    devices: Vec<(VirtioMmio, Arc<VirtioMmioDevice<Memory>>)>,
}

impl Mmio {
    /// No devices yet. They will be on `bus`.
    pub(super) fn new(
        vm: Arc<dyn Vm>,
        bus: Arc<Bus>,
        ioapic: Arc<Ioapic>,
    ) -> Result<Self, DeviceError> {
        let state = State {
            pages: AddressAllocator::new(PAGES_START, PAGES_SIZE).map_err(allocate)?,
            pins: IdAllocator::new(FIRST_PIN, u32::from(PINS) - 1),
            devices: Vec::new(),
        };
        Ok(Self {
            vm,
            bus,
            ioapic,
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `device` on the bus.
    pub(super) fn add(
        &self,
        id: &str,
        device: Box<dyn VirtioDevice<Memory>>,
        memory: Memory,
        spawn: Spawn,
    ) -> Result<(), DeviceError> {
        let mut state = self.state();
        let address = state.pages.allocate(SIZE, SIZE).map_err(allocate)?;
        let gsi = state.pins.allocate().map_err(allocate)?;
        let host = Host {
            line: self.ioapic.line(u8::try_from(gsi).unwrap_or(u8::MAX)),
            notifications: Arc::new(Ioeventfds {
                vm: self.vm.clone(),
                address: address + QUEUE_NOTIFY,
            }),
            spawn,
            extra_features: 0,
        };
        let device = Arc::new(VirtioMmioDevice::new(id, device, memory, host)?);
        place(&self.bus, NAME, address, SIZE, device.clone())?;
        log::debug!("virtio device {id:?} is at {address:#x}, with IOAPIC pin {gsi}");
        // All pages are below 4 GiB.
        let address = u32::try_from(address).unwrap_or(u32::MAX);
        state.devices.push((VirtioMmio { address, gsi }, device));
        Ok(())
    }

    /// What the DSDT says of them.
    pub(super) fn describe(&self) -> Vec<VirtioMmio> {
        self.state().devices.iter().map(|(at, _)| *at).collect()
    }

    /// Stops their workers. One that is lost makes its device want a reset, which is the driver's affair.
    pub(super) fn pause(&self) {
        for (_, device) in &self.state().devices {
            if let Err(e) = device.pause() {
                log::warn!("{}", crate::error_chain(&e));
            }
        }
    }

    /// Lets them work again, where their drivers had them working.
    ///
    /// # Errors
    /// The first that cannot; the others do.
    pub(super) fn resume(&self) -> Result<(), DeviceError> {
        let mut resumed = Ok(());
        for (_, device) in &self.state().devices {
            resumed = resumed.and(device.resume());
        }
        Ok(resumed?)
    }

    /// Takes every device off the bus, which stops it.
    pub(super) fn clear(&self) {
        for (at, _) in self.state().devices.drain(..) {
            // It was put there.
            let _ = self.bus.remove(at.address.into());
        }
    }
}

fn allocate(source: AllocatorError) -> DeviceError {
    DeviceError::Allocate { name: NAME, source }
}

/// Writes of a queue's number to the register of notifications become events in KVM, without an exit to user space.
struct Ioeventfds {
    vm: Arc<dyn Vm>,
    address: u64,
}

impl Notifications for Ioeventfds {
    fn connect(&self, queue: u16, event: &EventFd) -> io::Result<()> {
        let at = IoEventAddress::Mmio(self.address);
        self.vm
            .register_ioeventfd(event, at, Some(queue.into()))
            .map_err(io::Error::other)
    }

    fn disconnect(&self, queue: u16, event: &EventFd) -> io::Result<()> {
        let at = IoEventAddress::Mmio(self.address);
        self.vm
            .unregister_ioeventfd(event, at, Some(queue.into()))
            .map_err(io::Error::other)
    }
}
