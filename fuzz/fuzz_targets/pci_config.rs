//! A PCI bus with two functions that have everything, and a guest that writes to configuration space and BARs as it likes.
//!
//! Holds to: no panic; BARs answer only within the bus's windows and where their registers say; a sink is told only of changes, and
//! triggered only where a route is; what is saved and restored is the same.

#![no_main]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pci::{
    BARS, BarKind, Bars, ConfigurationBuilder, ConfigurationSpace, ECAM_SIZE, HostBridge, Identity,
    Msi, MsiMessage, MsiSink, MsixLayout, MsixTable, PciBus, PciConfigIo, PciConfigMmio, PciDevice,
    Windows,
};
use vm_device::{Bus, BusDevice};

#[derive(Arbitrary, Debug)]
enum Step {
    /// Ports 0xcf8 to 0xcff.
    Ports(Access, u8),
    /// A dword of a function through the ports, as drivers do.
    Dword {
        slot: u8,
        register: u8,
        value: Option<u32>,
    },
    Ecam(Access, u32),
    /// Behind a BAR.
    Bar {
        slot: u8,
        bar: u8,
        access: Access,
        offset: u16,
    },
    Memory(Access, u64),
    Trigger {
        slot: u8,
        msix: bool,
        vector: u8,
    },
    Interrupt(u8, bool),
    /// The sink of a slot refuses routes from now on, or no more.
    Refuse(u8, bool),
    Remove(u8),
    Add(u8),
    Refresh,
    Restore(u8),
}

/// So many bytes are read, or these are written.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Access {
    Read(u8),
    Write8(u8),
    Write16(u16),
    Write32(u32),
    Write64(u64),
}

impl Access {
    fn on(self, device: &dyn BusDevice, offset: u64) {
        match self {
            Access::Read(len) => device.read(offset, &mut vec![0; usize::from(len % 17)]),
            Access::Write8(value) => device.write(offset, &value.to_le_bytes()),
            Access::Write16(value) => device.write(offset, &value.to_le_bytes()),
            Access::Write32(value) => device.write(offset, &value.to_le_bytes()),
            Access::Write64(value) => device.write(offset, &value.to_le_bytes()),
        }
    }

    fn on_bus(self, bus: &Bus, address: u64) -> bool {
        match self {
            Access::Read(len) => bus.read(address, &mut vec![0; usize::from(len % 17)]),
            Access::Write8(value) => bus.write(address, &value.to_le_bytes()),
            Access::Write16(value) => bus.write(address, &value.to_le_bytes()),
            Access::Write32(value) => bus.write(address, &value.to_le_bytes()),
            Access::Write64(value) => bus.write(address, &value.to_le_bytes()),
        }
    }
}

/// Knows what it was told.
#[derive(Default)]
struct Sink(Mutex<Told>);

#[derive(Default)]
struct Told {
    routes: BTreeMap<u16, MsiMessage>,
    refuses: bool,
}

impl Sink {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().expect("one thread")
    }
}

impl MsiSink for Sink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let mut told = self.told();
        match message {
            Some(_) if told.refuses => return Err(io::ErrorKind::OutOfMemory.into()),
            Some(message) => {
                let before = told.routes.insert(vector, message);
                assert_ne!(before, Some(message), "told of what is no change");
            }
            None => assert!(
                told.routes.remove(&vector).is_some(),
                "no route to take away"
            ),
        }
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        assert!(
            self.told().routes.contains_key(&vector),
            "vector {vector} has no route"
        );
        Ok(())
    }
}

/// BARs of every kind, MSI, MSI-X, a capability, a pin.
struct Function {
    config: Mutex<ConfigurationSpace>,
    table: Arc<MsixTable>,
    msi: Arc<Msi>,
    sinks: [Arc<Sink>; 2],
    /// Where each BAR is, as the bus told.
    places: Mutex<[Option<u64>; BARS]>,
}

impl Function {
    fn new() -> Arc<Self> {
        let sinks = [Arc::new(Sink::default()), Arc::new(Sink::default())];
        let layout = MsixLayout {
            table_bar: 4,
            table_offset: 0,
            pba_bar: 4,
            pba_offset: 0x800,
        };
        let table = MsixTable::new(5, layout, sinks[0].clone()).expect("a table");
        let msi = Msi::new(4, sinks[1].clone()).expect("vectors");
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_00_00,
            ..Identity::default()
        };
        let mut builder = ConfigurationBuilder::new(identity);
        let bars = [
            (
                0,
                BarKind::Memory32 {
                    prefetchable: false,
                },
                0x1_0000,
            ),
            (1, BarKind::Io, 0x20),
            (2, BarKind::Memory64 { prefetchable: true }, 8 << 30),
            (4, BarKind::Memory32 { prefetchable: true }, 0x1000),
        ];
        for (index, kind, size) in bars {
            builder.bar(index, kind, size).expect("a BAR");
        }
        builder
            .capability(9, &[5, 0xaa, 0xbb], &[0, 0x0f, 0])
            .expect("a capability");
        builder.msix(&table).expect("MSI-X");
        builder.msi(&msi).expect("MSI");
        builder.interrupt_pin(1);
        let config = Mutex::new(builder.build());
        Arc::new(Self {
            config,
            table,
            msi,
            sinks,
            places: Mutex::default(),
        })
    }

    fn config(&self) -> MutexGuard<'_, ConfigurationSpace> {
        self.config.lock().expect("one thread")
    }
}

