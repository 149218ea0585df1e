//! The 16550A UART (National Semiconductor PC16550D data sheet, June 1995).
//!
//! Characters take no time on the line, and these follow from it: a byte written to the transmitter is in the
//! output before the write ends, unless the output would block, and the receiver's time-out is raised at once for
//! data below the trigger level.
//!
//! Interrupts leave as edges. A cause (line status, data, transmitter empty, modem status) is told once when it
//! arises, whether or not another is pending, and again when it went away and came back, be it within one access.
//! What is still pending when another cause goes away is told again, for a driver that serves one cause an interrupt.
//!
//! ```text
//!              arises, enabled: trigger()
//!   absent ------------------------------> told --+ another cause goes away: trigger()
//!      ^                                   |  ^   |
//!      +-----------------------------------+  +---+
//!        cleared by its register (table IV), or disabled in IER
//! ```

mod interrupts;
mod registers;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use vm_device::{BusDeviceMut, Trigger};

use interrupts::Cause;
use registers::{fcr, iir, lcr, lsr, mcr, msr, register};

/// Bytes that each FIFO holds.
pub const FIFO_SIZE: usize = 16;

/// A 16550A, eight byte-wide ports.
///
/// The owner of the host's end gives input with [`queue_input`](Serial::queue_input) and says with
/// [`output_ready`](Serial::output_ready) that a blocked output has room again.
pub struct Serial {
    interrupt: Arc<dyn Trigger>,
    output: Box<dyn Write + Send>,
    input_room: Arc<dyn Trigger>,
    receive: VecDeque<u8>,
    transmit: VecDeque<u8>,
    /// The host has more input than fitted.
    input_waits: bool,
    /// Interrupt enable register.
    enabled: Cause,
    /// Enabled causes that the interrupt was triggered for since they arose.
    told: Cause,
    /// The transmitter became empty, or its interrupt was enabled while it was; not acknowledged yet.
    transmitter_emptied: bool,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    /// A byte was lost since the last read of the line status.
    overrun: bool,
    /// Change bits of the modem status.
    modem_changes: u8,
    scratch: u8,
    divisor: [u8; 2],
}

impl Serial {
    /// A UART after reset. `interrupt` is its line to the interrupt controller; `output` takes what the guest
    /// sends and may say `WouldBlock`; `input_room` is triggered when there is room for input after
    /// [`queue_input`](Serial::queue_input) took less than it was given.
    #[must_use]
    pub fn new(
        interrupt: Arc<dyn Trigger>,
        output: Box<dyn Write + Send>,
        input_room: Arc<dyn Trigger>,
    ) -> Self {
        Self {
            interrupt,
            output,
            input_room,
            receive: VecDeque::with_capacity(FIFO_SIZE),
            transmit: VecDeque::with_capacity(FIFO_SIZE),
            input_waits: false,
            enabled: Cause::empty(),
            told: Cause::empty(),
            transmitter_emptied: false,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            overrun: false,
            modem_changes: 0,
            scratch: 0,
            // 9600 baud.
            divisor: [12, 0],
        }
    }

    /// Receives as many of `bytes` as fit, and says how many that was: up to 16 with the FIFO on, up to 1 without,
    /// none while the guest has the receiver in loopback.
    pub fn queue_input(&mut self, bytes: &[u8]) -> usize {
        let room = if self.loopback() {
            0
        } else {
            self.capacity().saturating_sub(self.receive.len())
        };
        let taken = room.min(bytes.len());
        self.receive.extend(bytes.iter().take(taken));
        self.input_waits = taken < bytes.len();
        self.tell();
        taken
    }

    /// Sends what a blocked output left behind.
    pub fn output_ready(&mut self) {
        self.flush();
        self.tell();
    }

    fn fifo_on(&self) -> bool {
        self.fifo_control & fcr::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_on() { FIFO_SIZE } else { 1 }
    }

    fn loopback(&self) -> bool {
        self.modem_control & mcr::LOOPBACK != 0
    }

