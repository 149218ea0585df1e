//! Interrupts that a test can wait for.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::VirtioInterrupt;

/// A device that has not answered by then never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts interrupts, and wakes who waits for one.
#[derive(Debug, Default)]
pub struct TestInterrupt {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    queues: Vec<u64>,
    config: u64,
}

impl TestInterrupt {
    /// Interrupts of queue `index` so far.
    #[must_use]
    pub fn queue_count(&self, index: u16) -> u64 {
        let counts = self.counts.lock().unwrap();
        counts.queues.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// Configuration interrupts so far.
    #[must_use]
    pub fn config_count(&self) -> u64 {
        self.counts.lock().unwrap().config
    }

    /// Asks `done` now and after each interrupt, until it gives something. Panics with `what` if that takes a minute.
    pub fn wait_for<T>(&self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut counts = self.counts.lock().unwrap();
        loop {
            if let Some(found) = done() {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what}: waited in vain");
            counts = self.changed.wait_timeout(counts, left).unwrap().0;
        }
    }
}

impl VirtioInterrupt for TestInterrupt {
    fn queue(&self, index: u16) {
        let mut counts = self.counts.lock().unwrap();
        let index = usize::from(index);
        if counts.queues.len() <= index {
            counts.queues.resize(index + 1, 0);
        }
        counts.queues[index] += 1;
        self.changed.notify_all();
    }

    fn config_changed(&self) {
        self.counts.lock().unwrap().config += 1;
        self.changed.notify_all();
    }
}
