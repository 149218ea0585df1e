//! The socket device (virtio 1.2 §5.10): streams between the guest's `AF_VSOCK` sockets and UNIX sockets of the host.
//!
//! ```text
//!   program of the host ── CONNECT port ──> listener at PATH ──> guest's port
//!   host's listener at PATH_PORT <─────────────────────────────── guest, to the host's port (context id 2)
//! ```
//!
//! `muxer` and `stream` know the protocol and do no I/O; `peer` and `listener` are the host's sockets; `streams` puts one to work on the
//! other, and `handler` is the thread with the queues. Bytes go between guest memory and socket without a copy; only what a host's
//! program does not take at once is held, up to 128 KiB a stream.
//!
//! A guest that greets a program of the host:
//!
//! ```
//! use std::io::Read;
//! use std::os::unix::net::UnixListener;
//!
//! use virtio_devices::{Vsock, VsockListener};
//! use vm_virtio::testing::{Guest, Request};
//!
//! /// A packet from port 1024 of guest 3 to port 80 of the host.
//! fn packet(op: u16, payload: &[u8]) -> Request {
//!     let mut bytes = Vec::new();
//!     bytes.extend(3u64.to_le_bytes());
//!     bytes.extend(2u64.to_le_bytes());
//!     bytes.extend(1024u32.to_le_bytes());
//!     bytes.extend(80u32.to_le_bytes());
//!     bytes.extend((payload.len() as u32).to_le_bytes());
//!     bytes.extend(1u16.to_le_bytes());
//!     bytes.extend(op.to_le_bytes());
//!     bytes.extend([0; 12]);
//!     bytes.extend(payload);
//!     Request { readable: bytes, writable: 0 }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let host = UnixListener::bind(dir.path().join("vsock_80"))?;
//! let listener = VsockListener::bind(&dir.path().join("vsock"))?;
//! let mut guest = Guest::running(Box::new(Vsock::new("_vsock", 3, listener)?));
//!
//! const REQUEST: u16 = 1;
//! const RW: u16 = 5;
//! guest.ask(1, &packet(REQUEST, b""));
//! guest.ask(1, &packet(RW, b"hello"));
//! let mut greeting = [0; 5];
//! host.accept()?.0.read_exact(&mut greeting)?;
//! assert_eq!(greeting, *b"hello");
//! # Ok(()) }
//! ```

mod handler;
mod listener;
mod muxer;
mod packet;
mod peer;
mod state;
mod stream;
mod streams;
#[cfg(test)]
mod tests;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_migration::{MigrationError, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, DeviceError, DeviceMemory, DeviceQueue, VirtioDevice, Worker, read_config_bytes,
};

pub use listener::{VsockError, VsockListener};
pub use muxer::MOST_STREAMS as MOST_VSOCK_STREAMS;
pub use state::VsockV1;

use handler::Handler;
use streams::Streams;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Streams are supported (§5.10.3).
const F_STREAM: u64 = 1 << 0;
/// Bytes of the configuration space (§5.10.4): the guest's context id.
const CONFIG_LEN: usize = 8;
/// Context ids that a guest may have: those below are reserved, the one above is for any.
const CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;

/// A socket device.
pub struct Vsock<M> {
    id: String,
    guest_cid: u64,
    listener: VsockListener,
    /// None while a worker has them.
    streams: Option<Streams>,
    /// The driver is to be told that all streams are gone.
    event: bool,
    worker: Option<Worker<Handler<M>>>,
}

impl<M> Vsock<M> {
    /// A device that gives the guest the context id `guest_cid`. `id` names the device's thread.
    ///
    /// # Errors
    /// [`VsockError::Cid`].
    pub fn new(id: &str, guest_cid: u64, listener: VsockListener) -> Result<Self, VsockError> {
        if !CIDS.contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        Ok(Self {
            id: id.to_owned(),
            guest_cid,
            streams: None,
            listener,
            event: false,
            worker: None,
        })
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Vsock<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            spawn,
            ..
        } = activation;
        let streams = self
            .streams
            .take()
            .unwrap_or_else(|| Streams::new(self.guest_cid, self.listener.clone()));
        let handler = Handler::new(queues, memory, streams, self.event);
        self.worker = Some(Worker::start(&self.id, vec![handler], interrupt, &spawn)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        let handlers = Worker::stop_any(&mut self.worker)?;
        let mut home = Vec::new();
        for handler in handlers {
            let (queues, streams, event) = handler.into_parts();
            home.extend(queues);
            self.streams = Some(streams);
            self.event = event;
        }
        Ok(home)
    }

    fn reset(&mut self) {
        if let Some(streams) = &mut self.streams {
            streams.clear();
        }
        self.event = false;
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &VsockV1 {})
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let VsockV1 {} = section.decode()?;
        self.event = true;
        Ok(())
    }
}
