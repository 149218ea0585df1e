//! The memory device (virtio 1.2 §5.15): a region of RAM in blocks of 2 MiB, of which the driver plugs as many as are wanted.
//!
//! ```text
//!   MemControl::resize ──> requested size ──> driver ──> PLUG, UNPLUG ──> the device says ACK, NACK or ERROR
//!                                                  unplugged blocks ──> the host has them back
//! ```
//!
//! Whoever makes the device has the whole region mapped in the guest. A guest that writes to blocks that are not plugged breaks the
//! rules, and takes memory of the host, up to the region's size.
//!
//! ```
//! use std::sync::Arc;
//! use virtio_devices::{MEM_BLOCK, Mem, MemConfig};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//! use vm_virtio::testing::{Guest, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let start = 4u64 << 30;
//! let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(start), 64 << 20)])?;
//! let config = MemConfig { id: "mem".into(), start, size: 64 << 20, requested: MEM_BLOCK };
//! let mem = Mem::new(config, Arc::new(ram), Box::new(()))?;
//! let control = mem.control();
//! let mut guest = Guest::running(Box::new(mem));
//!
//! // PLUG of one block is answered with ACK.
//! let mut plug = vec![0; 24];
//! plug[8..16].copy_from_slice(&start.to_le_bytes());
//! plug[16] = 1;
//! let answer = guest.ask(0, &Request { readable: plug, writable: 10 });
//! assert_eq!(answer, [0; 10]);
//! assert_eq!(control.plugged(), MEM_BLOCK);
//! # Ok(()) }
//! ```

mod blocks;
mod request;
mod shared;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, Context, DeviceError, DeviceMemory, DeviceQueue, Outcome, QueueError, QueueHandler,
    VirtioDevice, Worker, read_config_bytes,
};

pub use shared::MemControl;

use crate::discard::DiscardRam;
use request::{ANSWER_LEN, Request, check_room};
use shared::Shared;

/// Bytes of a block: what is plugged and unplugged at once. A huge page, so that the host can have it back.
pub const MEM_BLOCK: u64 = 2 << 20;
const BLOCK: u64 = MEM_BLOCK;
/// Entries of the queue.
const QUEUE_SIZE: u16 = 128;
/// Bytes of the configuration space (§5.15.4).
const CONFIG_LEN: usize = 56;
/// Memory that is not plugged must not even be read (§5.15.3).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Where the region is, and what should be plugged.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MemConfig {
    /// Names the device's thread.
    pub id: String,
    /// First guest-physical address, a multiple of [`MEM_BLOCK`].
    pub start: u64,
    /// Bytes, a multiple of [`MEM_BLOCK`].
    pub size: u64,
    /// Bytes that should be plugged at first, a multiple of [`MEM_BLOCK`].
    pub requested: u64,
}

/// Why a memory device cannot be, or not have that size.
#[derive(Debug, Error)]
pub enum MemError {
    /// The region is not made of blocks.
    #[error("{size:#x} bytes at {start:#x} are not whole blocks of 2 MiB")]
    Region {
        /// First address.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// That much cannot be plugged.
    #[error("{wanted} bytes cannot be plugged: a multiple of 2 MiB, up to {most}")]
    Size {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes of the region.
        most: u64,
    },
}

/// A memory device.
pub struct Mem<M> {
    id: String,
    shared: Arc<Shared>,
    worker: Option<Worker<Handler<M>>>,
    /// Dropped after all else.
    _mapping: Box<dyn Send>,
}

impl<M> Mem<M> {
    /// A device whose region is `ram` at the place of `config`, with no block plugged. `mapping` is dropped with the device: it takes
    /// the memory away from the guest.
    ///
    /// # Errors
    /// [`MemError`].
    pub fn new(
        config: MemConfig,
        ram: Arc<dyn DiscardRam>,
        mapping: Box<dyn Send>,
    ) -> Result<Self, MemError> {
        Ok(Self {
            shared: Arc::new(Shared::new(&config, ram)?),
            id: config.id,
            worker: None,
            _mapping: mapping,
        })
    }

    /// To change the device with, once it is behind a transport.
    #[must_use]
    pub fn control(&self) -> MemControl {
        MemControl::new(self.shared.clone())
    }
}

/// What is saved of a memory device; what the blocks hold is RAM.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemV1 {
    /// Bytes of the region.
    pub size: u64,
    /// Bytes that should be plugged.
    pub requested: u64,
    /// The request of which the driver knows.
    pub told: u64,
    /// First block, from the region's start, and number of blocks of each run that is plugged.
    pub plugged: Vec<(u64, u64)>,
}

impl Schema for MemV1 {
    const KIND: &'static str = "virtio-mem";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioDevice<M> for Mem<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        RING_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            spawn,
            ..
        } = activation;
        let handler = Handler {
            queues,
            memory,
            shared: self.shared.clone(),
        };
        let worker = Worker::start(&self.id, vec![handler], interrupt.clone(), &spawn)?;
        self.worker = Some(worker);
        self.shared.attach(interrupt);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        self.shared.detach();
        let handlers = Worker::stop_any(&mut self.worker)?;
        Ok(handlers.into_iter().flat_map(|h| h.queues).collect())
    }

    fn reset(&mut self) {
        self.shared.reset();
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &self.shared.save())
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let state: MemV1 = section.decode()?;
        if self.shared.restore(&state) {
            Ok(())
        } else {
            Err(MigrationError::Decode {
                kind: section.kind.clone(),
                id: section.id.clone(),
                source: serde::de::Error::custom("the blocks are not those of the device"),
            })
        }
    }
}

/// Serves the one queue.
struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    shared: Arc<Shared>,
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.first_mut() else {
            return Ok(());
        };
        let memory = self.memory.memory();
        // To give much memory back takes a while: after each request the worker looks whether it is to stop.
        let mut answered = false;
        context.serve(queue, &*memory, |chain| {
            if answered {
                return Ok(Outcome::Later);
            }
            answered = true;
            let request = Request::read(&*memory, chain)?;
            check_room(chain)?;
            let answer = self.shared.answer(request);
            answer.write(chain.writer(&*memory))?;
            // Ten bytes.
            Ok(Outcome::Used(ANSWER_LEN as u32))
        })?;
        if answered {
            context.again(index);
        }
        Ok(())
    }
}
