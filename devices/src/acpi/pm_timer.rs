//! The power management timer (ACPI 6.5 §4.8.2.1): 3.579545 MHz, 32 bits, as the FADT's `TMR_VAL_EXT` says.

use std::time::{Duration, Instant};

use vm_device::BusDeviceMut;

/// Ticks a second (§4.8.2.1).
const FREQUENCY: u128 = 3_579_545;
const NANOSECONDS: u128 = 1_000_000_000;

/// The four-byte port 0x608.
pub struct PmTimer {
    start: Instant,
}

impl PmTimer {
    /// A timer that counts from 0, now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Default for PmTimer {
    fn default() -> Self {
        Self::new()
    }
}

/// The counter after `elapsed`; it wraps every 20 minutes.
fn ticks(elapsed: Duration) -> u32 {
    let ticks = elapsed.as_nanos() * FREQUENCY / NANOSECONDS;
    (ticks & u128::from(u32::MAX)) as u32
}

impl BusDeviceMut for PmTimer {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = ticks(self.start.elapsed()).to_le_bytes();
        crate::read_slice(&value, usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    /// The counter is for reading.
    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}
