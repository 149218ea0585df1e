//! Token buckets: so many bytes and so many operations in a time, for one queue or a group of them.
//!
//! A bucket holds at most `size` tokens and gets `size` more in each `refill`, evenly. It starts full, with `one_time_burst`
//! more that are never refilled. A request larger than a full bucket would wait for ever, so it may take all of one and
//! owe the rest; those after it wait until that is paid.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//! use block_util::{BucketConfig, ManualClock, RateLimiter, RateLimiterConfig};
//!
//! let clock = Arc::new(ManualClock::default());
//! let thousand = BucketConfig { size: 1000, one_time_burst: 0, refill: Duration::from_millis(100) };
//! let config = RateLimiterConfig { bandwidth: Some(thousand), operations: None };
//! let limiter = RateLimiter::with_clock(&config, clock.clone()).unwrap();
//!
//! assert_eq!(limiter.take(800, 1), Ok(()));
//! assert_eq!(limiter.take(700, 1), Err(Duration::from_millis(50)));
//! clock.advance(Duration::from_millis(50));
//! assert_eq!(limiter.take(700, 1), Ok(()));
//! ```

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::timerfd::TimerFd;

/// Shortest wait: timers are not finer.
const SHORTEST: Duration = Duration::from_micros(100);

/// Time that only goes forward.
pub trait Clock: Debug + Send + Sync {
    /// Since some moment that stays the same.
    fn now(&self) -> Duration;
}

/// The host's clock.
#[derive(Debug)]
pub struct MonotonicClock(Instant);

