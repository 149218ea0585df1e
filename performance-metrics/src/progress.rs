//! One line on a terminal that says how far it is; silence elsewhere.

use std::io::{IsTerminal, Write, stderr};

/// The line. It goes when this does.
pub struct Progress {
    total: usize,
    done: usize,
    shown: bool,
}

impl Progress {
    /// For `total` steps.
    pub fn new(total: usize) -> Self {
        Self {
            total,
            done: 0,
            shown: stderr().is_terminal(),
        }
    }

    /// The next step begins.
    pub fn step(&mut self, what: &str) {
        self.done += 1;
        if self.shown {
            let _ = write!(stderr(), "\r\x1b[K[{}/{}] {what}", self.done, self.total);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}
