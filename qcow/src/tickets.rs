//! Operations under way. Their lock is their own, so that who ends one never waits for metadata to be read or written.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The tickets of operations under way.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    active: Mutex<BTreeSet<u64>>,
    /// Who waits for all to end.
    watchers: AtomicUsize,
}

impl Tickets {
    // A set that a panic left behind is whole.
    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin(&self, ticket: u64) {
        self.lock().insert(ticket);
    }

    /// Whether someone has to be told.
    pub fn end(&self, ticket: u64) -> bool {
        self.lock().remove(&ticket);
        // Who began to watch before it last looked is seen here: the set's lock orders the two.
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
