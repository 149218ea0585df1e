//! Virtio over memory-mapped registers (virtio 1.2 §4.2), version 2: a [`VirtioMmioDevice`] is a [`vm_device::BusDevice`] of one page with a
//! [`VirtioDevice`] behind it.
//!
//! | offset | what |
//! |---|---|
//! | 0x000–0x0ff | registers, 32 bits each, accessed whole |
//! | 0x050 | notifications: the number of a queue |
//! | 0x100–0xfff | configuration of the device, in any width |
//!
//! Its interrupt is an edge for each event; the interrupt status says of which kind. There are no shared memory regions, and queues are
//! not reset one by one, for that feature is not offered.
//!
//! [`VirtioDevice`]: vm_virtio::VirtioDevice

mod device;
mod interrupt;
mod notify;
mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::io;

use thiserror::Error;
use vm_migration::MigrationError;
use vm_virtio::CoreError;

pub use device::{Host, MAX_CONFIG, SIZE, VirtioMmioDevice};
pub use notify::{ByHand, Notifications};
pub use registers::QUEUE_NOTIFY;
pub use state::VirtioMmioV1;

/// What can go wrong with a device behind the transport, the guest aside.
#[derive(Debug, Error)]
pub enum MmioError {
    /// The device does not fit into its page.
    #[error(
        "virtio device {id:?}, with {config_len} bytes of configuration, does not fit into a page of registers"
    )]
    Device {
        /// Its name.
        id: String,
        /// Bytes of its configuration space; at most [`MAX_CONFIG`].
        config_len: usize,
    },
    /// A descriptor of a notification could not be had.
    #[error("the notifications of virtio device {id:?}")]
    Notification {
        /// Its name.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device itself.
    #[error("virtio device {id:?}")]
    Core {
        /// Its name.
        id: String,
        /// What is wrong.
        #[source]
        source: CoreError,
    },
    /// A section cannot be written or read.
    #[error("the state of virtio device {id:?}")]
    State {
        /// Its name.
        id: String,
        /// Why not.
        #[source]
        source: MigrationError,
    },
    /// The saved state has other sections.
    #[error("the saved state of virtio device {id:?} has {what}")]
    Mismatch {
        /// Its name.
        id: String,
        /// The difference.
        what: &'static str,
    },
}
