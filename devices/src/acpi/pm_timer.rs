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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::test_support::hostile;

    #[test]
    fn counts_at_its_frequency_and_wraps_at_32_bits() {
        assert_eq!(ticks(Duration::ZERO), 0);
        assert_eq!(ticks(Duration::from_secs(1)), 3_579_545);
        assert_eq!(ticks(Duration::from_nanos(279)), 0);
        assert_eq!(ticks(Duration::from_nanos(280)), 1);
        let hour = 3600 * 3_579_545u64;
        assert_eq!(
            u64::from(ticks(Duration::from_secs(3600))),
            hour % (1 << 32)
        );
        ticks(Duration::MAX);
    }

    #[test]
    fn goes_forward_and_ignores_writes() {
        let mut timer = PmTimer::new();
        let mut last = 0;
        for _ in 0..100 {
            timer.write(0, &[0xff; 4]);
            let mut data = [0xff; 8];
            timer.read(0, &mut data);
            assert_eq!(data[4..], [0; 4], "nothing after it");
            let now = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(PmTimer::new()), 4);
    }
}
