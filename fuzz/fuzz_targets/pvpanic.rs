//! pvpanic on its PCI bus, with a guest that accesses its register and its configuration space in any way, and moves its BAR.
//!
//! Holds to: no panic; an access tells of each event that it has at the register and of no other, once, whether the host takes
//! it or not; the register reads as the two events of the specification and all else as 0; configuration space changes only
//! where it may; the BAR answers where its registers say and nowhere else; a device that was saved goes on as it was.

#![no_main]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arbitrary::Arbitrary;
use devices::pvpanic::Pvpanic;
use libfuzzer_sys::fuzz_target;
use pci::{HostBridge, PciBus, PciConfigIo, PciConfigMmio, PciDevice, Windows};
use vm_device::{Bus, BusDevice, Trigger};

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// The register, as drivers do.
    Event(u8),
    /// Beside the start of the BAR, where that answers.
    Near(i16, Access<'a>),
    Memory(u64, Access<'a>),
    /// Past the bus: any BAR, any offset.
    Direct(u8, u64, Access<'a>),
    /// A register through the ports, some of it.
    Ports(u8, Access<'a>),
    /// The memory of configuration space: slot and function, register.
    Ecam(Place, u16, Access<'a>),
    /// To this page of the window or past its end, and whether it answers.
    Move(u8, bool),
    /// The host takes no more of an event, or does again.
    Refuse(bool, bool),
    /// Another device becomes what this one was, and takes its place.
    Restore,
    /// It is asked to become what it was but for these bits at an offset.
    Spoiled(u8, u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Own,
    /// Bus, device and function as bits 27:12 have them.
    Any(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Access<'a> {
    Read(u8),
    Write(&'a [u8]),
    /// One byte, which is what drivers write.
    Byte(u8),
}

/// Most bytes of an access; the bus splits none.
const MOST_BYTES: usize = 32;

impl Access<'_> {
    /// The same, of so many bytes at most.
    fn within(self, most: usize) -> Self {
        match self {
            Self::Read(len) => Self::Read((usize::from(len) % (most + 1)) as u8),
            Self::Write(bytes) => Self::Write(&bytes[..bytes.len().min(most)]),
            Self::Byte(value) => Self::Byte(value),
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Read(len) => usize::from(len),
            Self::Write(bytes) => bytes.len(),
            Self::Byte(_) => 1,
        }
    }
}

const SLOT: u8 = 1;
const BAR_SIZE: u64 = 0x1000;
const WINDOW: u64 = 0xc000_0000;
const WINDOW_PAGES: u64 = 16;
/// Both events of the specification that the device is for.
const EVENTS: u8 = 3;

/// Registers of the header by PCI Local Bus 3.0, 6.1: offset, what they start as, bits that can be written.
const REGISTERS: [(usize, [u8; 4], [u8; 4]); 5] = [
    (0x00, [0x36, 0x1b, 0x11, 0x00], [0; 4]),
    // Memory, bus master, parity, SERR, no INTx.
    (0x04, [0; 4], [0x46, 0x05, 0, 0]),
    (0x08, [0x01, 0x00, 0x80, 0x08], [0; 4]),
    (0x0c, [0; 4], [0xff, 0xff, 0, 0]),
    (0x3c, [0; 4], [0xff, 0, 0, 0]),
];
/// Bits of errors in the status, which go when 1 is written.
const STATUS: usize = 6;
const STATUS_CLEARS: u8 = 0xf9;
const STATUS_INTERRUPT: u8 = 8;
const BAR0: usize = 0x10;
const COMMAND_MEMORY: u8 = 2;

/// One event, as the host sees it.
#[derive(Default)]
struct Told {
    times: AtomicUsize,
    refuses: AtomicBool,
}

impl Trigger for Told {
    fn trigger(&self) -> io::Result<()> {
        self.times.fetch_add(1, Ordering::Relaxed);
        match self.refuses.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(()),
        }
    }
}

/// What configuration space must have.
struct Model {
    bytes: [u8; 256],
    writable: [u8; 256],
}

impl Model {
    fn new() -> Self {
        let (mut bytes, mut writable) = ([0; 256], [0; 256]);
        for (at, value, mask) in REGISTERS {
            bytes[at..at + 4].copy_from_slice(&value);
            writable[at..at + 4].copy_from_slice(&mask);
        }
        writable[BAR0..BAR0 + 4].copy_from_slice(&[0, 0xf0, 0xff, 0xff]);
        Self { bytes, writable }
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        for (at, new) in (at..256).zip(data) {
            let writable = self.writable[at];
            self.bytes[at] = self.bytes[at] & !writable | new & writable;
            if at == STATUS + 1 {
                self.bytes[at] &= !(new & STATUS_CLEARS);
            }
        }
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let byte = |at| self.bytes.get(at).copied().unwrap_or(0);
        (at..at + len).map(byte).collect()
    }

    /// Whether a state may differ from this in these bits.
    fn may_change(&self, at: usize, bits: u8) -> bool {
        let status = match at {
            STATUS => STATUS_INTERRUPT,
            7 => STATUS_CLEARS,
            _ => 0,
        };
        bits & !(self.writable[at] | status) == 0
    }

    fn address(&self) -> u64 {
        let bytes = std::array::from_fn(|at| self.bytes[BAR0 + at]);
        u64::from(u32::from_le_bytes(bytes))
    }

    /// Where the BAR answers.
    fn place(&self) -> Option<u64> {
        let end = WINDOW + WINDOW_PAGES * BAR_SIZE;
        let decoded = self.bytes[4] & COMMAND_MEMORY != 0;
        Some(self.address()).filter(|at| decoded && (WINDOW..end).contains(at))
    }
}

/// What an access must have done.
enum Expected {
    /// The device was at this offset.
    Bar(bool, u64),
    /// Configuration space, or one that isn't there.
    Config(Option<usize>),
    Nothing,
}

struct Machine {
    memory: Arc<Bus>,
    bus: Arc<PciBus>,
    ports: PciConfigIo,
    ecam: PciConfigMmio,
    events: [Arc<Told>; 2],
    device: Arc<Pvpanic>,
    model: Model,
}

fn device(events: &[Arc<Told>; 2]) -> Arc<Pvpanic> {
    let [panicked, crash_loaded] = events;
    Arc::new(Pvpanic::new(panicked.clone(), crash_loaded.clone()).expect("its BAR is good"))
}

impl Machine {
    fn new() -> Self {
        let memory = Arc::new(Bus::default());
        let windows = Windows {
            io: None,
            memory32: Some(WINDOW..=WINDOW + WINDOW_PAGES * BAR_SIZE - 1),
            memory64: None,
        };
        let ports = Arc::new(Bus::default());
        let bus = Arc::new(PciBus::new(0, windows, memory.clone(), ports));
        bus.add(Some(0), Arc::new(HostBridge::default()))
            .expect("a host bridge");
        let events = [Arc::default(), Arc::default()];
        let mut machine = Self {
            memory,
            ports: PciConfigIo::new(bus.clone()),
            ecam: PciConfigMmio::new(bus.clone()),
            bus,
            device: device(&events),
            events,
            model: Model::new(),
        };
        machine.add(machine.device.clone());
        machine
    }

    /// The bus gives it an address if it has none.
    fn add(&mut self, device: Arc<Pvpanic>) {
        self.device = device;
        let slot = self.bus.add(None, self.device.clone());
        assert_eq!(slot.expect("room for a device"), SLOT);
        if self.model.address() == 0 {
            let bar = self.device.bars()[0].expect("its BAR");
            assert!((WINDOW..WINDOW + WINDOW_PAGES * BAR_SIZE).contains(&bar.address));
            self.model.write(BAR0, &bar.address.to_le_bytes()[..4]);
        }
    }

    /// Does an access by `read` or `write`, which say whether something was there, and checks what it did.
    fn access(
        &mut self,
        access: Access<'_>,
        expected: Expected,
        read: impl FnOnce(&Self, &mut [u8]) -> bool,
        write: impl FnOnce(&Self, &[u8]) -> bool,
    ) {
        let byte;
        let (there, len, written) = match access {
            Access::Read(len) => {
                let mut data = vec![0xa5; usize::from(len)];
                let there = read(self, &mut data);
                let good = match expected {
                    Expected::Bar(register, offset) => {
                        let event = |at: usize| register && offset == 0 && at == 0;
                        let byte = |at| if event(at) { EVENTS } else { 0 };
                        (0..data.len()).map(byte).collect()
                    }
                    Expected::Config(Some(at)) => self.model.read(at, data.len()),
                    Expected::Config(None) => vec![0xff; data.len()],
                    Expected::Nothing => vec![0xa5; data.len()],
                };
                assert_eq!(data, good);
                (there, data.len(), &[][..])
            }
            Access::Write(bytes) => (write(self, bytes), bytes.len(), bytes),
            Access::Byte(value) => {
                byte = [value];
                (write(self, &byte), 1, &byte[..])
            }
        };
        let mut events = 0;
        match expected {
            Expected::Bar(true, 0) => events = written.first().copied().unwrap_or(0),
            Expected::Config(Some(at)) => self.model.write(at, written),
            _ => {}
        }
        assert_eq!(there, !matches!(expected, Expected::Nothing), "{len} bytes");
        self.told(events);
    }

    /// Each event of `events` was told once, and no other.
    fn told(&self, events: u8) {
        for (bit, told) in self.events.iter().enumerate() {
            let times = told.times.swap(0, Ordering::Relaxed);
            assert_eq!(times, usize::from(events >> bit & 1), "event {bit}");
        }
    }

    fn memory(&mut self, address: u64, access: Access<'_>) {
        let access = access.within(MOST_BYTES);
        let len = access.len() as u64;
        let offset = self
            .model
            .place()
            .and_then(|place| address.checked_sub(place));
        let expected = match offset {
            Some(offset) if len > 0 && offset < BAR_SIZE && offset + len <= BAR_SIZE => {
                Expected::Bar(true, offset)
            }
            _ => Expected::Nothing,
        };
        self.access(
            access,
            expected,
            |machine, data| machine.memory.read(address, data),
            |machine, data| machine.memory.write(address, data),
        );
    }

    fn ports(&mut self, register: u8, access: Access<'_>) {
        let dword = register & 0xfc;
        let address = 1 << 31 | u32::from(SLOT) << 11 | u32::from(dword);
        self.ports.write(0, &address.to_le_bytes());
        let byte = register & 3;
        let at = 4 + u64::from(byte);
        let width = 4 - usize::from(byte);
        self.access(
            access.within(width),
            Expected::Config(Some(usize::from(register))),
            |machine, data| {
                machine.ports.read(at, data);
                true
            },
            |machine, data| {
                machine.ports.write(at, data);
                true
            },
        );
    }

    fn ecam(&mut self, place: Place, register: u16, access: Access<'_>) {
        let function = match place {
            Place::Own => u16::from(SLOT) << 3,
            Place::Any(function) => function,
        };
        let register = register % 4096;
        let access = access.within(MOST_BYTES);
        let inside = usize::from(register) + access.len() <= 4096;
        let own = function == u16::from(SLOT) << 3;
        let at = u64::from(function) << 12 | u64::from(register);
        if function == 0 && inside {
            // The host bridge's, which `pci_config` is about; the device hears nothing of it.
            if let Access::Byte(value) = access {
                self.ecam.write(at, &[value]);
            }
            self.told(0);
            return;
        }
        self.access(
            access,
            Expected::Config((own && inside).then_some(usize::from(register))),
            |machine, data| {
                machine.ecam.read(at, data);
                true
            },
            |machine, data| {
                machine.ecam.write(at, data);
                true
            },
        );
    }

    fn step(&mut self, step: &Step<'_>) {
        match *step {
            Step::Event(events) => {
                if let Some(place) = self.model.place() {
                    self.memory(place, Access::Read(1));
                    self.memory(place, Access::Byte(events));
                }
            }
            Step::Near(beside, access) => {
                let place = self.model.place().unwrap_or(WINDOW);
                self.memory(place.wrapping_add_signed(i64::from(beside)), access);
            }
            Step::Memory(address, access) => self.memory(address, access),
            Step::Direct(bar, offset, access) => {
                let bar = usize::from(bar);
                self.access(
                    access.within(MOST_BYTES),
                    Expected::Bar(bar == 0, offset),
                    |machine, data| {
                        machine.device.read_bar(bar, offset, data);
                        true
                    },
                    |machine, data| {
                        machine.device.write_bar(bar, offset, data);
                        true
                    },
                );
            }
            Step::Ports(register, access) => self.ports(register, access),
            Step::Ecam(place, register, access) => self.ecam(place, register, access),
            Step::Move(page, answers) => {
                let address = WINDOW + u64::from(page) % (WINDOW_PAGES + 4) * BAR_SIZE;
                let command = [u8::from(answers) * COMMAND_MEMORY, 0];
                self.ecam(Place::Own, 4, Access::Write(&command));
                let bytes = address.to_le_bytes();
                self.ecam(Place::Own, BAR0 as u16, Access::Write(&bytes[..4]));
            }
            Step::Refuse(panicked, crash_loaded) => {
                for (told, refuses) in self.events.iter().zip([panicked, crash_loaded]) {
                    told.refuses.store(refuses, Ordering::Relaxed);
                }
            }
            Step::Restore => {
                let state = self.device.save();
                assert_eq!(state.registers, self.model.bytes);
                let other = device(&self.events);
                other.restore(&state).expect("it is the same kind");
                self.bus.remove(SLOT).expect("it is there");
                self.add(other);
                self.told(0);
            }
            Step::Spoiled(at, bits) => {
                let mut state = self.device.save();
                let at = usize::from(at);
                state.registers[at] ^= bits;
                let taken = self.device.restore(&state).is_ok();
                assert_eq!(taken, self.model.may_change(at, bits), "{at:#x} {bits:#x}");
                if taken {
                    self.model.bytes[at] ^= bits;
                }
                self.bus.refresh();
                self.told(0);
            }
        }
    }

    /// The bus, the device and the model agree.
    fn check(&self) {
        let mut registers = [0; 256];
        self.bus.read_config(SLOT, 0, 0, &mut registers);
        assert_eq!(registers, self.model.bytes);
        assert_eq!(self.bus.bar_address(SLOT, 0), self.model.place());
        for bar in 1..6 {
            assert_eq!(self.bus.bar_address(SLOT, bar), None);
        }
    }
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let mut machine = Machine::new();
    for step in &steps {
        fuzz::show(step);
        machine.step(step);
        machine.check();
    }
    // After all of that a guest can tell what happened.
    machine.step(&Step::Move(3, true));
    machine.step(&Step::Event(EVENTS));
});
