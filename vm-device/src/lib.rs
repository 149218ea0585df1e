//! Buses, bus devices, interrupt triggers and lifecycle traits. Knows no hypervisor.

mod bus;

use std::io;
use std::sync::{Mutex, PoisonError};

pub use bus::{Bus, BusError};
use vmm_sys_util::eventfd::EventFd;

/// A device on a port or memory bus, and no more. Called from any vCPU's thread.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the start of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A device whose registers need exclusive access; a `Mutex` around it is a [`BusDevice`].
pub trait BusDeviceMut: Send {
    /// As [`BusDevice::read`].
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// As [`BusDevice::write`].
    fn write(&mut self, offset: u64, data: &[u8]);
}

impl<T: BusDeviceMut> BusDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }
}

/// An interrupt, whoever delivers it.
pub trait Trigger: Send + Sync {
    /// Raises it: an edge.
    fn trigger(&self) -> io::Result<()>;
}

/// Writing an eventfd: an irqfd, or a note to another thread.
impl Trigger for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// Any function can be an interrupt.
impl<F> Trigger for F
where
    F: Fn() -> io::Result<()> + Send + Sync,
{
    fn trigger(&self) -> io::Result<()> {
        self()
    }
}
