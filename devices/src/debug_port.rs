//! Port 0x80, the PC's POST code port: what a guest writes goes to the debug log with the time since the start.
//!
//! Some kernels write here as a short delay, without end: only the first codes are logged.

use std::time::Instant;

use vm_device::BusDeviceMut;

/// Codes that are logged.
const LOGGED: u32 = 1024;

/// The one-byte port 0x80.
pub struct DebugPort {
    start: Instant,
    last: u8,
    left: u32,
}

impl DebugPort {
    /// A port whose time starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            last: 0,
            left: LOGGED,
        }
    }

    fn code(&mut self, code: u8) {
        self.last = code;
        let Some(left) = self.left.checked_sub(1) else {
            return;
        };
        self.left = left;
        log::debug!("debug port: code {code:#04x} at {:?}", self.start.elapsed());
        if left == 0 {
            log::debug!("debug port: {LOGGED} codes logged, the others are not");
        }
    }
}

impl Default for DebugPort {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDeviceMut for DebugPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        crate::read_bytes(
            offset,
            data,
            |port| if port == 0 { self.last } else { 0xff },
        );
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |port, value| {
            if port == 0 {
                self.code(value);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::test_support::{hostile, inb};

    #[test]
    fn the_last_code_reads_back_however_many_there_were() {
        let mut port = DebugPort::new();
        assert_eq!(inb(&mut port, 0), 0);
        for code in (0..=LOGGED + 10).map(|n| n as u8) {
            port.write(0, &[code, 0xee]);
            assert_eq!(inb(&mut port, 0), code);
        }
        assert_eq!(port.left, 0);
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(DebugPort::new()), 1);
    }
}
