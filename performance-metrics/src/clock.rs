//! The time stamp counter, which a guest's code at CPL 3 reads natively: how fast it goes.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

fn tsc() -> u64 {
    #[allow(unsafe_code)]
    // SAFETY: reads a counter that every x86-64 processor has.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

/// Ticks of the TSC a second, measured once against the host's monotonic clock.
pub fn frequency() -> f64 {
    static FREQUENCY: OnceLock<f64> = OnceLock::new();
    *FREQUENCY.get_or_init(|| {
        let (start, ticks) = (Instant::now(), tsc());
        let mut passed = Duration::ZERO;
        while passed < Duration::from_millis(50) {
            std::hint::spin_loop();
            passed = start.elapsed();
        }
        tsc().wrapping_sub(ticks) as f64 / passed.as_secs_f64()
    })
}

/// How many ticks a time is.
pub fn ticks(time: Duration) -> u64 {
    (time.as_secs_f64() * frequency()) as u64
}

/// The same stretches of time by a guest's clock and by the host's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    guest: f64,
    host: f64,
}

impl Agreement {
    /// A stretch of so many ticks in the guest, of which the host saw the ends so far apart.
    pub fn new(ticks: u64, host: Duration) -> Self {
        Self {
            guest: ticks as f64 / frequency(),
            host: host.as_secs_f64(),
        }
    }

    /// Adds others.
    pub fn add(&mut self, more: Self) {
        self.guest += more.guest;
        self.host += more.host;
    }

    /// # Errors
    /// When the guest's clock goes at another rate than the host's: its figures would mean nothing. A busy host sees either end late,
    /// so that it takes some time to tell.
    pub fn check(&self) -> Result<()> {
        let enough = self.guest.max(self.host) > 0.5;
        ensure!(
            !enough || (0.5..2.0).contains(&(self.guest / self.host)),
            "the guest's time stamp counter says {:.3} s where the host's clock says {:.3} s",
            self.guest,
            self.host
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_of_another_rate_is_refused() {
        let second = ticks(Duration::from_secs(1));
        let agree = |ticks, ms| Agreement::new(ticks, Duration::from_millis(ms)).check();
        assert!(agree(second, 1100).is_ok());
        assert!(agree(second * 10, 1000).is_err());
        assert!(agree(second / 10, 1000).is_err());
    }

    #[test]
    fn one_late_look_is_no_other_rate() {
        let mut all = Agreement::new(ticks(Duration::from_millis(300)), Duration::from_millis(90));
        assert!(all.check().is_ok());
        for _ in 0..3 {
            let ms = Duration::from_millis(110);
            all.add(Agreement::new(ticks(ms), ms));
        }
        assert!(all.check().is_ok());
    }
}
