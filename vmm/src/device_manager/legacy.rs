//! Devices of the PC with a fixed place: COM1, CMOS, i8042, debug ports, ACPI ports.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use arch::{acpi, layout};
use devices::acpi::{PmTimer, PowerPort};
use devices::cmos::Cmos;
use devices::debug_port::DebugPort;
use devices::i8042::I8042;
use devices::ioapic::Ioapic;
use devices::serial::Serial;
use vm_device::{Bus, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceError, place};
use crate::config::{ConsoleMode, VmConfig};
use crate::console::Output;
use crate::event::{Event, EventSender};

/// First port of COM1.
pub(super) const COM1: u64 = 0x3f8;
/// COM1 as the DSDT tells it.
pub(super) const SERIAL: acpi::Serial = acpi::Serial {
    port: 0x3f8,
    irq: 4,
};
/// First IOAPIC pin that no ISA device has.
pub(super) const FIRST_FREE_PIN: u32 = 5;

const I8042: u64 = 0x61;
const CMOS: u64 = 0x70;
const DEBUG: u64 = 0x80;
#[cfg(feature = "firmware-debug")]
const FIRMWARE_DEBUG: u64 = 0x402;

/// COM1, unless it is off.
pub(super) fn serial(
    config: &VmConfig,
    output: Option<Output>,
    ioapic: &Arc<Ioapic>,
    room: &EventFd,
) -> io::Result<Option<Arc<Mutex<Serial>>>> {
    if config.serial.mode == ConsoleMode::Off {
        return Ok(None);
    }
    let sink: Box<dyn io::Write + Send> = match output {
        Some(output) => Box::new(output),
        None => Box::new(io::sink()),
    };
    let serial = Serial::new(ioapic.line(SERIAL.irq), sink, Arc::new(room.try_clone()?));
    Ok(Some(Arc::new(Mutex::new(serial))))
}

/// Everything else.
pub(super) fn fixed(ports: &Bus, ram: u64, events: &EventSender) -> Result<(), DeviceError> {
    let trigger = |name, event: Event| -> Result<Arc<dyn Trigger>, DeviceError> {
        let events = events
            .try_clone()
            .map_err(|source| DeviceError::Event { name, source })?;
        Ok(Arc::new(move || {
            events.send(event.clone());
            Ok(())
        }))
    };

    let reset = trigger("i8042", Event::GuestReset)?;
    place(
        ports,
        "i8042",
        I8042,
        4,
        Arc::new(Mutex::new(I8042::new(reset))),
    )?;

    let below_4g = ram.min(layout::RAM_32BIT_END);
    let cmos = Cmos::new(below_4g, ram - below_4g, Box::new(SystemTime::now));
    place(ports, "CMOS", CMOS, 2, Arc::new(Mutex::new(cmos)))?;

    place(
        ports,
        "debug port",
        DEBUG,
        1,
        Arc::new(Mutex::new(DebugPort::new())),
    )?;
    #[cfg(feature = "firmware-debug")]
    {
        let port = devices::firmware_debug::FirmwareDebug::new(Box::new(io::stderr()));
        place(
            ports,
            "firmware debug port",
            FIRMWARE_DEBUG,
            1,
            Arc::new(Mutex::new(port)),
        )?;
    }

    let power = PowerPort::new(
        trigger("ACPI power port", Event::GuestShutdown)?,
        trigger("ACPI power port", Event::GuestReset)?,
    );
    place(
        ports,
        "ACPI power port",
        acpi::RESET_PORT.into(),
        1,
        Arc::new(Mutex::new(power)),
    )?;
    place(
        ports,
        "ACPI timer",
        acpi::PM_TIMER_PORT.into(),
        4,
        Arc::new(Mutex::new(PmTimer::new())),
    )
}