    fn divisor_latch(&self) -> bool {
        self.line_control & lcr::DIVISOR_LATCH != 0
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        match offset {
            register::DATA if self.divisor_latch() => self.divisor[0],
            register::DATA => self.read_data(),
            register::INTERRUPT_ENABLE if self.divisor_latch() => self.divisor[1],
            register::INTERRUPT_ENABLE => self.enabled.bits(),
            register::INTERRUPT_IDENTITY => self.read_identity(),
            register::LINE_CONTROL => self.line_control,
            register::MODEM_CONTROL => self.modem_control,
            register::LINE_STATUS => self.read_line_status(),
            register::MODEM_STATUS => {
                let changes = std::mem::take(&mut self.modem_changes);
                self.modem_lines() | changes
            }
            register::SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        match offset {
            register::DATA if self.divisor_latch() => self.divisor[0] = value,
            register::DATA => self.write_data(value),
            register::INTERRUPT_ENABLE if self.divisor_latch() => self.divisor[1] = value,
            register::INTERRUPT_ENABLE => self.write_interrupt_enable(value),
            register::INTERRUPT_IDENTITY => self.write_fifo_control(value),
            register::LINE_CONTROL => self.line_control = value,
            register::MODEM_CONTROL => self.write_modem_control(value),
            register::SCRATCH => self.scratch = value,
            // The status registers are for reading ("Line Status Register": writing it is for factory tests).
            _ => {}
        }
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.receive.pop_front().unwrap_or(0);
        if self.timed_out() {
            // The read took back the time-out ("FIFO Interrupt Mode Operation"); what is left times out anew.
            self.told.remove(Cause::DATA);
        }
        self.offer_room();
        byte
    }

    fn write_data(&mut self, byte: u8) {
        self.transmitter_emptied = false;
        self.told.remove(Cause::TRANSMITTER_EMPTY);
        if self.loopback() {
            self.receive_looped(byte);
            self.transmitter_emptied = true;
            return;
        }
        if self.transmit.len() >= self.capacity() {
            // The output may have room by now.
            self.flush();
        }
        if self.transmit.len() < self.capacity() {
            self.transmit.push_back(byte);
        }
        // A byte for a transmitter that is full is lost: the line status said so.
        self.flush();
    }

    /// Loopback ("Modem Control Register"): what is sent is received at once.
    fn receive_looped(&mut self, byte: u8) {
        if self.receive.len() < self.capacity() {
            self.receive.push_back(byte);
            return;
        }
        // "Line Status Register", bit 1: without FIFO the new byte replaces the old one, with it the new byte is lost.
        self.overrun = true;
        if !self.fifo_on() {
            self.receive.clear();
            self.receive.push_back(byte);
        }
    }

    /// Moves the transmit FIFO to the output.
    fn flush(&mut self) {
        if self.transmit.is_empty() {
            return;
        }
        while !self.transmit.is_empty() {
            let (front, _) = self.transmit.as_slices();
            match self.output.write(front) {
                Ok(0) => self.transmit.clear(),
                Ok(sent) => drop(self.transmit.drain(..sent.min(self.transmit.len()))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::debug!("serial port: output lost: {e}");
                    self.transmit.clear();
                }
            }
        }
        self.transmitter_emptied = true;
    }

    fn read_line_status(&mut self) -> u8 {
        self.flush();
        let mut status = 0;
        if !self.receive.is_empty() {
            status |= lsr::DATA_READY;
        }
        if std::mem::take(&mut self.overrun) {
            status |= lsr::OVERRUN;
        }
        if self.transmit.is_empty() {
            status |= lsr::HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY;
        }
        status
    }

    fn write_fifo_control(&mut self, value: u8) {
        let was_on = self.fifo_on();
        let on = value & fcr::ENABLE != 0;
        // "FIFO Control Register": without the enable bit the others are not programmed; changing it empties both FIFOs.
        if on != was_on || (on && value & fcr::CLEAR_RECEIVE != 0) {
            self.receive.clear();
        }
        if (on != was_on || (on && value & fcr::CLEAR_TRANSMIT != 0)) && !self.transmit.is_empty() {
            self.transmit.clear();
            self.transmitter_emptied = true;
        }
        self.fifo_control = if on {
            value & (fcr::ENABLE | fcr::TRIGGER)
        } else {
            0
        };
        self.offer_room();
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = self.modem_lines();
        self.modem_control = value & mcr::MASK;
        let after = self.modem_lines();
        let changed = before ^ after;
        self.modem_changes |= (changed & (msr::CTS | msr::DSR | msr::DCD)) >> msr::CHANGE_SHIFT;
        // Of the ring indicator only its end counts.
        self.modem_changes |= (changed & before & msr::RI) >> msr::CHANGE_SHIFT;
        self.offer_room();
    }

    /// The modem's lines: a modem that is there, or the own outputs in loopback.
    fn modem_lines(&self) -> u8 {
        if !self.loopback() {
            return msr::CTS | msr::DSR | msr::DCD;
        }
        [
            (mcr::DTR, msr::DSR),
            (mcr::RTS, msr::CTS),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.modem_control & output != 0)
        .fold(0, |lines, (_, line)| lines | line)
    }

    /// Tells the host of room, once the guest has taken all it had: input then comes by the FIFO, not by the byte.
    fn offer_room(&mut self) {
        if self.input_waits && self.receive.is_empty() && !self.loopback() {
            self.input_waits = false;
            if let Err(e) = self.input_room.trigger() {
                log::debug!("serial port: asking for input: {e}");
            }
        }
    }
}

impl BusDeviceMut for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        crate::read_bytes(offset, data, |register| {
            let value = self.read_register(register);
            self.tell();
            value
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |register, value| {
            self.write_register(register, value);
            self.tell();
        });
    }
}
