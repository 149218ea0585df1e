//! Virtio devices on the PCI bus, and what the machine gives them: MSI vectors, ioeventfds, threads.

use std::io;
use std::sync::Arc;

use block_util::Engine;
use hypervisor::{IoEventAddress, Vm};
use virtio_devices::transport::pci::{Host, Notifications, VirtioPciDevice};
use virtio_devices::{
    Block, BlockConfig, Console, ConsoleHandle, ConsoleInput, Net, NetConfig as NetDevice, Rng,
    SERIAL_LEN,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vm_virtio::{Job, Spawn, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use super::interrupts::{MsiVectors, Routing};
use super::pci::Pci;
use crate::config::{ConsoleMode, DiskConfig, NetConfig, VmConfig};
use crate::console::{Output, terminal};
use crate::event::EventSender;
use crate::threads;
use crate::{disk, tap};

/// Guest memory as virtio devices hold it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The host's ends of the console.
pub(super) struct ConsoleEnds {
    pub(super) input: Arc<ConsoleInput>,
    pub(super) handle: ConsoleHandle,
}

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

    /// Makes the devices of `config` and puts them on `pci`. `output` is the host's end of the
    /// console.
    pub(super) fn add_all(
        &self,
        pci: &Pci,
        config: &VmConfig,
        output: Option<Output>,
    ) -> Result<Option<ConsoleEnds>, DeviceError> {
        for (index, disk) in config.disks.iter().enumerate() {
            let id = disk.id.clone().unwrap_or_else(|| format!("_disk{index}"));
            self.add(pci, &id, Box::new(block(&id, disk)?))?;
        }
        for (index, net) in config.net.iter().enumerate() {
            let id = net.id.clone().unwrap_or_else(|| format!("_net{index}"));
            self.add(pci, &id, Box::new(network(&id, net)?))?;
        }
        let rng = Rng::open("_rng", &config.rng.src)?;
        self.add(pci, "_rng", Box::new(rng))?;
        if *config.console_mode() == ConsoleMode::Off {
            return Ok(None);
        }
        self.add_console(pci, config.console_mode(), output)
            .map(Some)
    }

    fn add_console(
        &self,
        pci: &Pci,
        mode: &ConsoleMode,
        output: Option<Output>,
    ) -> Result<ConsoleEnds, DeviceError> {
        let input = ConsoleInput::new().map_err(|source| DeviceError::Event {
            name: "console",
            source,
        })?;
        let output: Box<dyn io::Write + Send> = match output {
            Some(output) => Box::new(output),
            None => Box::new(io::sink()),
        };
        let size = match mode {
            ConsoleMode::Tty => terminal::size(),
            _ => (0, 0),
        };
        let console = Console::new("_console", output, input.clone(), size)?;
        let handle = console.handle();
        self.add(pci, "_console", Box::new(console))?;
        Ok(ConsoleEnds { input, handle })
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

/// A block device on the disk of `config`, which is opened and locked.
fn block(id: &str, config: &DiskConfig) -> Result<Block<Memory>, DeviceError> {
    let disk = disk::open(config)?;
    let block = BlockConfig {
        id: id.to_owned(),
        queues: config.num_queues,
        queue_size: config.queue_size,
        // Without one of its own a disk is known by its name.
        serial: config.serial.clone().unwrap_or_else(|| {
            id.bytes()
                .filter(u8::is_ascii_graphic)
                .take(SERIAL_LEN)
                .map(char::from)
                .collect()
        }),
        engine: Engine::Auto,
    };
    Ok(Block::new(block, disk)?)
}

/// A network device on the tap of `config`, which is opened or made.
fn network(id: &str, config: &NetConfig) -> Result<Net<Memory>, DeviceError> {
    let tap = tap::open(config)?;
    let net = NetDevice {
        id: id.to_owned(),
        mac: tap::guest_mac(config)?,
        mtu: config.mtu,
        queue_pairs: config.num_queues / 2,
        queue_size: config.queue_size,
    };
    Ok(Net::new(net, tap)?)
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