impl PciDevice for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        assert!(
            usize::from(offset % 4) + data.len() <= 4 && offset < 4096,
            "within a dword"
        );
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        assert!(
            usize::from(offset % 4) + data.len() <= 4 && offset < 4096,
            "within a dword"
        );
        self.config().write(offset, data);
    }

    fn bars(&self) -> Bars {
        self.config().bars()
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.table.read(bar, offset, data);
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        self.table.write(bar, offset, data);
    }

    fn bar_mapped(&self, bar: usize, address: u64) -> io::Result<()> {
        let before = self.places.lock().expect("one thread")[bar].replace(address);
        assert_eq!(before, None, "BAR {bar} is in two places");
        Ok(())
    }

    fn bar_unmapped(&self, bar: usize, address: u64) {
        let before = self.places.lock().expect("one thread")[bar].take();
        assert_eq!(before, Some(address), "BAR {bar} was elsewhere");
    }
}

struct Machine {
    windows: Windows,
    memory: Arc<Bus>,
    bus: Arc<PciBus>,
    ports: PciConfigIo,
    ecam: PciConfigMmio,
    /// In slots 1 and 2, or taken out.
    functions: [Arc<Function>; 2],
}

impl Machine {
    fn new() -> Self {
        let windows = Windows {
            io: Some(0x1000..=0x103f),
            memory32: Some(0xc000_0000..=0xc003_ffff),
            memory64: Some(0x100_0000_0000..=0x107_ffff_ffff),
        };
        let memory = Arc::new(Bus::default());
        let bus = Arc::new(PciBus::new(
            0,
            windows.clone(),
            memory.clone(),
            Arc::new(Bus::default()),
        ));
        let functions = [Function::new(), Function::new()];
        bus.add(Some(0), Arc::new(HostBridge::default()))
            .expect("a host bridge");
        for function in &functions {
            bus.add(None, function.clone())
                .expect("room for two functions");
        }
        let (ports, ecam) = (
            PciConfigIo::new(bus.clone()),
            PciConfigMmio::new(bus.clone()),
        );
        Self {
            windows,
            memory,
            bus,
            ports,
            ecam,
            functions,
        }
    }

    fn step(&self, step: &Step) {
        let function = |slot: u8| (1 + slot % 2, &self.functions[usize::from(slot % 2)]);
        match *step {
            Step::Ports(access, offset) => access.on(&self.ports, u64::from(offset)),
            Step::Dword {
                slot,
                register,
                value,
            } => {
                let (slot, _) = function(slot);
                let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register & 0xfc);
                self.ports.write(0, &address.to_le_bytes());
                match value {
                    Some(value) => self.ports.write(4, &value.to_le_bytes()),
                    None => self.ports.read(4, &mut [0; 4]),
                }
            }
            Step::Ecam(access, offset) => access.on(&self.ecam, u64::from(offset) % ECAM_SIZE),
            Step::Bar {
                slot,
                bar,
                access,
                offset,
            } => {
                let (slot, _) = function(slot);
                if let Some(at) = self.bus.bar_address(slot, usize::from(bar % 6))
                    && bar % 6 != 1
                {
                    access.on_bus(&self.memory, at + u64::from(offset));
                }
            }
            Step::Memory(access, address) => drop(access.on_bus(&self.memory, address)),
            Step::Trigger { slot, msix, vector } => {
                let (_, function) = function(slot);
                let vector = u16::from(vector % 8);
                let _ = if msix {
                    function.table.trigger(vector)
                } else {
                    function.msi.trigger(vector)
                };
            }
            Step::Interrupt(slot, wanted) => drop(function(slot).1.config().set_interrupt(wanted)),
            Step::Refuse(slot, refuses) => {
                for sink in &function(slot).1.sinks {
                    sink.told().refuses = refuses;
                }
            }
            Step::Remove(slot) => {
                let (slot, function) = function(slot);
                let there = self.bus.device(slot).is_some();
                assert_eq!(self.bus.remove(slot).is_ok(), there);
                let places = function.places.lock().expect("one thread");
                assert_eq!(*places, [None; BARS], "it was taken out and still answers");
            }
            Step::Add(slot) => {
                let (slot, function) = function(slot);
                let _ = self.bus.add(Some(slot), function.clone());
            }
            Step::Refresh => self.bus.refresh(),
            Step::Restore(slot) => {
                let (_, function) = function(slot);
                let state = function.config().save();
                let other = Function::new();
                other
                    .config()
                    .restore(&state)
                    .expect("it is the same kind of function");
                let again = other.config().save();
                // What was pending and can be delivered now is delivered.
                assert_eq!(state.registers, again.registers);
            }
        }
    }

    /// BARs are where bus, function and registers agree that they are.
    fn check(&self) {
        for (slot, function) in (1..).zip(&self.functions) {
            let places = *function.places.lock().expect("one thread");
            let bars = function.bars();
            for (index, place) in places.into_iter().enumerate() {
                assert_eq!(
                    self.bus.bar_address(slot, index),
                    place,
                    "slot {slot}, BAR {index}"
                );
                if place.is_some() {
                    let bar = bars[index].expect("what answers is a BAR");
                    assert!(
                        bar.decoded && place == Some(bar.address),
                        "{bar:?} at {place:x?}"
                    );
                    assert!(self.windows.contain(&bar), "{bar:?} is out of the windows");
                }
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let machine = Machine::new();
    for step in &steps {
        fuzz::show(step);
        machine.step(step);
        machine.check();
    }
});
