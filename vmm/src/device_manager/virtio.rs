//! Virtio devices on the PCI bus, and what the machine gives them: MSI vectors, ioeventfds, threads.

use std::io;
use std::sync::Arc;

use hypervisor::{IoEventAddress, Vm};
use virtio_devices::Rng;
use virtio_devices::transport::pci::{Host, Notifications, VirtioPciDevice};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vm_virtio::{Job, Spawn, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use super::interrupts::{MsiVectors, Routing};
use super::pci::Pci;
use crate::config::VmConfig;
use crate::event::EventSender;
use crate::threads;

/// Guest memory as virtio devices hold it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What every virtio device gets.
pub(super) struct VirtioHost {
    vm: Arc<dyn Vm>,
    routing: Arc<Routing>,
    memory: Memory,
    spawn: Spawn,
}

impl VirtioHost {
    pub(super) fn new(
        vm: Arc<dyn Vm>,
        routing: Arc<Routing>,
        memory: Memory,
        events: &EventSender,
    ) -> io::Result<Self> {
        let events = events.try_clone()?;
        let spawn =
            move |name: String, job: Job| threads::spawn(name, events.try_clone()?, job).map(drop);
        Ok(Self {
            vm,
            routing,
            memory,
            spawn: Arc::new(spawn),
        })
    }

    /// Makes the devices of `config` and puts them on `pci`.
    pub(super) fn add_all(&self, pci: &Pci, config: &VmConfig) -> Result<(), DeviceError> {
        let rng = Rng::open("_rng", &config.rng.src)?;
        self.add(pci, "_rng", Box::new(rng))
    }

    fn add(
        &self,
        pci: &Pci,
        id: &str,
        device: Box<dyn VirtioDevice<Memory>>,
    ) -> Result<(), DeviceError> {
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
        let device = VirtioPciDevice::new(id, device, self.memory.clone(), host)?;
        let slot = pci.add(id, None, Arc::new(device))?;
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
