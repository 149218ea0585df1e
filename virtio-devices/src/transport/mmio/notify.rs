//! How the driver's notifications come to the device (virtio 1.2 §4.2.3.3): without an exit to user space where the VMM can have it.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Lets guest writes to the device's register of notifications raise an eventfd: with KVM an ioeventfd that compares the value.
pub trait Notifications: Send + Sync {
    /// From now on a write of the 32-bit value `queue` to the register adds 1 to `event`.
    ///
    /// # Errors
    /// It cannot be had: the writes then come to the device, which is slower and no more.
    fn connect(&self, queue: u16, event: &EventFd) -> io::Result<()>;

    /// Ends what [`connect`](Self::connect) did with the same arguments.
    ///
    /// # Errors
    /// What the kernel said.
    fn disconnect(&self, queue: u16, event: &EventFd) -> io::Result<()>;
}

/// No short way: all writes come to the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByHand;

impl Notifications for ByHand {
    fn connect(&self, _queue: u16, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn disconnect(&self, _queue: u16, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}
