//! Virtio devices on the PCI bus, and what the machine gives them: MSI vectors, ioeventfds, threads.
//!
//! Each kind of device has a file here that makes it from the config, and a line in [`VirtioHost::add_all`].

mod balloon;
mod block;
mod console;
mod mem;
mod net;
mod pmem;
mod rng;
mod vsock;
mod watchdog;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use hypervisor::{IoEventAddress, Vm};
use virtio_devices::BlockControl;
use virtio_devices::transport::pci::{Host, Notifications, VirtioPciDevice};
use virtio_devices::{BalloonControl, MemControl};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vm_virtio::{Job, Spawn, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use super::interrupts::{MsiVectors, Routing};
use super::pci::Pci;
use crate::config::VmConfig;
use crate::console::Outputs;
use crate::event::EventSender;
use crate::memory_manager::{MemoryManager, MemorySlots};
use crate::pmem::Before;
use crate::threads;

pub(super) use console::ConsoleEnds;

/// Guest memory as virtio devices hold it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What the machine keeps of virtio devices.
pub(super) struct Handles {
    /// Each device, with its slot.
    pub devices: Vec<(u8, Arc<VirtioPciDevice<Memory>>)>,
    /// What changes disks, by id.
    pub disks: BTreeMap<String, BlockControl>,
    /// The host's ends of the console.
    pub console: Option<ConsoleEnds>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonControl>,
    /// The device that adds RAM, if there is one.
    pub mem: Option<MemControl>,
    /// The files of persistent memory, as they were.
    pub pmem: Vec<Before>,
}

/// What every virtio device gets.
pub(super) struct VirtioHost<'a> {
    vm: Arc<dyn Vm>,
    routing: Arc<Routing>,
    ram: &'a MemoryManager,
    slots: &'a Arc<MemorySlots>,
    spawn: Spawn,
    events: &'a EventSender,
    pci: &'a Pci,
    /// Instead of PCI.
    #[cfg(feature = "mmio")]
    mmio: Option<&'a super::mmio::Mmio>,
    devices: RefCell<Vec<(u8, Arc<VirtioPciDevice<Memory>>)>>,
}

impl<'a> VirtioHost<'a> {
    /// For devices on `pci`.
    pub(super) fn new(
        vm: Arc<dyn Vm>,
        routing: Arc<Routing>,
        ram: &'a MemoryManager,
        slots: &'a Arc<MemorySlots>,
        pci: &'a Pci,
        events: &'a EventSender,
    ) -> io::Result<Self> {
        let to_threads = events.try_clone()?;
        let spawn = move |name: String, job: Job| {
            threads::spawn(name, to_threads.try_clone()?, job).map(drop)
        };
        Ok(Self {
            vm,
            routing,
            ram,
            slots,
            spawn: Arc::new(spawn),
            events,
            pci,
            #[cfg(feature = "mmio")]
            mmio: None,
            devices: RefCell::default(),
        })
    }

    /// Devices go there, and not onto PCI.
    #[cfg(feature = "mmio")]
    pub(super) fn on_mmio(mut self, mmio: &'a super::mmio::Mmio) -> Self {
        self.mmio = Some(mmio);
        self
    }

    /// Makes the devices of `config`, in the order in which the guest finds them. `outputs` are the host's ends.
    pub(super) fn add_all(
        &self,
        config: &VmConfig,
        outputs: &Outputs,
    ) -> Result<Handles, DeviceError> {
        let disks = block::add(self, config)?;
        net::add(self, config)?;
        rng::add(self, config)?;
        let console = console::add(self, config, outputs.console.clone())?;
        vsock::add(self, config, outputs.vsock.as_ref())?;
        watchdog::add(self, config)?;
        let (mem, ram) = mem::add(self, config)?;
        Ok(Handles {
            console,
            balloon: balloon::add(self, config, ram)?,
            mem,
            pmem: pmem::add(self, config)?,
            disks,
            devices: self.devices.take(),
        })
    }

    /// Puts `device` on the bus.
    fn add(&self, id: &str, device: Box<dyn VirtioDevice<Memory>>) -> Result<(), DeviceError> {
        #[cfg(feature = "mmio")]
        if let Some(mmio) = self.mmio {
            let memory = self.ram.memory().clone();
            return mmio.add(id, device, memory, self.spawn.clone());
        }
        let vectors = VirtioPciDevice::vectors(device.as_ref());
        let msi = MsiVectors::new(self.routing.clone(), vectors).map_err(|source| {
            DeviceError::Event {
                name: "MSI vectors",
                source,
            }
        })?;
        let host = Host {
            msi: Arc::new(msi),
            notifications: Arc::new(Ioeventfds(self.vm.clone())),
            spawn: self.spawn.clone(),
            extra_features: 0,
        };
        let device = VirtioPciDevice::new(id, device, self.ram.memory().clone(), host)?;
        let device = Arc::new(device);
        let slot = self.pci.add(id, None, device.clone())?;
        self.devices.borrow_mut().push((slot, device));
        log::debug!("virtio device {id:?} is in PCI slot {slot}");
        Ok(())
    }
}

/// Writes to notification registers become events in KVM, without an exit to user space.
struct Ioeventfds(Arc<dyn Vm>);

impl Notifications for Ioeventfds {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0
            .register_ioeventfd(event, IoEventAddress::Mmio(address), None)
            .map_err(io::Error::other)
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0
            .unregister_ioeventfd(event, IoEventAddress::Mmio(address), None)
            .map_err(io::Error::other)
    }
}
