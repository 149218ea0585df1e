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

/// Whether so many ticks of a guest's can be the time `host` that passed between the same two lines at the host.
///
/// # Errors
/// When the guest's clock goes at another rate than the host's: its figures would mean nothing.
pub fn check(ticks: u64, host: Duration) -> Result<()> {
    let guest = ticks as f64 / frequency();
    let ratio = guest / host.as_secs_f64();
    // The host sees lines late when its processors are busy.
    ensure!(
        (0.5..2.0).contains(&ratio),
        "the guest's time stamp counter says {guest:.3} s where the host's clock says {:.3} s",
        host.as_secs_f64()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_of_another_rate_is_refused() {
        let ticks = ticks(Duration::from_secs(1));
        assert!(check(ticks, Duration::from_millis(1100)).is_ok());
        assert!(check(ticks * 10, Duration::from_secs(1)).is_err());
        assert!(check(ticks / 10, Duration::from_secs(1)).is_err());
    }
}
