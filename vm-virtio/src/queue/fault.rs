//! What a driver can do wrong with a queue.

use thiserror::Error;
use vm_memory::GuestMemoryError;

/// A fault in one queue: the device wants a reset, and the queue is served no more until then.
#[derive(Debug, Error)]
#[error("virtqueue {queue}")]
pub struct QueueError {
    /// Index of the queue in its device.
    pub queue: u16,
    /// What is wrong with it.
    #[source]
    pub fault: Fault,
}

/// What is wrong with a queue. All of it is the driver's doing.
#[derive(Debug, Error)]
pub enum Fault {
    /// The address of a ring is not a multiple of what it must be, or the ring is not all in memory.
    #[error("the {ring} of {size} entries cannot be at {address:#x}")]
    Ring {
        /// `descriptor table`, `available ring` or `used ring`.
        ring: &'static str,
        /// Address the driver gave.
        address: u64,
        /// Entries.
        size: u16,
    },
    /// The driver has more chains with the device than the queue has entries.
    #[error("the driver offers {count} descriptor chains, and there can be {size}")]
    Offered {
        /// Chains available, or with the device.
        count: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// An index is past the end of its descriptor table.
    #[error("descriptor {index} is not in the table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// More descriptors than there can be: the chain is a loop, or longer than allowed.
    #[error("descriptor chain {head} has more than {limit} descriptors")]
    Endless {
        /// First descriptor.
        head: u16,
        /// The most there may be.
        limit: u32,
    },
    /// A buffer of no bytes.
    #[error("descriptor chain {head} has an empty buffer")]
    Empty {
        /// First descriptor.
        head: u16,
    },
    /// A buffer that the device reads comes after one that it writes (virtio 1.2 §2.7.4.2).
    #[error("in descriptor chain {head} a readable buffer follows a writable one")]
    Order {
        /// First descriptor.
        head: u16,
    },
    /// All buffers together are 4 GiB or more (§2.7.5.2).
    #[error("the buffers of descriptor chain {head} are 4 GiB or more")]
    TooLong {
        /// First descriptor.
        head: u16,
    },
    /// A buffer is not all in memory that the device may reach.
    #[error("a buffer of descriptor chain {head}, {len} bytes at {address:#x}, is not in memory")]
    OutOfRange {
        /// First descriptor.
        head: u16,
        /// Address of the buffer.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// An indirect table that breaks the rules (§2.7.5.3.1).
    #[error("the indirect table of descriptor chain {head} {what}")]
    Indirect {
        /// First descriptor.
        head: u16,
        /// In which way.
        what: &'static str,
    },
    /// A ring or a buffer that was in memory is no more.
    #[error("accessing the {what}")]
    Memory {
        /// What was accessed.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: GuestMemoryError,
    },
    /// The chain has fewer bytes than the device needs.
    #[error("{wanted} bytes are wanted of a buffer that has {left} left")]
    Short {
        /// Bytes the device wanted to read or write.
        wanted: usize,
        /// Bytes that are left.
        left: usize,
    },
    /// A request that the device cannot even answer.
    #[error("{0}")]
    Request(&'static str),
}
