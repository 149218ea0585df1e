//! What the device, its thread and those who change it share.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_virtio::VirtioInterrupt;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{BalloonError, BalloonStatistics, BalloonV1, PAGE};

/// Shared by device, worker and handles.
pub(super) struct Shared {
    /// Bytes of the guest's RAM.
    ram: u64,
    inner: Mutex<Inner>,
    /// The user wants new statistics.
    ask: EventFd,
}

struct Inner {
    /// Pages that the balloon should have.
    target: u32,
    /// The target of which the driver knows.
    told: u32,
    /// Pages that it has, as the driver says.
    actual: u32,
    statistics: Option<BalloonStatistics>,
    /// While the device works.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

impl Inner {
    /// Tells the driver what it does not know yet. If it cannot be told now, it is when the device works again.
    fn tell(&mut self) {
        if let Some(interrupt) = &self.interrupt
            && self.told != self.target
        {
            self.told = self.target;
            interrupt.config_changed();
        }
    }
}

impl Shared {
    /// A balloon that should have `size` bytes of `ram`.
    pub fn new(size: u64, ram: u64) -> Result<Self, BalloonError> {
        let target = pages(size, ram)?;
        Ok(Self {
            ram,
            inner: Mutex::new(Inner {
                target,
                told: target,
                actual: 0,
                statistics: None,
                interrupt: None,
            }),
            ask: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BalloonError::Event)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space (§5.5.4): le32 target, le32 actual, in pages.
    pub fn config(&self) -> [[u8; 4]; 2] {
        let inner = self.lock();
        [inner.target.to_le_bytes(), inner.actual.to_le_bytes()]
    }

    /// The driver says how many pages the balloon has.
    pub fn set_actual(&self, pages: u32) {
        self.lock().actual = pages;
    }

    pub fn set_statistics(&self, statistics: BalloonStatistics) {
        self.lock().statistics = Some(statistics);
    }

    /// Readable when the user wants new statistics.
    pub fn ask_event(&self) -> &EventFd {
        &self.ask
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

    /// Another driver, which has no pages yet and will read the target.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.told = inner.target;
        inner.actual = 0;
        inner.statistics = None;
    }

    pub fn save(&self) -> BalloonV1 {
        let inner = self.lock();
        BalloonV1 {
            target: inner.target,
            told: inner.told,
            actual: inner.actual,
        }
    }

    pub fn restore(&self, state: &BalloonV1) {
        let mut inner = self.lock();
        inner.target = state.target;
        inner.told = state.told;
        inner.actual = state.actual;
    }
}

/// Pages of a balloon of `size` bytes.
fn pages(size: u64, ram: u64) -> Result<u32, BalloonError> {
    if size > ram {
        return Err(BalloonError::TooLarge { size, ram });
    }
    if !size.is_multiple_of(PAGE) {
        return Err(BalloonError::NoPages(size));
    }
    u32::try_from(size / PAGE).map_err(|_| BalloonError::TooLarge {
        size,
        ram: u64::from(u32::MAX) * PAGE,
    })
}

/// Changes a balloon and looks at it while its device is behind a transport, from any thread.
#[derive(Clone)]
pub struct BalloonControl(Arc<Shared>);

impl BalloonControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The balloon should have `size` bytes, a multiple of 4096 and no more than the guest's RAM. The driver hears of it now, or when
    /// the device works again; it takes its time, and does what it can.
    ///
    /// # Errors
    /// [`BalloonError::TooLarge`], [`BalloonError::NoPages`]. Nothing changes then.
    pub fn resize(&self, size: u64) -> Result<(), BalloonError> {
        let target = pages(size, self.0.ram)?;
        let mut inner = self.0.lock();
        inner.target = target;
        inner.tell();
        Ok(())
    }

    /// Bytes that the balloon should have.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.0.lock().target) * PAGE
    }

    /// Bytes that the balloon has, as the driver says: no more than the guest's RAM.
    #[must_use]
    pub fn actual(&self) -> u64 {
        (u64::from(self.0.lock().actual) * PAGE).min(self.0.ram)
    }

    /// What the driver told last of the guest's memory. None before it did.
    #[must_use]
    pub fn statistics(&self) -> Option<BalloonStatistics> {
        self.0.lock().statistics
    }

    /// Asks the driver for new [`statistics`](Self::statistics), which come in a while, if it tells any.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ask_statistics(&self) -> io::Result<()> {
        self.0.ask.write(1)
    }
}
