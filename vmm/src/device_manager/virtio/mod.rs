//! Virtio devices on the PCI bus, and what the machine gives them: MSI vectors, ioeventfds, threads.
//!
//! A device that needs something of the host that others don't has a file here, which makes it from the config, and a line in
//! [`VirtioHost::add_all`]. The others make themselves ([`virtio_devices::Offered`]).

mod balloon;
mod block;
mod console;
mod iommu;
mod mem;
mod net;
mod pmem;
mod vsock;

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use arch::acpi::Viot;
use hypervisor::{IoEventAddress, Vm};
use virtio_devices::BlockControl;
use virtio_devices::iommu::EndpointMemory;
use virtio_devices::transport::pci::{Host, Notifications, VirtioPciDevice};
use virtio_devices::{BalloonControl, MemControl, OfferError, Offered, Services};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vm_virtio::{Job, Spawn, VirtioDevice, feature};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use super::interrupts::{MsiVectors, Routing};
use super::links::Links;
use super::pci::Pci;
use crate::config::VmConfig;
use crate::console::Outputs;
use crate::event::{Event, EventSender};
use crate::memory_manager::{MemoryManager, MemorySlots};
use crate::pmem::Before;
use crate::threads;

pub(super) use console::ConsoleEnds;

/// Guest memory.
type Ram = GuestMemoryAtomic<GuestMemoryMmap>;
/// Guest memory as virtio devices hold it: all of it, or what the virtual IOMMU lets them see.
pub(super) type Memory = EndpointMemory<Ram>;

/// What the machine keeps of virtio devices.
pub(super) struct Handles {
    /// Each device, with its slot.
    pub devices: Vec<(u8, Arc<VirtioPciDevice<Memory>>)>,
    /// What changes disks, by id.
    pub disks: BTreeMap<String, BlockControl>,
    /// What network devices go through.
    pub links: Links,
    /// The host's ends of the console.
    pub console: Option<ConsoleEnds>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonControl>,
    /// The device that adds RAM, if there is one.
    pub mem: Option<MemControl>,
    /// The files of persistent memory, as they were.
    pub pmem: Vec<Before>,
    /// What the guest is told of the virtual IOMMU, if there is one.
    pub viot: Option<Viot>,
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
    /// The virtual IOMMU, once it is there.
    iommu: OnceCell<iommu::Behind>,
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
            iommu: OnceCell::new(),
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
        iommu::add(self, config)?;
        let disks = block::add(self, config)?;
        let links = net::add(self, config)?;
        self.add_offered(&config.offered)?;
        let console = console::add(self, config, outputs.console.clone())?;
        vsock::add(self, config, outputs.vsock.as_ref())?;
        let (mem, ram) = mem::add(self, config)?;
        Ok(Handles {
            links,
            console,
            balloon: balloon::add(self, config, ram)?,
            mem,
            pmem: pmem::add(self, config)?,
            disks,
            viot: self.iommu.get().map(iommu::Behind::describe),
            devices: self.devices.take(),
        })
    }

    fn add_offered(&self, offered: &Offered) -> Result<(), DeviceError> {
        let events = self.events.try_clone();
        let events = events.map_err(|source| DeviceError::Event {
            name: "way to start the machine anew",
            source,
        })?;
        let services = Services {
            start_anew: Arc::new(move |why| {
                log::warn!("{why}");
                events.send(Event::GuestReset);
            }),
        };
        let all = offered.make(&services).map_err(|error| {
            let OfferError { option, source } = error;
            DeviceError::Option { option, source }
        })?;
        for made in all {
            self.add_behind(made.id, made.device, made.iommu)?;
        }
        Ok(())
    }

    /// The slot of the next device, if there is one. None where devices are not on PCI.
    fn free_slot(&self) -> Option<u8> {
        #[cfg(feature = "mmio")]
        if self.mmio.is_some() {
            return None;
        }
        self.pci.free_slot()
    }

    /// Puts `device` on the bus.
    fn add(&self, id: &str, device: Box<dyn VirtioDevice<Memory>>) -> Result<(), DeviceError> {
        self.add_behind(id, device, false)
    }

    /// Puts `device` on the bus, and behind the IOMMU if `iommu` says so.
    fn add_behind(
        &self,
        id: &str,
        device: Box<dyn VirtioDevice<Memory>>,
        iommu: bool,
    ) -> Result<(), DeviceError> {
        let ram = self.ram.memory().clone();
        #[cfg(feature = "mmio")]
        if let Some(mmio) = self.mmio {
            let memory = EndpointMemory::physical(ram);
            return mmio.add(id, device, memory, self.spawn.clone());
        }
        // Where it will be is its number for the IOMMU. Without a slot the bus says why.
        let slot = self.free_slot();
        let behind = self.iommu.get().filter(|_| iommu);
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
            extra_features: if behind.is_some() {
                feature::ACCESS_PLATFORM
            } else {
                0
            },
        };
        let memory = match (behind, slot) {
            (Some(behind), Some(slot)) => behind.memory(ram, slot),
            _ => EndpointMemory::physical(ram),
        };
        let device = Arc::new(VirtioPciDevice::new(id, device, memory, host)?);
        let slot = self.pci.add(id, slot, device.clone())?;
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
