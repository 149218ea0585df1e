//! Ports 0x61–0x64: system control port B and the command port of an 8042 keyboard controller with nothing
//! plugged in (Intel 8042 data sheet; IBM PC/AT technical reference).
//!
//! There is no data port 0x60: it reads as 0xff like any empty port. A command that has an answer shows a full output
//! buffer to one read of the status, so that a driver's probe reads that 0xff at once instead of waiting for long.

use std::sync::Arc;

use vm_device::{BusDeviceMut, Trigger};

/// System control port B, 0x61.
const CONTROL_B: u64 = 0;
/// Status when read, command when written, 0x64.
const COMMAND: u64 = 3;

/// Port B: gate of timer 2, speaker, and the two error enables; the guest's to set.
const CONTROL_B_WRITABLE: u8 = 0xf;
/// Port B: changes with every refresh of memory; here with every read.
const REFRESH: u8 = 1 << 4;
/// Port B: timer 2 is out of time. There is no timer 2, so nobody waits for it for long.
const TIMER_2_DONE: u8 = 1 << 5;

/// Status: there is something to read at port 0x60.
const OUTPUT_FULL: u8 = 1;
/// Status: the self test at power-on went well.
const SYSTEM_FLAG: u8 = 1 << 2;
/// Status: the keyboard is not locked.
const NOT_LOCKED: u8 = 1 << 4;

/// The four ports from 0x61 on.
pub struct I8042 {
    reset: Arc<dyn Trigger>,
    control_b: u8,
    answer: bool,
}

impl I8042 {
    /// `reset` is triggered by the command that pulses the CPU's reset line.
    #[must_use]
    pub fn new(reset: Arc<dyn Trigger>) -> Self {
        Self {
            reset,
            control_b: 0,
            answer: false,
        }
    }

    fn command(&mut self, command: u8) {
        self.answer = has_answer(command);
        // 0xf0–0xff pulse the output lines whose bits are 0; line 0 is the CPU's reset. Drivers write 0xfe.
        if command & 0xf1 == 0xf0
            && let Err(e) = self.reset.trigger()
        {
            log::debug!("i8042: reset: {e}");
        }
    }

    fn status(&mut self) -> u8 {
        let full = if std::mem::take(&mut self.answer) {
            OUTPUT_FULL
        } else {
            0
        };
        NOT_LOCKED | SYSTEM_FLAG | full
    }
}

/// Commands that answer at port 0x60: read RAM, tests, read ports, loop back.
fn has_answer(command: u8) -> bool {
    matches!(command, 0x20..=0x3f | 0xa9..=0xab | 0xc0 | 0xd0 | 0xd2 | 0xd3 | 0xe0)
}

impl BusDeviceMut for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        crate::read_bytes(offset, data, |port| match port {
            CONTROL_B => {
                self.control_b ^= REFRESH;
                self.control_b | TIMER_2_DONE
            }
            COMMAND => self.status(),
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |port, value| match port {
            CONTROL_B => {
                self.control_b = self.control_b & !CONTROL_B_WRITABLE | value & CONTROL_B_WRITABLE;
            }
            COMMAND => self.command(value),
            _ => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::test_support::{Counter, hostile, inb};

    fn port() -> (I8042, Arc<Counter>) {
        let reset = Counter::new();
        (I8042::new(reset.clone()), reset)
    }

    #[test]
    fn pulsing_output_line_0_resets() {
        let (mut i8042, reset) = port();
        i8042.write(COMMAND, &[0xfe]);
        assert_eq!(reset.take(), 1);
        i8042.write(COMMAND, &[0xf0]);
        assert_eq!(reset.take(), 1);
        for command in (0..0xf0).chain([0xff, 0xfd]) {
            i8042.write(COMMAND, &[command]);
        }
        // The command port alone.
        i8042.write(0, &[0xfe, 0xfe, 0xfe]);
        assert_eq!(reset.take(), 0);
    }

    #[test]
    fn a_command_with_an_answer_shows_it_once() {
        let (mut i8042, _) = port();
        assert_eq!(inb(&mut i8042, COMMAND), NOT_LOCKED | SYSTEM_FLAG);
        // Linux reads the command byte first.
        i8042.write(COMMAND, &[0x20]);
        assert_eq!(
            inb(&mut i8042, COMMAND),
            NOT_LOCKED | SYSTEM_FLAG | OUTPUT_FULL
        );
        assert_eq!(inb(&mut i8042, COMMAND), NOT_LOCKED | SYSTEM_FLAG);
        i8042.write(COMMAND, &[0x60]);
        assert_eq!(inb(&mut i8042, COMMAND), NOT_LOCKED | SYSTEM_FLAG);
    }

    #[test]
    fn port_b_never_keeps_a_guest_waiting() {
        let (mut i8042, _) = port();
        i8042.write(CONTROL_B, &[0xfd]);
        let (first, second) = (inb(&mut i8042, CONTROL_B), inb(&mut i8042, CONTROL_B));
        assert_eq!(first ^ second, REFRESH, "delay loops wait for a change");
        assert_eq!(first & !REFRESH, TIMER_2_DONE | 0xd);
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(port().0), 4);
    }
}
