//! The block device (virtio 1.2 §5.2) over a disk of [`block_util`]: each queue has a thread and a way into the disk of its own,
//! and data go between guest memory and disk without a copy.

mod affinity;
mod config;
mod device;
mod queue;
mod request;
mod shared;
mod state;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::io;

use block_util::{DiskError, Engine, RateLimiterError};
use thiserror::Error;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

pub use device::Block;
pub use shared::BlockControl;
pub use state::BlockV1;

/// Bytes of a serial number.
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// How a disk is offered to the driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BlockConfig {
    /// Names its threads.
    pub id: String,
    /// Queues, at least 1.
    pub queues: u16,
    /// The most entries of each, a power of two up to 32768.
    pub queue_size: u16,
    /// Up to [`SERIAL_LEN`] bytes.
    pub serial: String,
    /// How requests reach the kernel.
    pub engine: Engine,
    /// CPUs of the host that each queue's thread is bound to; none, or no entry, and it may run anywhere.
    pub affinity: Vec<Vec<usize>>,
    /// A queue's thread looks for more requests for some microseconds before it sleeps, where that pays.
    pub poll: bool,
}

/// Why a disk cannot be offered, or cannot change.
#[derive(Debug, Error)]
pub enum BlockError {
    /// No queues.
    #[error("disk {0:?} has no queues")]
    NoQueues(String),
    /// A queue cannot have that size.
    #[error("disk {id:?} cannot have queues of {size} entries: a power of two from 4 to 32768")]
    QueueSize {
        /// Of the disk.
        id: String,
        /// Entries.
        size: u16,
    },
    /// The serial number is too long.
    #[error("the serial number {serial:?} of disk {id:?} has more than {SERIAL_LEN} bytes")]
    Serial {
        /// Of the disk.
        id: String,
        /// As given.
        serial: String,
    },
    /// What the disk says.
    #[error("disk {id:?}")]
    Disk {
        /// Of the disk.
        id: String,
        /// The disk's error.
        #[source]
        source: DiskError,
    },
    /// A queue's thread cannot be bound.
    #[error("binding queue {queue} of disk {id:?} to CPUs {cpus:?} of the host")]
    Affinity {
        /// Of the disk.
        id: String,
        /// Of the queue.
        queue: usize,
        /// CPUs asked for.
        cpus: Vec<usize>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It cannot be limited.
    #[error("limiting the rate of disk {id:?}")]
    Limit {
        /// Of the disk.
        id: String,
        /// Why not.
        #[source]
        source: RateLimiterError,
    },
}
