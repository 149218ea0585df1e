//! The machine's devices: made from the config, put on the buses, told to the guest by ACPI.

mod interrupts;
mod legacy;
mod pci;
mod virtio;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::acpi::AcpiConfig;
use arch::layout;
use devices::acpi::Ged;
use devices::ioapic::Ioapic;
use devices::serial::Serial;
use hypervisor::Vm;
use thiserror::Error;
use vm_allocator::{AddressAllocator, AllocatorError, IdAllocator};
use vm_device::{Bus, BusDevice, BusError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::VmConfig;
use crate::console::Output;
use crate::cpu_manager::ExitRoutes;
use crate::event::EventSender;

use self::interrupts::{IoapicInterrupts, Routing};
use self::pci::Pci;
use self::virtio::{Memory, VirtioHost};

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
    /// A disk cannot be opened.
    #[error("--disk")]
    Disk(#[from] crate::disk::DiskSetupError),
    /// A disk cannot be a block device of the guest.
    #[error("--disk")]
    Block(#[from] virtio_devices::BlockError),
    /// The source of entropy.
    #[error("--rng")]
    Rng(#[from] virtio_devices::RngError),
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
    serial_room: EventFd,
    ged: arch::acpi::Ged,
    pci: Pci,
}

impl DeviceManager {
    /// Makes the devices that `config` asks for. `ram` is the guest's memory, `address_bits` is the width of the guest's physical
    /// addresses, `output` the host's end of COM1.
    pub fn new(
        vm: &Arc<dyn Vm>,
        config: &VmConfig,
        ram: &Memory,
        address_bits: u8,
        output: Option<Output>,
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
        let serial = legacy::serial(config, output, &ioapic, &serial_room)
            .map_err(event_error("serial port"))?;
        if let Some(serial) = &serial {
            place(&ports, "serial port", legacy::COM1, 8, serial.clone())?;
        }
        legacy::fixed(&ports, config.memory.size, events)?;

        let ged = ged(&memory, &ioapic)?;
        let ram_end = layout::ram_regions(config.memory.size)
            .last()
            .map_or(0, |(start, size)| start.0 + size);
        let pci = Pci::new(
            &ports,
            &memory,
            layout::DEVICES_32BIT_START..=REGISTERS_START - 1,
            ram_end,
            1 << address_bits,
        )?;

        VirtioHost::new(vm.clone(), routing, ram.clone(), events)
            .map_err(event_error("virtio devices"))?
            .add_all(&pci, config)?;

        Ok(Self {
            ports,
            memory,
            ioapic,
            serial,
            serial_room,
            ged,
            pci,
        })
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
    }

    /// Types `bytes` at the serial port; how many it took.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        match &self.serial {
            Some(serial) => serial
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .queue_input(bytes),
            // Nobody will ever read them.
            None => bytes.len(),
        }
    }

    /// Readable when the serial port takes input again.
    pub fn serial_room(&self) -> Option<&EventFd> {
        self.serial.is_some().then_some(&self.serial_room)
    }

    /// The serial port's output has room again.
    pub fn serial_output_ready(&self) {
        if let Some(serial) = &self.serial {
            serial
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .output_ready();
        }
    }
}

impl Drop for DeviceManager {
    /// Ends the threads of virtio devices.
    fn drop(&mut self) {
        self.pci.clear();
    }
}

/// Makes the generic event device and tells where it is.
fn ged(memory: &Bus, ioapic: &Arc<Ioapic>) -> Result<arch::acpi::Ged, DeviceError> {
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
    place(
        memory,
        name,
        ged.address,
        arch::acpi::registers::ged::SIZE,
        Arc::new(Mutex::new(Ged::new(line))),
    )?;
    Ok(ged)
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
