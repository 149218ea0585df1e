//! The size of a console's terminal, and who hears that it changed (virtio 1.2 §5.3.4).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_virtio::VirtioInterrupt;

/// The size, shared by the device and its handles.
pub(super) struct Terminal(Mutex<Inner>);

struct Inner {
    /// Columns and rows.
    size: (u16, u16),
    /// The size of which the driver knows.
    told: (u16, u16),
    /// While the device works for a driver that wants to know.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

impl Inner {
    /// Tells the driver what it does not know yet. If it cannot be told now, it is when the device works again.
    fn tell(&mut self) {
        if let Some(interrupt) = &self.interrupt
            && self.told != self.size
        {
            self.told = self.size;
            interrupt.config_changed();
        }
    }
}

impl Terminal {
    /// A terminal of `size`, columns and rows.
    pub fn new(size: (u16, u16)) -> Self {
        Self(Mutex::new(Inner {
            size,
            told: size,
            interrupt: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Columns and rows.
    pub fn size(&self) -> (u16, u16) {
        self.lock().size
    }

    /// Columns and rows that the driver knows.
    pub fn told(&self) -> (u16, u16) {
        self.lock().told
    }

    /// From now on `interrupt` leads to the driver.
    pub fn attach(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        let mut inner = self.lock();
        inner.interrupt = Some(interrupt);
        inner.tell();
    }

    /// From now on there is no way to the driver.
    pub fn detach(&self) {
        self.lock().interrupt = None;
    }

    /// Another driver, which will read the size, or the same from its start.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.told = inner.size;
    }

    /// The driver knows the size `told`, whatever the terminal has now.
    pub fn restore(&self, told: (u16, u16)) {
        self.lock().told = told;
    }
}

/// Changes a console while its device is behind a transport, from any thread.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Terminal>);

impl ConsoleHandle {
    pub(super) fn new(terminal: Arc<Terminal>) -> Self {
        Self(terminal)
    }

    /// The terminal now has so many columns and rows. The driver hears of it if that is new, now or when the device works again.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut inner = self.0.lock();
        inner.size = (columns, rows);
        inner.tell();
    }
}
