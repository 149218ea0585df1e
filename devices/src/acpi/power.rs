//! One port that is reset register, sleep control register and sleep status register at once
//! (ACPI 6.5 §4.8.3.6, §4.8.3.7).

use std::sync::Arc;

use vm_device::{BusDeviceMut, Trigger};

/// Value of the reset register that resets, as the FADT's `RESET_VALUE` tells it.
const RESET: u8 = 1;
/// Sleep control: go to sleep.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep control: which sleep.
const SLEEP_TYPE: u8 = 7 << 2;
/// The type that the DSDT gives for S5, soft off.
const SOFT_OFF: u8 = 5 << 2;

/// The one-byte port 0x3c0.
pub struct PowerPort {
    shutdown: Arc<dyn Trigger>,
    reset: Arc<dyn Trigger>,
}

impl PowerPort {
    /// `shutdown` is triggered when the guest goes to S5 (it writes 0x34), `reset` when it resets the machine
    /// (it writes 1).
    #[must_use]
    pub fn new(shutdown: Arc<dyn Trigger>, reset: Arc<dyn Trigger>) -> Self {
        Self { shutdown, reset }
    }

    fn control(&self, value: u8) {
        let (what, trigger) = if value == RESET {
            ("reset", &self.reset)
        } else if value & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_ENABLE | SOFT_OFF {
            ("shutdown", &self.shutdown)
        } else {
            return;
        };
        if let Err(e) = trigger.trigger() {
            log::debug!("ACPI power port: {what}: {e}");
        }
    }
}

impl BusDeviceMut for PowerPort {
    /// The sleep status: never woken.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |port, value| {
            if port == 0 {
                self.control(value);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::test_support::{Counter, hostile, inb};

    fn port() -> (PowerPort, Arc<Counter>, Arc<Counter>) {
        let (shutdown, reset) = (Counter::new(), Counter::new());
        (
            PowerPort::new(shutdown.clone(), reset.clone()),
            shutdown,
            reset,
        )
    }

    #[test]
    fn one_value_resets_and_sleep_type_5_shuts_down() {
        let (mut port, shutdown, reset) = port();
        for value in 0..=255u8 {
            port.write(0, &[value]);
            let shuts_down = value & 0x3c == 0x34;
            assert_eq!(shutdown.take(), usize::from(shuts_down), "{value:#x}");
            assert_eq!(reset.take(), usize::from(value == 1), "{value:#x}");
        }
        // Linux clears the wake status first and reads it later.
        port.write(1, &[0x34, 1]);
        assert_eq!(inb(&mut port, 0), 0);
        assert_eq!((shutdown.take(), reset.take()), (0, 0));
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(port().0), 1);
    }
}
