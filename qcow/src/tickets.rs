//! Operations under way. Their lock is their own, so that who ends one never waits for metadata to be read or written.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The tickets of operations under way.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    /// In order: tickets are given out with rising numbers. There are as many as operations at once, few; a list of them
    /// allocates nothing once it has grown.
    active: Mutex<Vec<u64>>,
    /// Who waits for all to end.
    watchers: AtomicUsize,
}

impl Tickets {
    // A list that a panic left behind is whole.
    fn lock(&self) -> MutexGuard<'_, Vec<u64>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `ticket` is higher than all before it.
    pub fn begin(&self, ticket: u64) {
        self.lock().push(ticket);
    }

    /// Whether someone has to be told.
    pub fn end(&self, ticket: u64) -> bool {
        let mut active = self.lock();
        if let Ok(index) = active.binary_search(&ticket) {
            active.remove(index);
        }
        drop(active);
        // Who began to watch before it last looked is seen here: the list's lock orders the two.
        self.watchers.load(Ordering::Relaxed) > 0
    }

    pub fn oldest(&self) -> Option<u64> {
        self.lock().first().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// From now on the end of each operation is told.
    pub fn watch(&self) {
        self.watchers.fetch_add(1, Ordering::Relaxed);
    }

    pub fn unwatch(&self) {
        self.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_told_whatever_order_they_end_in() {
        let tickets = Tickets::default();
        assert!(tickets.is_empty());
        (1..=5).for_each(|ticket| tickets.begin(ticket));
        for (ended, oldest) in [(3, 1), (1, 2), (2, 4), (2, 4), (5, 4)] {
            tickets.end(ended);
            assert_eq!(tickets.oldest(), Some(oldest));
        }
        tickets.watch();
        assert!(tickets.end(4), "the watcher is told");
        assert!(tickets.is_empty() && tickets.oldest().is_none());
    }
}
