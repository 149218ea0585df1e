//! The I/O APIC (Intel 82093AA data sheet, May 1996; version 0x20 with the EOI register of Intel's later chipsets, e.g.
//! ICH9 data sheet, "EOI Register") for local APICs that take interrupts as messages.
//!
//! * An edge on a masked pin is lost (82093AA §3.2.4, "Interrupt Mask"). Drivers enable the interrupt in their
//!   device after the pin, and the device then gives a new edge.
//! * A level-triggered pin sends one message and sets its remote IRR. At the end of the interrupt it sends another if
//!   the line is still asserted.
//!
//! ```text
//!            asserted, unmasked: send
//!   idle ------------------------------> remote IRR set --+ end of interrupt, still asserted: send
//!     ^                                    |         ^    |
//!     +------------------------------------+         +----+
//!       end of interrupt; made edge-triggered
//! ```

mod entry;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_device::{BusDevice, Trigger};

use entry::Entry;

/// Pins, numbered from 0.
pub const PINS: u8 = 24;

/// Offsets of the registers in memory (82093AA §3.1).
mod register {
    /// Index of the register in the window.
    pub const SELECT: u64 = 0;
    pub const WINDOW: u64 = 0x10;
    /// Write: the vector whose interrupt ended.
    pub const END_OF_INTERRUPT: u64 = 0x40;
}

/// Indices of the registers in the window (82093AA §3.2).
mod index {
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    /// Low half of the first redirection entry; the halves alternate.
    pub const ENTRIES: u8 = 0x10;
}

/// With an EOI register.
const VERSION: u32 = 0x20;
/// The bits of ID and arbitration id that exist.
const ID_MASK: u32 = 0xf << 24;

/// A message-signalled interrupt (Intel SDM volume 3, §11.11).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// Where it is written: destination and destination mode.
    pub address: u64,
    /// What is written: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Where an [`Ioapic`] sends its interrupts. It must not call the I/O APIC from inside.
pub trait InterruptSink: Send + Sync {
    /// Delivers a message now. An error goes to whoever raised the interrupt, if there is one.
    fn send(&self, message: &Message) -> io::Result<()>;

    /// The message that `pin` sends became another, or none. Called for level-triggered pins alone, while they are
    /// unmasked or an interrupt of theirs has not ended: those whose end is to be told with
    /// [`end_of_interrupt`](Ioapic::end_of_interrupt).
    fn route(&self, pin: u8, message: Option<&Message>);
}

/// An I/O APIC with 24 pins. As a bus device it covers 0x44 bytes or more from its base address.
pub struct Ioapic {
    sink: Arc<dyn InterruptSink>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    select: u8,
    id: u32,
    pins: [Pin; PINS as usize],
}

#[derive(Clone, Copy, Default)]
struct Pin {
    entry: Entry,
    /// The line is asserted.
    asserted: bool,
    /// What the sink was last told of this pin.
    route: Option<Message>,
}

