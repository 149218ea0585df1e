//! Modern virtio over PCI (virtio 1.2 §4.1): a [`VirtioPciDevice`] is a [`pci::PciDevice`] with a [`VirtioDevice`] behind it.
//!
//! | offset in BAR 0 (64 KiB, 64-bit) | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | configuration of the device |
//! | 0x3000 | notifications, 4 bytes a queue |
//! | 0x4000 | MSI-X pending bits |
//! | 0x5000 | MSI-X table: a vector for the configuration and one a queue |
//!
//! There is no interrupt pin. A driver without MSI-X sees the ISR status set, and has to poll it.
//!
//! [`VirtioDevice`]: vm_virtio::VirtioDevice

mod common;
mod device;
mod interrupt;
mod layout;
mod notify;
mod state;
#[cfg(test)]
pub(crate) mod tests;

use pci::{ConfigurationError, MsixError, StateError};
use std::io;
use thiserror::Error;
use vm_migration::MigrationError;
use vm_virtio::CoreError;

pub use device::{Host, VirtioPciDevice};
pub use interrupt::NO_VECTOR;
pub use layout::MAX_QUEUES;
pub use notify::{ByHand, Notifications};
pub use state::VirtioPciV1;

/// What can go wrong with a device behind the transport, the guest aside.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The device does not fit the transport.
    #[error(
        "virtio device {id:?} of type {device_type}, with {queues} queues and {config_len} bytes of configuration, cannot be on PCI"
    )]
    Device {
        /// Its name.
        id: String,
        /// Its type.
        device_type: u32,
        /// Its queues; at most [`MAX_QUEUES`].
        queues: usize,
        /// Bytes of its configuration space; at most 4096.
        config_len: usize,
    },
    /// Configuration space cannot hold it.
    #[error("the configuration space of virtio device {id:?}")]
    Configuration {
        /// Its name.
        id: String,
        /// Why not.
        #[source]
        source: ConfigurationError,
    },
    /// It cannot have its vectors.
    #[error("the interrupts of virtio device {id:?}")]
    Msix {
        /// Its name.
        id: String,
        /// Why not.
        #[source]
        source: MsixError,
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
    /// The saved configuration space is of another device.
    #[error("the saved state of virtio device {id:?} does not fit it")]
    Fit {
        /// Its name.
        id: String,
        /// Where it differs.
        #[source]
        source: StateError,
    },
    /// The saved state is of a device with other queues, or has other sections.
    #[error("the saved state of virtio device {id:?} has {what}")]
    Mismatch {
        /// Its name.
        id: String,
        /// The difference.
        what: &'static str,
    },
}
