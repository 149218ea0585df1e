//! Looking again before sleeping: a driver that goes on at once then pays no exit for its notification, and the worker no system call.
//!
//! A look in vain costs at most [`Spin::WINDOW`] of a processor, and the more of them follow each other, the rarer they get, so that an idle
//! queue costs nothing and one whose driver takes its time next to nothing.

use std::thread;
use std::time::{Duration, Instant};

/// Looks between two looks at the clock.
const LOOKS: u32 = 16;
/// Vain looks in a row after which they are as rare as they get: one in 32 times.
const MOST_IN_VAIN: u32 = 6;

/// Whether and how long a handler looks for more before it sleeps.
#[derive(Clone, Debug)]
pub struct Spin {
    window: Duration,
    /// Looks in vain, in a row.
    in_vain: u32,
    /// Times that are let pass without a look.
    skip: u32,
}

impl Spin {
    /// How long a look lasts.
    pub const WINDOW: Duration = Duration::from_micros(30);

    /// Looks for `window` at most; where that is nothing, never.
    #[must_use]
    pub fn new(window: Duration) -> Self {
        Self {
            window,
            in_vain: 0,
            skip: 0,
        }
    }

    /// Looks if `on` and if there is a processor beside the one that the driver runs on: without that it would only hold the driver up.
    #[must_use]
    pub fn if_wanted(on: bool) -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self::new(if on && processors > 1 {
            Self::WINDOW
        } else {
            Duration::ZERO
        })
    }

    /// Calls `look` until it says that there is something, for as long as it pays. False if there was nothing.
    ///
    /// # Errors
    /// The first of `look`'s.
    pub fn until<E>(&mut self, look: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if self.window.is_zero() || !self.is_worth_it() {
            return Ok(false);
        }
        let start = Instant::now();
        self.look(look, || start.elapsed())
    }

    fn look<E>(
        &mut self,
        mut look: impl FnMut() -> Result<bool, E>,
        elapsed: impl Fn() -> Duration,
    ) -> Result<bool, E> {
        loop {
            for _ in 0..LOOKS {
                if look()? {
                    self.in_vain = 0;
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if elapsed() >= self.window {
                self.in_vain = MOST_IN_VAIN.min(self.in_vain + 1);
                self.skip = (1 << (self.in_vain - 1)) - 1;
                return Ok(false);
            }
        }
    }

    fn is_worth_it(&mut self) -> bool {
        let skipped = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        !skipped
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    /// One time to sleep, after which `found` says whether a look finds something. None where there was no look.
    fn sleep(spin: &mut Spin, found: bool) -> Option<u32> {
        if !spin.is_worth_it() {
            return None;
        }
        let (looks, now) = (Cell::new(0), Cell::new(Duration::ZERO));
        let look = || {
            looks.set(looks.get() + 1);
            Ok::<_, Infallible>(found && looks.get() == 20)
        };
        let clock = || {
            now.set(now.get() + Duration::from_micros(1));
            now.get()
        };
        assert_eq!(spin.look(look, clock), Ok(found));
        Some(looks.get())
    }

    #[test]
    fn a_look_ends_when_there_is_something_or_the_time_is_up() {
        let mut spin = Spin::new(Duration::from_micros(5));
        assert_eq!(sleep(&mut spin, true), Some(20));
        assert_eq!(sleep(&mut spin, false), Some(5 * LOOKS));
    }

    #[test]
    fn looks_in_vain_get_rare_and_one_that_pays_brings_them_back() {
        let mut spin = Spin::new(Spin::WINDOW);
        let looked = |spin: &mut Spin, times: u32| {
            (0..times).filter(|_| sleep(spin, false).is_some()).count()
        };
        assert_eq!(looked(&mut spin, 2), 2);
        // After 1, 3, 7 and 15 times without, and then after 31 each.
        assert_eq!(looked(&mut spin, 30), 4);
        assert_eq!(looked(&mut spin, 32 * 10), 10);
        while sleep(&mut spin, true).is_none() {}
        assert!((0..1000).all(|_| sleep(&mut spin, true).is_some()));
    }

    #[test]
    fn none_is_none() {
        let mut spin = Spin::if_wanted(false);
        assert_eq!(spin.until(|| -> Result<bool, ()> { Err(()) }), Ok(false));
        let mut spin = Spin::new(Spin::WINDOW);
        assert_eq!(spin.until(|| -> Result<bool, ()> { Err(()) }), Err(()));
    }
}
