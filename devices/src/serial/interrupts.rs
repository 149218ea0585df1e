//! Causes of interrupts, their priority, and when the line is pulsed (PC16550D data sheet, "Interrupt Identification Register" and table IV).

use super::{Serial, fcr, iir};

/// A set of causes, with the bits of the interrupt enable register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Cause(u8);

impl Cause {
    /// Received data, or its time-out.
    pub const DATA: Self = Self(1);
    /// The transmitter holding register or FIFO is empty.
    pub const TRANSMITTER_EMPTY: Self = Self(2);
    /// An error of the receiver.
    pub const LINE_STATUS: Self = Self(4);
    /// A line of the modem changed.
    pub const MODEM_STATUS: Self = Self(8);

    pub const fn empty() -> Self {
        Self(0)
    }

    pub const fn bits(self) -> u8 {
        self.0
    }

    pub const fn from_register(value: u8) -> Self {
        Self(value & 0xf)
    }

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub const fn remove(&mut self, other: Self) {
        *self = self.without(other);
    }
}

impl Serial {
    /// Bytes that raise the data interrupt.
    fn trigger_level(&self) -> usize {
        if !self.fifo_on() {
            return 1;
        }
        match self.fifo_control >> fcr::TRIGGER_SHIFT {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// Whether data waits below the trigger level.
    pub(super) fn timed_out(&self) -> bool {
        !self.receive.is_empty() && self.receive.len() < self.trigger_level()
    }

    /// Causes that are there and enabled.
    fn pending(&self) -> Cause {
        let there = [
            (Cause::LINE_STATUS, self.overrun),
            (Cause::DATA, !self.receive.is_empty()),
            (Cause::TRANSMITTER_EMPTY, self.transmitter_emptied),
            (Cause::MODEM_STATUS, self.modem_changes != 0),
        ];
        let all = there
            .into_iter()
            .filter(|(_, there)| *there)
            .fold(0, |all, (cause, _)| all | cause.0);
        Cause(all & self.enabled.0)
    }

    /// Pulses the line where causes are pending and one of them arose or another went away. After every access and
    /// input.
    pub(super) fn tell(&mut self) {
        let pending = self.pending();
        let changed = pending != self.told;
        self.told = pending;
        if changed
            && pending != Cause::empty()
            && let Err(e) = self.interrupt.trigger()
        {
            log::debug!("serial port: interrupt lost: {e}");
        }
    }

    /// The cause of the highest priority; telling of an empty transmitter acknowledges it.
    pub(super) fn read_identity(&mut self) -> u8 {
        let pending = self.pending();
        let cause = if pending.contains(Cause::LINE_STATUS) {
            iir::LINE_STATUS
        } else if pending.contains(Cause::DATA) {
            if self.timed_out() {
                iir::TIME_OUT
            } else {
                iir::DATA
            }
        } else if pending.contains(Cause::TRANSMITTER_EMPTY) {
            self.transmitter_emptied = false;
            iir::TRANSMITTER_EMPTY
        } else if pending.contains(Cause::MODEM_STATUS) {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        };
        if self.fifo_on() {
            cause | iir::FIFO
        } else {
            cause
        }
    }

    pub(super) fn write_interrupt_enable(&mut self, value: u8) {
        let before = self.enabled;
        self.enabled = Cause::from_register(value);
        // Drivers count on an interrupt when they enable it for a transmitter that is empty.
        let newly = self
            .enabled
            .without(before)
            .contains(Cause::TRANSMITTER_EMPTY);
        if newly && self.transmit.is_empty() {
            self.transmitter_emptied = true;
        }
    }
}
