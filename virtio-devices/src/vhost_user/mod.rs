//! Devices that another process serves, by the vhost-user protocol (QEMU's "Vhost-user Protocol" document): this is the front end, and
//! knows the guest; the process at the other end of a UNIX socket is the back end, and does the work.
//!
//! ```text
//!  driver ── notification ──> kick eventfd ──────────────────────> back end ── reads and writes ──> guest memory, rings in it
//!  driver <── interrupt ── worker <── call eventfd ─────────────── back end
//!  device ── features, memory, rings, start, stop, configuration ─ socket ── back end
//! ```
//!
//! [`front`](self) holds what is the same for each type of device: it connects, agrees on features, hands memory and rings over when the
//! driver starts the device, and takes them back when it is stopped. A type of device is a small file that says which features it knows and
//! what its configuration space is: [`VhostUserBlock`].
//!
//! The back end is trusted with guest memory, all of it, and with nothing else. It cannot make the front end wait for longer than
//! [`patience`](VhostUserConfig::patience) at a time, and whatever it says is checked. If it goes away, or breaks the rules, the device wants a reset; when the driver
//! starts it again, the front end connects again.
//!
//! Guest memory has to be shared: a mapping that another process can have too. Regions that are not are kept from the back end.
//!
//! ```no_run
//! use std::sync::Arc;
//! use virtio_devices::vhost_user::{VhostUserBlock, VhostUserConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = VhostUserConfig {
//!     id: "disk0".into(),
//!     socket: "/run/disk0.sock".into(),
//!     queues: 1,
//!     queue_size: 128,
//!     patience: std::time::Duration::from_secs(10),
//!     spawn: Arc::new(|name, job| std::thread::Builder::new().name(name).spawn(job).map(drop)),
//!     lost: Arc::new(|error| eprintln!("{error}")),
//! };
//! let disk = VhostUserBlock::new(config, false)?;
//! # let _: Box<dyn vm_virtio::VirtioDevice<Arc<vm_memory::GuestMemoryMmap>>> = Box::new(disk);
//! # Ok(()) }
//! ```

mod blk;
mod channel;
mod connection;
mod events;
mod front;
mod memory;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use vm_virtio::Spawn;

pub use blk::{VhostUserBlock, VhostUserBlockV1};

/// Where the back end is, and the queues that it is to serve.
#[derive(Clone)]
pub struct VhostUserConfig {
    /// Names the device's threads.
    pub id: String,
    /// The socket at which the back end listens.
    pub socket: PathBuf,
    /// Queues, at least 1.
    pub queues: u16,
    /// The most entries of each, a power of two up to 32768.
    pub queue_size: u16,
    /// How long it may take to answer all that is asked at a time: to start the device or to stop it.
    pub patience: Duration,
    /// Starts threads: one while the device works, and one while the back end is waited for.
    pub spawn: Spawn,
    /// Hears why a back end was lost, once for each connection.
    pub lost: Arc<dyn Fn(&VhostUserError) + Send + Sync>,
}

/// What can go wrong between front end and back end.
#[derive(Debug, Error)]
pub enum VhostUserError {
    /// No queues, or of a size that there is not.
    #[error(
        "{queues} queues of {size} entries cannot be: at least one, of a power of two up to 32768"
    )]
    Config {
        /// Queues.
        queues: u16,
        /// Entries of each.
        size: u16,
    },
    /// Nobody answers at the socket.
    #[error("connecting to the vhost-user back end at {socket:?}")]
    Connect {
        /// Its path.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The back end does not do what it is asked.
    #[error("the vhost-user back end at {socket:?} does not {what}")]
    Ask {
        /// Path of its socket.
        socket: PathBuf,
        /// What it was to do, as in "take the rings".
        what: &'static str,
        /// What is wrong.
        #[source]
        source: vhost::Error,
    },
    /// It takes too long.
    #[error("the vhost-user back end at {socket:?} does not {what} within {patience:?}")]
    Slow {
        /// Path of its socket.
        socket: PathBuf,
        /// What it was to do.
        what: &'static str,
        /// What it had.
        patience: Duration,
    },
    /// It cannot do what a device of this type needs.
    #[error("the vhost-user back end at {socket:?} has no {what}")]
    Lacks {
        /// Path of its socket.
        socket: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// It serves fewer queues.
    #[error(
        "the vhost-user back end at {socket:?} serves {most} queues, and num_queues is {wanted}"
    )]
    Queues {
        /// Path of its socket.
        socket: PathBuf,
        /// What it serves.
        most: u64,
        /// What it should.
        wanted: u16,
    },
    /// What it serves can be written, and must not be.
    #[error(
        "the vhost-user back end at {socket:?} serves a disk that can be written, and readonly=on"
    )]
    Writable {
        /// Path of its socket.
        socket: PathBuf,
    },
    /// The back end that came after another is not like it.
    #[error("the vhost-user back end at {socket:?} is another than before")]
    Changed {
        /// Path of its socket.
        socket: PathBuf,
    },
    /// It closed its socket.
    #[error("the vhost-user back end at {socket:?} is gone")]
    Gone {
        /// Path of its socket.
        socket: PathBuf,
    },
    /// It stopped while it had chains of the driver's.
    #[error("the vhost-user back end at {socket:?} stopped queue {queue} with requests in it")]
    Unfinished {
        /// Path of its socket.
        socket: PathBuf,
        /// The queue.
        queue: u16,
    },
    /// It cannot have guest memory.
    #[error("guest memory for the vhost-user back end: {0}")]
    Memory(&'static str),
    /// A ring is where a back end cannot have it.
    #[error("the rings of queue {queue} are not in one piece of shared memory")]
    Ring {
        /// The queue.
        queue: u16,
    },
    /// No descriptor, or no thread.
    #[error("preparing for the vhost-user back end at {socket:?}")]
    Prepare {
        /// Path of its socket.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