impl Ioapic {
    /// An I/O APIC after reset: every pin masked.
    #[must_use]
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self {
            sink,
            state: Mutex::default(),
        }
    }

    /// An edge on `pin`: asserted, then as before. Errors where there is no such pin, or as the sink says.
    pub fn pulse(&self, pin: u8) -> io::Result<()> {
        self.change(pin, |pin| {
            let before = std::mem::replace(&mut pin.asserted, true);
            (true, before)
        })
    }

    /// Asserts `pin`, or ends that. Errors as for [`pulse`](Self::pulse).
    pub fn set_level(&self, pin: u8, asserted: bool) -> io::Result<()> {
        self.change(pin, |pin| {
            let before = std::mem::replace(&mut pin.asserted, asserted);
            (asserted && !before, asserted)
        })
    }

    /// An interrupt with `vector` ended at a local APIC.
    pub fn end_of_interrupt(&self, vector: u8) {
        self.end(&mut self.lock(), vector);
    }

    /// `pin` as the interrupt line of a device, edge-triggered.
    #[must_use]
    pub fn line(self: &Arc<Self>, pin: u8) -> Arc<dyn Trigger> {
        let ioapic = self.clone();
        Arc::new(move || ioapic.pulse(pin))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a pin's line by `change`, which says whether that is an edge and what the line is in the end.
    fn change(&self, number: u8, change: impl FnOnce(&mut Pin) -> (bool, bool)) -> io::Result<()> {
        let mut state = self.lock();
        let pin = state.pins.get_mut(usize::from(number)).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the I/O APIC has no pin {number}"),
            )
        })?;
        let (edge, after) = change(pin);
        let sent = if pin.entry.level_triggered() {
            self.deliver_level(pin)
        } else if edge && !pin.entry.masked() {
            self.sink.send(&pin.entry.message())
        } else {
            Ok(())
        };
        pin.asserted = after;
        self.announce(number, pin);
        sent
    }

    /// Sends a level-triggered pin's message if it is due.
    fn deliver_level(&self, pin: &mut Pin) -> io::Result<()> {
        let entry = &mut pin.entry;
        if !pin.asserted || !entry.level_triggered() || entry.masked() || entry.remote_irr() {
            return Ok(());
        }
        entry.set_remote_irr(true);
        self.sink.send(&entry.message())
    }

    /// As [`deliver_level`](Self::deliver_level) where nobody hears of an error.
    fn redeliver(&self, number: u8, pin: &mut Pin) {
        if let Err(e) = self.deliver_level(pin) {
            log::debug!("I/O APIC: interrupt of pin {number} lost: {e}");
        }
    }

    /// Tells the sink of the pin's route if it changed.
    fn announce(&self, number: u8, pin: &mut Pin) {
        let entry = &pin.entry;
        let wanted = entry.level_triggered() && (!entry.masked() || entry.remote_irr());
        let route = wanted.then(|| entry.message());
        if route != pin.route {
            pin.route = route;
            self.sink.route(number, route.as_ref());
        }
    }

    fn end(&self, state: &mut State, vector: u8) {
        for (number, pin) in (0..).zip(&mut state.pins) {
            let entry = &mut pin.entry;
            if entry.level_triggered() && entry.remote_irr() && entry.vector() == vector {
                entry.set_remote_irr(false);
                self.redeliver(number, pin);
                self.announce(number, pin);
            }
        }
    }

    fn write_window(&self, state: &mut State, value: u32) {
        if state.select == index::ID {
            state.id = value & ID_MASK;
            return;
        }
        let Some((number, high)) = half(state.select) else {
            return;
        };
        if let Some(pin) = state.pins.get_mut(usize::from(number)) {
            if high {
                pin.entry.write_high(value);
            } else {
                pin.entry.write_low(value);
            }
            // First the route: the sink may need it to hear of the end of what is sent next.
            self.announce(number, pin);
            self.redeliver(number, pin);
        }
    }
}

impl State {
    fn read_window(&self) -> u32 {
        match self.select {
            // The arbitration id is loaded with the id, and there is no bus to arbitrate.
            index::ID | index::ARBITRATION => self.id,
            index::VERSION => VERSION | u32::from(PINS - 1) << 16,
            select => half(select)
                .and_then(|(number, high)| {
                    let entry = self.pins.get(usize::from(number))?.entry;
                    Some(if high { entry.high() } else { entry.low() })
                })
                .unwrap_or(0),
        }
    }
}

/// The pin whose entry `select` is in, and whether it is its high half.
fn half(select: u8) -> Option<(u8, bool)> {
    let from_first = select.checked_sub(index::ENTRIES)?;
    Some((from_first / 2, from_first % 2 == 1))
}

impl BusDevice for Ioapic {
    /// Registers are 32 bits wide; a narrower read gets a part of one.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset & !3 {
            register::SELECT => state.select.into(),
            register::WINDOW => state.read_window(),
            _ => 0,
        };
        crate::read_slice(&value.to_le_bytes(), (offset & 3) as usize, data);
    }

    /// Registers are written at their first byte; the bytes that a narrower write leaves out are 0.
    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, &byte) in bytes.iter_mut().zip(data) {
            *to = byte;
        }
        let mut state = self.lock();
        match offset {
            register::SELECT => state.select = bytes[0],
            register::WINDOW => self.write_window(&mut state, u32::from_le_bytes(bytes)),
            register::END_OF_INTERRUPT => self.end(&mut state, bytes[0]),
            _ => {}
        }
    }
}
