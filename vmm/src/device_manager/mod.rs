//! The machine's devices: made from the config, put on the buses, told to the guest by ACPI.

mod interrupts;
mod legacy;
mod links;
#[cfg(feature = "mmio")]
mod mmio;
mod pci;
mod pvpanic;
mod virtio;

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use arch::acpi::AcpiConfig;
use arch::layout;
use devices::acpi::Ged;
use devices::ioapic::Ioapic;
use devices::serial::Serial;
use hypervisor::Vm;
use thiserror::Error;
use virtio_devices::transport::pci::VirtioPciDevice;
use virtio_devices::{BalloonControl, BlockControl, ConsoleInput, MemControl};
use vm_allocator::{AddressAllocator, AllocatorError, IdAllocator};
use vm_device::{Bus, BusDevice, BusError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::{ConsoleMode, VmConfig};
use crate::console::{Outputs, TypedInput};
use crate::cpu_manager::ExitRoutes;
use crate::event::EventSender;
use crate::memory_manager::{MemoryManager, MemorySlots};
use crate::pmem::Before;

use self::interrupts::{IoapicInterrupts, Routing};
use self::links::Links;
use self::pci::Pci;
use self::virtio::{ConsoleEnds, VirtioHost};

/// What can go wrong in making devices.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// Two devices want the same place.
    #[error("placing the {name}")]
    Place {
        /// The device.
        name: &'static str,
        /// Why it cannot be there.
        #[source]
        source: BusError,
    },
    /// No address or interrupt is left.
    #[error("finding a place for the {name}")]
    Allocate {
        /// The device.
        name: &'static str,
        /// What ran out.
        #[source]
        source: AllocatorError,
    },
    /// A device cannot be on the PCI bus.
    #[error("putting the {name} on the PCI bus")]
    Pci {
        /// The device.
        name: String,
        /// Why not.
        #[source]
        source: ::pci::PciBusError,
    },
    /// A virtio device cannot be behind its transport.
    #[error(transparent)]
    Transport(#[from] virtio_devices::transport::pci::TransportError),
    /// The same, on memory-mapped registers.
    #[cfg(feature = "mmio")]
    #[error(transparent)]
    Mmio(#[from] virtio_devices::transport::mmio::MmioError),
    /// What an option asks for cannot be had.
    #[error("{option}")]
    Option {
        /// The option, e.g. `--disk`.
        option: &'static str,
        /// What stands in the way.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The VM was made without a device that is to be changed.
    #[error("the VM was started without {0}")]
    Absent(&'static str),
    /// An eventfd could not be had.
    #[error("making the {name}")]
    Event {
        /// The device.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// RAM that the guest started with cannot be taken away.
#[derive(Debug, Error)]
#[error("{wanted} bytes are less than the {least} that the guest started with")]
struct RamSizeError {
    wanted: u64,
    least: u64,
}

impl DeviceError {
    /// Names the option that asked for what failed.
    fn option<E: std::error::Error + Send + Sync + 'static>(
        option: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Option {
            option,
            source: Box::new(source),
        }
    }
}

/// The end of the 32-bit devices' space is for registers that ACPI tells of; the rest is for PCI.
const REGISTERS_SIZE: u64 = 1 << 20;
const REGISTERS_START: u64 =
    layout::DEVICES_32BIT_START + layout::DEVICES_32BIT_SIZE - REGISTERS_SIZE;

/// The devices of one VM, and the buses that lead to them.
pub struct DeviceManager {
    ports: Arc<Bus>,
    memory: Arc<Bus>,
    ioapic: Arc<Ioapic>,
    serial: Option<Arc<Mutex<Serial>>>,
    serial_room: Arc<EventFd>,
    ged: arch::acpi::Ged,
    events: Arc<Mutex<Ged>>,
    virtio: Vec<(u8, Arc<VirtioPciDevice<virtio::Memory>>)>,
    viot: Option<arch::acpi::Viot>,
    disks: BTreeMap<String, BlockControl>,
    pci: Pci,
    #[cfg(feature = "mmio")]
    mmio: mmio::Mmio,
    console: Option<ConsoleEnds>,
    links: Links,
    balloon: Option<BalloonControl>,
    /// The device that adds RAM, and how much the guest starts with.
    mem: Option<MemControl>,
    boot_ram: u64,
    /// As they were, until the machine is sure to start.
    pmem_files: Vec<Before>,
    /// The device that has the terminal.
    typed: Option<Arc<dyn TypedInput>>,
    console_has_terminal: bool,
}

impl DeviceManager {
    /// Makes the devices that `config` asks for. `ram` is the guest's memory, and `slots` are where devices bring more; `window64` is
    /// for 64-bit BARs; `outputs` are the host's ends of its consoles.
    pub fn new(
        vm: &Arc<dyn Vm>,
        config: &VmConfig,
        ram: &MemoryManager,
        slots: &Arc<MemorySlots>,
        window64: Option<RangeInclusive<u64>>,
        outputs: &Outputs,
        events: &EventSender,
    ) -> Result<Self, DeviceError> {
        let ports = Arc::new(Bus::default());
        let memory = Arc::new(Bus::default());
        let routing = Routing::new(vm.clone());
        let ioapic = Arc::new(Ioapic::new(Arc::new(IoapicInterrupts(routing.clone()))));
        place(
            &memory,
            "IOAPIC",
            layout::IOAPIC_START,
            layout::IOAPIC_SIZE,
            ioapic.clone(),
        )?;

        let event_error = |name| move |source| DeviceError::Event { name, source };
        let serial_room =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(event_error("serial port"))?;
        let serial = legacy::serial(config, outputs.serial.clone(), &ioapic, &serial_room)
            .map_err(event_error("serial port"))?;
        if let Some(serial) = &serial {
            place(&ports, "serial port", legacy::COM1, 8, serial.clone())?;
        }
        legacy::fixed(&ports, config.memory.size, events)?;

        let (ged, ged_device) = ged(&memory, &ioapic)?;
        let pci = Pci::new(
            &ports,
            &memory,
            layout::DEVICES_32BIT_START..=REGISTERS_START - 1,
            window64,
        )?;

        let host = VirtioHost::new(vm.clone(), routing, ram, slots, &pci, events)
            .map_err(event_error("virtio devices"))?;
        #[cfg(feature = "mmio")]
        let mmio = mmio::Mmio::new(vm.clone(), memory.clone(), ioapic.clone())?;
        #[cfg(feature = "mmio")]
        let host = host.on_mmio(&mmio);
        let handles = host.add_all(config, outputs)?;

        pvpanic::add(&pci, config, events)?;

        let console_has_terminal = *config.console_mode() == ConsoleMode::Tty;
        let mut manager = Self {
            ports,
            memory,
            ioapic,
            serial,
            serial_room: Arc::new(serial_room),
            ged,
            events: ged_device,
            virtio: handles.devices,
            disks: handles.disks,
            pci,
            #[cfg(feature = "mmio")]
            mmio,
            console: handles.console,
            links: handles.links,
            balloon: handles.balloon,
            mem: handles.mem,
            boot_ram: config.memory.size,
            pmem_files: handles.pmem,
            viot: handles.viot,
            typed: None,
            console_has_terminal,
        };
        if config.serial.mode == ConsoleMode::Tty {
            manager.typed = manager.serial_input();
        } else if console_has_terminal {
            manager.typed = manager.console_input();
        }
        Ok(manager)
    }

    /// Where the exits of vCPUs go.
    pub fn routes(&self) -> ExitRoutes {
        let ioapic = self.ioapic.clone();
        ExitRoutes {
            ports: self.ports.clone(),
            memory: self.memory.clone(),
            end_of_interrupt: Arc::new(move |vector| ioapic.end_of_interrupt(vector)),
        }
    }

    /// Adds what the DSDT says of the devices.
    pub fn describe(&self, acpi: &mut AcpiConfig) {
        acpi.ged = Some(self.ged);
        acpi.serial = self.serial.as_ref().map(|_| legacy::SERIAL);
        acpi.pci = Some(self.pci.describe());
        acpi.viot = self.viot.clone();
        #[cfg(feature = "mmio")]
        acpi.virtio_mmio.extend(self.mmio.describe());
    }

    /// The machine starts: what was done to files of the host stays.
    pub fn keep_files(&mut self) {
        self.pmem_files.drain(..).for_each(Before::keep);
    }

    /// The guest should give up `bytes` of its RAM, a multiple of 4096. It takes its time.
    ///
    /// # Errors
    /// [`DeviceError::Absent`] without a balloon, and [`DeviceError::Option`] where it cannot have that size.
    pub fn resize_balloon(&self, bytes: u64) -> Result<(), DeviceError> {
        let balloon = self
            .balloon
            .as_ref()
            .ok_or(DeviceError::Absent("--balloon"))?;
        balloon
            .resize(bytes)
            .map_err(DeviceError::option("--balloon"))
    }

    /// Bytes of its RAM that the guest has given up; 0 without a balloon.
    pub fn balloon_actual(&self) -> u64 {
        self.balloon.as_ref().map_or(0, BalloonControl::actual)
    }

    /// The guest should have `bytes` of RAM in all: what it starts with, and a multiple of 2 MiB that is added. It takes its time.
    ///
    /// # Errors
    /// [`DeviceError::Absent`] where RAM cannot be added, and [`DeviceError::Option`] where there cannot be so much, or so little.
    pub fn resize_ram(&self, bytes: u64) -> Result<(), DeviceError> {
        let Some(mem) = &self.mem else {
            return Err(DeviceError::Absent(
                "--memory hotplug_method=virtio-mem,hotplug_size=S",
            ));
        };
        match bytes.checked_sub(self.boot_ram) {
            Some(added) => mem.resize(added).map_err(DeviceError::option("--memory")),
            None => Err(DeviceError::option("--memory")(RamSizeError {
                wanted: bytes,
                least: self.boot_ram,
            })),
        }
    }

    /// Bytes of RAM that the guest has: what it started with, and what it has plugged. Those in the balloon count too.
    pub fn ram(&self) -> u64 {
        let added = self.mem.as_ref().map_or(0, MemControl::plugged);
        self.boot_ram.saturating_add(added)
    }

    /// To look at the balloon with, if there is one.
    pub fn balloon(&self) -> Option<&BalloonControl> {
        self.balloon.as_ref()
    }

    /// Stops the workers of virtio devices. One that is lost makes its device want a reset, which is the driver's affair.
    pub fn pause(&self) {
        #[cfg(feature = "mmio")]
        self.mmio.pause();
        for (_, device) in &self.virtio {
            if let Err(e) = device.pause() {
                log::warn!("{}", crate::error_chain(&e));
            }
        }
    }

    /// Lets them work again, where their drivers had them working.
    ///
    /// # Errors
    /// The first that cannot; the others do.
    pub fn resume(&self) -> Result<(), DeviceError> {
        #[cfg(feature = "mmio")]
        self.mmio.resume()?;
        let resumed = self.virtio.iter().map(|(_, device)| device.resume());
        // All of them, and then the first error.
        let failed = resumed.filter_map(Result::err).collect::<Vec<_>>();
        failed.into_iter().next().map_or(Ok(()), |e| Err(e.into()))
    }

    /// Ids and PCI slots of virtio devices.
    pub fn on_pci(&self) -> impl Iterator<Item = (&str, u8)> {
        self.virtio
            .iter()
            .map(|(slot, device)| (device.id(), *slot))
    }

    /// What changes the disk `id`.
    pub fn disk(&self, id: &str) -> Option<&BlockControl> {
        self.disks.get(id)
    }

    /// Presses the power button of ACPI.
    ///
    /// # Errors
    /// The interrupt's.
    pub fn press_power_button(&self) -> io::Result<()> {
        lock(&self.events).notify(arch::acpi::registers::ged::POWER_BUTTON)
    }

    /// Types `bytes` at the console that has the terminal; how many it took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        match &self.typed {
            Some(device) => device.type_in(bytes),
            // Nobody will ever read them.
            None => bytes.len(),
        }
    }

    /// The serial port, for a client of its own.
    pub fn serial_input(&self) -> Option<Arc<dyn TypedInput>> {
        let serial = self.serial.clone()?;
        Some(Arc::new(SerialInput {
            serial,
            room: self.serial_room.clone(),
        }))
    }

    /// The console, for a client of its own.
    pub fn console_input(&self) -> Option<Arc<dyn TypedInput>> {
        Some(Arc::new(VirtioInput(self.console.as_ref()?.input.clone())))
    }

    /// Readable when that console takes input again.
    pub fn input_room(&self) -> Option<&EventFd> {
        self.typed.as_deref().map(TypedInput::room)
    }

    /// An output has room again.
    pub fn output_ready(&self) {
        if let Some(serial) = &self.serial {
            lock(serial).output_ready();
        }
        if let Some(console) = &self.console {
            console.input.output_ready();
        }
    }

    /// Readable when the link of a network device may have changed.
    pub fn links(&self) -> Option<RawFd> {
        self.links.fd()
    }

    /// Tells drivers whether there is a link.
    pub fn follow_links(&self) {
        self.links.follow();
    }

    /// The terminal has so many columns and rows now.
    pub fn resize_terminal(&self, (columns, rows): (u16, u16)) {
        if let (true, Some(console)) = (self.console_has_terminal, &self.console) {
            console.handle.resize(columns, rows);
        }
    }
}

/// The serial port, for what is typed.
struct SerialInput {
    serial: Arc<Mutex<Serial>>,
    room: Arc<EventFd>,
}

impl TypedInput for SerialInput {
    fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).queue_input(bytes)
    }

    fn room(&self) -> &EventFd {
        &self.room
    }
}

/// The virtio console, for what is typed.
struct VirtioInput(Arc<ConsoleInput>);

impl TypedInput for VirtioInput {
    fn type_in(&self, bytes: &[u8]) -> usize {
        self.0.push(bytes)
    }

    fn room(&self) -> &EventFd {
        self.0.room()
    }
}

fn lock<T>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for DeviceManager {
    /// Ends the threads of virtio devices.
    fn drop(&mut self) {
        self.pci.clear();
        #[cfg(feature = "mmio")]
        self.mmio.clear();
    }
}

/// Makes the generic event device and tells where it is.
fn ged(
    memory: &Bus,
    ioapic: &Arc<Ioapic>,
) -> Result<(arch::acpi::Ged, Arc<Mutex<Ged>>), DeviceError> {
    let name = "generic event device";
    let allocate = |source| DeviceError::Allocate { name, source };
    let mut registers = AddressAllocator::new(REGISTERS_START, REGISTERS_SIZE).map_err(allocate)?;
    // Below are the ISA interrupts, which have their places.
    let last_pin = u32::from(devices::ioapic::PINS) - 1;
    let mut pins = IdAllocator::new(legacy::FIRST_FREE_PIN, last_pin);
    let ged = arch::acpi::Ged {
        address: registers
            .allocate(arch::acpi::registers::ged::SIZE, 0x1000)
            .map_err(allocate)?,
        gsi: pins.allocate().map_err(allocate)?,
    };
    let line = ioapic.line(u8::try_from(ged.gsi).unwrap_or(u8::MAX));
    let device = Arc::new(Mutex::new(Ged::new(line)));
    place(
        memory,
        name,
        ged.address,
        arch::acpi::registers::ged::SIZE,
        device.clone(),
    )?;
    Ok((ged, device))
}

fn place(
    bus: &Bus,
    name: &'static str,
    base: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
) -> Result<(), DeviceError> {
    bus.insert(base, size, device)
        .map_err(|source| DeviceError::Place { name, source })
}
