//! The small platform devices, with a guest that accesses any register with any width.
//!
//! They are serial port, CMOS, I/O APIC, GED, i8042, ACPI power port and timer, and debug ports.
//!
//! Holds to: no panic; reads fill their data; the serial port sends at most what it was given, in order, and takes no more input than it says;
//! the I/O APIC tells its sink only of changes, and of pins that exist.

#![no_main]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use arbitrary::Arbitrary;
use devices::acpi::{Ged, PmTimer, PowerPort};
use devices::cmos::Cmos;
use devices::debug_port::DebugPort;
use devices::firmware_debug::FirmwareDebug;
use devices::i8042::I8042;
use devices::ioapic::{InterruptSink, Ioapic, Message, PINS};
use devices::serial::Serial;
use libfuzzer_sys::fuzz_target;
use vm_device::{BusDevice, Trigger};

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    clock: u64,
    ram: (u64, u64),
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Device, offset, bytes.
    Read(u8, Offset, u8),
    Write(u8, Offset, &'a [u8]),
    /// One byte, which is what drivers write.
    Out(u8, u8, u8),
    /// Room in the output from now on; nothing is an error.
    Room(Option<u8>),
    Input(&'a [u8]),
    Ready,
    Pin(u8, Pin),
    EndOfInterrupt(u8),
    Notify(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Offset {
    Small(u8),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Pin {
    Pulse,
    Level(bool),
}

/// Most bytes of an access; the bus splits none.
const MOST_BYTES: usize = 32;

/// An output with room for some bytes, then blocked.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<(Vec<u8>, Option<usize>)>>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().expect("one thread");
        let room = state.1.ok_or(io::ErrorKind::BrokenPipe)?;
        let taken = room.min(bytes.len());
        if taken == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.1 = Some(room - taken);
        state.0.extend(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Routes(Mutex<[Option<Message>; PINS as usize]>);

impl InterruptSink for Routes {
    fn send(&self, message: &Message) -> io::Result<()> {
        assert_eq!(
            message.address >> 20,
            0xfee,
            "a message to {:#x}",
            message.address
        );
        Ok(())
    }

    fn route(&self, pin: u8, message: Option<&Message>) {
        let mut routes = self.0.lock().expect("one thread");
        let route = routes.get_mut(usize::from(pin)).expect("a pin that exists");
        assert!(route.as_ref() != message, "told of what is no change");
        *route = message.copied();
    }
}

fn offset(offset: Offset) -> u64 {
    match offset {
        Offset::Small(n) => u64::from(n),
        Offset::Any(n) => n,
    }
}

fuzz_target!(|case: Case<'_>| {
    let triggered = Arc::new(AtomicUsize::new(0));
    let trigger: Arc<dyn Trigger> = Arc::new({
        let triggered = triggered.clone();
        move || -> io::Result<()> {
            triggered.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    });
    let output = Output::default();
    let now = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(case.clock));
    let now = now.unwrap_or(SystemTime::UNIX_EPOCH);
    let serial = Arc::new(Mutex::new(Serial::new(
        trigger.clone(),
        Box::new(output.clone()),
        trigger.clone(),
    )));
    let ioapic = Arc::new(Ioapic::new(Arc::new(Routes::default())));
    let ged = Arc::new(Mutex::new(Ged::new(trigger.clone())));
    let all: [Arc<dyn BusDevice>; 9] = [
        serial.clone(),
        ioapic.clone(),
        ged.clone(),
        Arc::new(Mutex::new(Cmos::new(
            case.ram.0,
            case.ram.1,
            Box::new(move || now),
        ))),
        Arc::new(Mutex::new(I8042::new(trigger.clone()))),
        Arc::new(Mutex::new(PowerPort::new(trigger.clone(), trigger.clone()))),
        Arc::new(Mutex::new(PmTimer::new())),
        Arc::new(Mutex::new(DebugPort::new())),
        Arc::new(Mutex::new(FirmwareDebug::new(Box::new(output.clone())))),
    ];
    let device = |which: u8| &all[usize::from(which) % all.len()];
    let mut written = 0;
    for step in &case.steps {
        fuzz::show(step);
        match step {
            Step::Read(which, at, len) => {
                let mut data = vec![0xa5; usize::from(*len) % (MOST_BYTES + 1)];
                device(*which).read(offset(*at), &mut data);
            }
            Step::Write(which, at, bytes) => {
                let bytes = &bytes[..bytes.len().min(MOST_BYTES)];
                written += bytes.len();
                device(*which).write(offset(*at), bytes);
            }
            Step::Out(which, register, byte) => {
                written += 1;
                device(*which).write(u64::from(*register), &[*byte]);
            }
            Step::Room(room) => {
                output.0.lock().expect("one thread").1 = room.map(usize::from);
            }
            Step::Input(bytes) => {
                let mut serial = serial.lock().expect("one thread");
                let taken = serial.queue_input(bytes);
                assert!(
                    taken <= bytes.len().min(16),
                    "{taken} bytes of {}",
                    bytes.len()
                );
            }
            Step::Ready => serial.lock().expect("one thread").output_ready(),
            Step::Pin(pin, Pin::Pulse) => assert!(ioapic.pulse(*pin).is_ok() == (*pin < PINS)),
            Step::Pin(pin, Pin::Level(level)) => {
                assert!(ioapic.set_level(*pin, *level).is_ok() == (*pin < PINS));
            }
            Step::EndOfInterrupt(vector) => ioapic.end_of_interrupt(*vector),
            Step::Notify(kinds) => {
                let mut data = [0; 4];
                ged.read(0, &mut data);
                ged.lock()
                    .expect("one thread")
                    .notify(*kinds)
                    .expect("it has an interrupt");
                ged.read(0, &mut data);
                assert_eq!(data, [*kinds, 0, 0, 0]);
            }
        }
        let sent = output.0.lock().expect("one thread").0.len();
        assert!(sent <= written, "{sent} bytes sent of {written} written");
    }
});