impl Default for MonotonicClock {
    fn default() -> Self {
        MonotonicClock(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock for tests, which moves when told.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        let nanos = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_add(nanos, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

/// One bucket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BucketConfig {
    /// Tokens (bytes, or operations) that it holds, and that each `refill` brings; not 0.
    pub size: u64,
    /// Tokens that it holds once, at the start, on top of that.
    pub one_time_burst: u64,
    /// Time in which an empty bucket fills; not 0.
    pub refill: Duration,
}

/// Both buckets; without either nothing is limited.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RateLimiterConfig {
    /// Of bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Of requests.
    pub operations: Option<BucketConfig>,
}

/// Why there is no limiter.
#[derive(Debug, Error)]
pub enum RateLimiterError {
    /// A bucket that never lets anything through, or everything.
    #[error("a rate limit needs a size and a refill time that are not 0: {size} in {refill:?}")]
    Bucket {
        /// Tokens.
        size: u64,
        /// Time to fill.
        refill: Duration,
    },
    /// The kernel gave no timer.
    #[error("creating the timer of a rate limiter")]
    Timer(#[source] io::Error),
}

#[derive(Debug)]
struct Bucket {
    config: BucketConfig,
    /// Tokens times nanoseconds of `refill`, so that no time is lost to rounding. Below 0 when some are owed.
    level: i128,
    burst: u64,
    filled: Duration,
}

impl Bucket {
    fn new(config: BucketConfig, now: Duration) -> Result<Bucket, RateLimiterError> {
        if config.size == 0 || config.refill.is_zero() {
            return Err(RateLimiterError::Bucket {
                size: config.size,
                refill: config.refill,
            });
        }
        let mut bucket = Bucket {
            config,
            level: 0,
            burst: config.one_time_burst,
            filled: now,
        };
        bucket.level = bucket.scaled(config.size);
        Ok(bucket)
    }

    /// Tokens as `level` counts them. What does not fit, which is a refill of centuries, saturates.
    fn scaled(&self, tokens: u64) -> i128 {
        i128::from(tokens).saturating_mul(self.refill_nanos())
    }

    fn refill_nanos(&self) -> i128 {
        i128::try_from(self.config.refill.as_nanos()).unwrap_or(i128::MAX)
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        let passed = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let gained = passed.saturating_mul(i128::from(self.config.size));
        let full = self.scaled(self.config.size);
        self.level = self.level.saturating_add(gained).min(full);
    }

    /// How long until `tokens` can be taken; zero for now.
    fn wait(&self, tokens: u64) -> Duration {
        // What the burst does not pay for, and of that no more than there can be.
        let needed = tokens.saturating_sub(self.burst).min(self.config.size);
        let missing = self.scaled(needed).saturating_sub(self.level);
        if missing <= 0 || needed == 0 {
            return Duration::ZERO;
        }
        let size = i128::from(self.config.size);
        let nanos = missing / size + i128::from(missing % size != 0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let rest = self.scaled(tokens - from_burst);
        self.level = self.level.saturating_sub(rest);
    }

    fn give_back(&mut self, tokens: u64) {
        let full = self.scaled(self.config.size);
        self.level = self.level.saturating_add(self.scaled(tokens)).min(full);
    }
}

#[derive(Debug)]
struct Buckets {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

/// Limits whoever takes from it. Queues that share one by `Arc` are a group.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: Mutex<Buckets>,
    clock: Arc<dyn Clock>,
}

impl RateLimiter {
    /// Full buckets, by the host's clock.
    ///
    /// # Errors
    ///
    /// [`RateLimiterError::Bucket`].
    pub fn new(config: &RateLimiterConfig) -> Result<RateLimiter, RateLimiterError> {
        RateLimiter::with_clock(config, Arc::new(MonotonicClock::default()))
    }

    /// Full buckets, by `clock`.
    ///
    /// # Errors
    ///
    /// [`RateLimiterError::Bucket`].
    pub fn with_clock(
        config: &RateLimiterConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<RateLimiter, RateLimiterError> {
        let now = clock.now();
        let bucket = |config: Option<BucketConfig>| config.map(|c| Bucket::new(c, now)).transpose();
        Ok(RateLimiter {
            buckets: Mutex::new(Buckets {
                bandwidth: bucket(config.bandwidth)?,
                operations: bucket(config.operations)?,
            }),
            clock,
        })
    }

    /// Takes the tokens of `operations` requests of `bytes` together: from both buckets, or from none.
    ///
    /// # Errors
    ///
    /// How long to wait before it is worth asking again, when others take none meanwhile.
    pub fn take(&self, bytes: u64, operations: u64) -> Result<(), Duration> {
        let now = self.clock.now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets {
            bandwidth,
            operations: requests,
        } = &mut *buckets;
        let mut both = [(bandwidth, bytes), (requests, operations)];
        let mut wait = Duration::ZERO;
        for (bucket, tokens) in &mut both {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(*tokens));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, tokens) in both {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        Ok(())
    }

    /// Takes the tokens of a request whose size was not known before it was made, even if they have to be owed: how long until
    /// nothing is.
    #[must_use]
    pub fn charge(&self, bytes: u64, operations: u64) -> Duration {
        let now = self.clock.now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets {
            bandwidth,
            operations: requests,
        } = &mut *buckets;
        let mut wait = Duration::ZERO;
        for (bucket, tokens) in [(bandwidth, bytes), (requests, operations)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                bucket.take(tokens);
                // The next one needs a token to be there.
                wait = wait.max(bucket.wait(1));
            }
        }
        wait
    }

    /// Gives back what was taken for a request that was not made after all.
    pub fn give_back(&self, bytes: u64, operations: u64) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = &mut buckets.bandwidth {
            bucket.give_back(bytes);
        }
        if let Some(bucket) = &mut buckets.operations {
            bucket.give_back(operations);
        }
    }
}

/// One queue's end of a limiter: a timer that tells when to go on.
#[derive(Debug)]
pub struct LimiterTimer {
    limiter: Arc<RateLimiter>,
    timer: TimerFd,
    waiting: bool,
}

impl LimiterTimer {
    /// An end of `limiter`, which others may share.
    ///
    /// # Errors
    ///
    /// [`RateLimiterError::Timer`].
    pub fn new(limiter: Arc<RateLimiter>) -> Result<LimiterTimer, RateLimiterError> {
        let timer = TimerFd::new().map_err(|e| RateLimiterError::Timer(e.into()))?;
        Ok(LimiterTimer {
            limiter,
            timer,
            waiting: false,
        })
    }

    /// Whether a request of `bytes` may be made now; its tokens are then taken. If not, the descriptor becomes readable
    /// when it is worth asking again. While it waits the answer is no, and no tokens are taken: the queue stays in order.
    ///
    /// # Errors
    ///
    /// When the timer cannot be set.
    pub fn may(&mut self, bytes: u64) -> io::Result<bool> {
        if self.waiting {
            return Ok(false);
        }
        if let Err(wait) = self.limiter.take(bytes, 1) {
            self.timer.reset(wait.max(SHORTEST), None)?;
            self.waiting = true;
        }
        Ok(!self.waiting)
    }

    /// Counts a request of `bytes` that was made. If that is more than is allowed, the queue is to wait from now on.
    ///
    /// # Errors
    ///
    /// When the timer cannot be set.
    pub fn charge(&mut self, bytes: u64) -> io::Result<()> {
        let wait = self.limiter.charge(bytes, 1);
        if !wait.is_zero() && !self.waiting {
            self.timer.reset(wait.max(SHORTEST), None)?;
            self.waiting = true;
        }
        Ok(())
    }

    /// Call it when the descriptor is readable: it is not any more, and [`Self::may`] asks again. Harmless otherwise.
    ///
    /// # Errors
    ///
    /// When the timer cannot be cleared.
    pub fn on_timer(&mut self) -> io::Result<()> {
        // Setting a timer forgets that it has run out; a read would block if it has not.
        self.timer.clear()?;
        self.waiting = false;
        Ok(())
    }

    /// Whether the queue has to wait for the descriptor.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Gives back what [`Self::may`] took for a request that was not made.
    pub fn give_back(&self, bytes: u64) {
        self.limiter.give_back(bytes, 1);
    }
}

impl AsRawFd for LimiterTimer {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_charged_is_owed() {
        let clock = Arc::new(ManualClock::default());
        let config = RateLimiterConfig {
            bandwidth: Some(bucket(1000, 0, 100)),
            operations: None,
        };
        let limiter = RateLimiter::with_clock(&config, clock.clone()).unwrap();
        assert_eq!(limiter.charge(600, 1), Duration::ZERO);
        // 200 too much, and one token for the next.
        assert_eq!(limiter.charge(600, 1), Duration::from_micros(20_100));
        clock.advance(Duration::from_millis(20));
        assert_eq!(limiter.charge(0, 1), Duration::from_micros(100));
        clock.advance(Duration::from_millis(40));
        assert_eq!(limiter.charge(399, 1), Duration::ZERO);
    }

    fn bucket(size: u64, burst: u64, millis: u64) -> BucketConfig {
        BucketConfig {
            size,
            one_time_burst: burst,
            refill: Duration::from_millis(millis),
        }
    }

    fn limiter(
        bandwidth: Option<BucketConfig>,
        operations: Option<BucketConfig>,
    ) -> (Arc<ManualClock>, RateLimiter) {
        let clock = Arc::new(ManualClock::default());
        let config = RateLimiterConfig {
            bandwidth,
            operations,
        };
        let limiter = RateLimiter::with_clock(&config, clock.clone()).unwrap();
        (clock, limiter)
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_burst_is_spent_once() {
        let (clock, limiter) = limiter(Some(bucket(100, 50, 100)), None);
        assert_eq!(limiter.take(150, 1), Ok(()));
        assert_eq!(limiter.take(10, 1), Err(10 * MS));
        clock.advance(1000 * MS);
        assert_eq!(limiter.take(100, 1), Ok(()));
        assert_eq!(limiter.take(1, 1), Err(MS));
    }

    #[test]
    fn both_buckets_are_taken_from_or_none() {
        let (clock, limiter) = limiter(Some(bucket(1000, 0, 100)), Some(bucket(2, 0, 100)));
        assert_eq!(limiter.take(100, 1), Ok(()));
        assert_eq!(limiter.take(100, 1), Ok(()));
        // No operation left, so no byte is taken either.
        assert_eq!(limiter.take(800, 1), Err(50 * MS));
        clock.advance(50 * MS);
        assert_eq!(limiter.take(1000, 1), Ok(()));
        assert_eq!(limiter.take(1, 0), Err(Duration::from_micros(100)));
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_when_it_is_full_and_owes() {
        let (clock, limiter) = limiter(Some(bucket(100, 0, 100)), None);
        assert_eq!(limiter.take(10, 1), Ok(()));
        assert_eq!(limiter.take(1000, 1), Err(10 * MS));
        clock.advance(10 * MS);
        assert_eq!(limiter.take(1000, 1), Ok(()));
        assert_eq!(limiter.take(1, 1), Err(901 * MS));
        clock.advance(901 * MS);
        assert_eq!(limiter.take(1, 1), Ok(()));
    }

    #[test]
    fn what_is_given_back_is_there_again() {
        let (_, limiter) = limiter(Some(bucket(100, 0, 100)), Some(bucket(1, 0, 100)));
        assert_eq!(limiter.take(100, 1), Ok(()));
        limiter.give_back(100, 1);
        assert_eq!(limiter.take(100, 1), Ok(()));
        limiter.give_back(u64::MAX, u64::MAX);
        assert_eq!(limiter.take(100, 1), Ok(()));
        assert!(limiter.take(1, 1).is_err());
    }

    #[test]
    fn no_limit_is_no_limit() {
        let (_, limiter) = limiter(None, None);
        for _ in 0..100 {
            assert_eq!(limiter.take(u64::MAX, u64::MAX), Ok(()));
        }
    }

    #[test]
    fn buckets_of_nothing_are_refused() {
        for bad in [bucket(0, 5, 100), bucket(5, 5, 0)] {
            let config = RateLimiterConfig {
                bandwidth: None,
                operations: Some(bad),
            };
            let error = RateLimiter::new(&config).unwrap_err();
            assert!(matches!(error, RateLimiterError::Bucket { .. }));
        }
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let config = BucketConfig {
            size: u64::MAX,
            one_time_burst: u64::MAX,
            refill: Duration::MAX,
        };
        let (clock, limiter) = limiter(Some(config), None);
        for _ in 0..10 {
            let _ = limiter.take(u64::MAX, 1);
            clock.advance(Duration::from_nanos(u64::MAX / 16));
        }
        limiter.give_back(u64::MAX, 1);
    }

    #[test]
    fn queues_of_a_group_share_and_each_waits_for_its_timer() {
        let (clock, limiter) = limiter(None, Some(bucket(3, 0, 3)));
        let limiter = Arc::new(limiter);
        let mut first = LimiterTimer::new(limiter.clone()).unwrap();
        let mut second = LimiterTimer::new(limiter).unwrap();
        assert!(first.may(1).unwrap());
        assert!(second.may(1).unwrap());
        assert!(first.may(1).unwrap());
        assert!(!second.may(1).unwrap());
        assert!(second.is_waiting() && !first.is_waiting());
        // The descriptor becomes readable, whenever that is.
        let mut fd = libc::pollfd {
            fd: second.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        #[allow(unsafe_code)]
        // SAFETY: one pollfd, which lives through the call.
        let ready = |fd: &mut libc::pollfd, timeout| unsafe { libc::poll(fd, 1, timeout) };
        assert_eq!(ready(&mut fd, -1), 1);
        clock.advance(MS);
        assert!(!second.may(1).unwrap(), "it has not been told of the timer");
        second.on_timer().unwrap();
        assert_eq!(ready(&mut fd, 0), 0);
        assert!(second.may(1).unwrap());
        assert!(!first.may(1).unwrap());
        first.on_timer().unwrap();
        first.give_back(1);
        assert!(first.may(1).unwrap());
    }

    proptest! {
        /// Over any time, no more passes than the bucket, the burst, what time brought, and one request that was too large.
        #[test]
        fn the_rate_is_kept(
            size in 1..10_000u64,
            burst in 0..5_000u64,
            millis in 1..1000u64,
            requests in proptest::collection::vec((0..20_000u64, 0..50_000_000u64), 1..200),
        ) {
            let (clock, limiter) = limiter(Some(bucket(size, burst, millis)), None);
            let (mut passed, mut largest) = (0u64, 0u64);
            for (bytes, nanos) in requests {
                clock.advance(Duration::from_nanos(nanos));
                if let Err(wait) = limiter.take(bytes, 1) {
                    prop_assert!(!wait.is_zero());
                    // The answer is exact: a nanosecond earlier it is still no, and then it is yes.
                    clock.advance(wait - Duration::from_nanos(1));
                    prop_assert_eq!(limiter.take(bytes, 1), Err(Duration::from_nanos(1)));
                    clock.advance(Duration::from_nanos(1));
                    prop_assert_eq!(limiter.take(bytes, 1), Ok(()));
                }
                passed += bytes;
                largest = largest.max(bytes);
                let brought = clock.now().as_nanos() as u64 * size / (millis * 1_000_000) + 1;
                prop_assert!(passed <= size + burst + brought + largest);
            }
        }
    }
}
