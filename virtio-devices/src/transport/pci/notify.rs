//! How the driver's notifications come to the device (virtio 1.2 §4.1.4.4): without an exit to user space where the VMM can have it.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Lets guest writes to an address raise an eventfd: with KVM an ioeventfd. Called while the bus places BARs, so that
/// it must not change the bus.
pub trait Notifications: Send + Sync {
    /// From now on a write to `address`, of 2 bytes or any width, whatever the value, adds 1 to `event`.
    ///
    /// # Errors
    /// It cannot be had: the writes then come to the BAR, which is slower and no more.
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Ends what [`connect`](Self::connect) did with the same arguments.
    ///
    /// # Errors
    /// What the kernel said.
    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// No short way: all writes come to the BAR.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByHand;

impl Notifications for ByHand {
    fn connect(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn disconnect(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}
