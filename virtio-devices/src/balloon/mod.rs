//! The balloon (virtio 1.2 §5.5): the guest gives pages of its RAM to the device, and the host has them for others until the guest wants
//! them back.
//!
//! ```text
//!   BalloonControl::resize ──> configuration ──> driver
//!   driver ──> inflateq (0)  page numbers      ──> the host has the pages
//!          ──> deflateq (1)  page numbers      ──> nothing to do: a touch brings a page back
//!          ──> statsq (2)    BalloonStatistics ──> stays until new ones are asked for
//!          ──> reporting_vq  free pages        ──> the host has the pages until the guest touches them
//! ```
//!
//! ```
//! use std::sync::Arc;
//! use virtio_devices::{Balloon, BalloonConfig};
//! use vm_memory::{Bytes, GuestAddress};
//! use vm_virtio::testing::{self, Guest, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ram = testing::memory();
//! let config = BalloonConfig { id: "balloon".into(), ram: 4 << 20, ..BalloonConfig::default() };
//! let balloon = Balloon::new(config, ram.clone())?;
//! let control = balloon.control();
//! let mut guest = Guest::with_memory(Box::new(balloon), ram.clone());
//! guest.start(u64::MAX);
//!
//! control.resize(8192)?;
//! // The driver gives up the pages 3 and 2.
//! ram.write_obj(1u8, GuestAddress(0x3000))?;
//! guest.ask(0, &Request { readable: [3u32, 2].map(u32::to_le_bytes).concat(), writable: 0 });
//! guest.core.write_config(4, &2u32.to_le_bytes());
//! assert_eq!(control.actual(), 8192);
//! assert_eq!(ram.read_obj::<u8>(GuestAddress(0x3000))?, 0);
//! # Ok(()) }
//! ```

mod control;
mod handler;
mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, DeviceError, DeviceMemory, DeviceQueue, VirtioDevice, Worker, read_config_bytes,
};

pub use control::BalloonControl;
pub use statistics::BalloonStatistics;

use crate::discard::DiscardRam;
use control::Shared;
use handler::Handler;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;
/// Queues where all features are there (§5.5.2).
const MAX_QUEUES: u16 = 5;
/// Queues without free page reporting.
const QUEUES: usize = 3;
/// Bytes of a page, whatever the guest's own pages are (§5.5.6).
const PAGE: u64 = 4096;
/// Bytes of the configuration space without the fields of other features.
const CONFIG_LEN: usize = 8;
/// Offset of the field that the driver writes: pages that the balloon has.
const ACTUAL: usize = 4;

/// The driver tells statistics (§5.5.3).
const STATS_VQ: u64 = 1 << 1;
/// The driver may take pages back when the guest has no others left.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver tells of free pages.
const REPORTING: u64 = 1 << 5;

/// How a balloon is offered to the driver.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct BalloonConfig {
    /// Names the device's thread.
    pub id: String,
    /// Bytes that it should have at first.
    pub size: u64,
    /// Bytes of the guest's RAM: the most that it can have.
    pub ram: u64,
    /// The driver may take pages back when the guest has no others left.
    pub deflate_on_oom: bool,
    /// The driver tells of free pages, which the host then has until they are used.
    pub free_page_reporting: bool,
}

/// Why a balloon cannot be, or not have that size.
#[derive(Debug, Error)]
pub enum BalloonError {
    /// Larger than RAM.
    #[error("a balloon cannot have {size} bytes: there are {ram}")]
    TooLarge {
        /// Bytes wanted.
        size: u64,
        /// The most there can be.
        ram: u64,
    },
    /// No whole number of pages.
    #[error("a balloon cannot have {0} bytes: it has pages of 4096")]
    NoPages(u64),
    /// An eventfd could not be had.
    #[error("making the events of a balloon")]
    Event(#[source] io::Error),
}

/// A balloon.
pub struct Balloon<M> {
    config: BalloonConfig,
    ram: Arc<dyn DiscardRam>,
    shared: Arc<Shared>,
    worker: Option<Worker<Handler<M>>>,
}

impl<M> Balloon<M> {
    /// A balloon that gives pages of `ram` back to the host. Page numbers are guest-physical, whatever memory the queues are in.
    ///
    /// # Errors
    /// [`BalloonError`].
    pub fn new(config: BalloonConfig, ram: Arc<dyn DiscardRam>) -> Result<Self, BalloonError> {
        let shared = Arc::new(Shared::new(config.size, config.ram)?);
        Ok(Self {
            config,
            ram,
            shared,
            worker: None,
        })
    }

    /// To change the balloon with, once the device is behind a transport.
    #[must_use]
    pub fn control(&self) -> BalloonControl {
        BalloonControl::new(self.shared.clone())
    }
}

/// What is saved of a balloon; the pages that it has are absent from RAM. In pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonV1 {
    /// Pages that it should have.
    pub target: u32,
    /// The target of which the driver knows.
    pub told: u32,
    /// Pages that it has, as the driver says.
    pub actual: u32,
}

impl Schema for BalloonV1 {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioDevice<M> for Balloon<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let mut features = RING_FEATURES | STATS_VQ;
        if self.config.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if self.config.free_page_reporting {
            features |= REPORTING;
        }
        features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        const SIZES: &[u16; MAX_QUEUES as usize] = &[QUEUE_SIZE; MAX_QUEUES as usize];
        if self.config.free_page_reporting {
            SIZES
        } else {
            SIZES.first_chunk::<QUEUES>().map_or(&[], |sizes| sizes)
        }
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(self.shared.config().as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.shared.set_actual(u32::from_le_bytes(bytes));
        }
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            spawn,
        } = activation;
        let handler = Handler::new(
            queues,
            memory,
            features,
            self.ram.clone(),
            self.shared.clone(),
        );
        let worker = Worker::start(&self.config.id, vec![handler], interrupt.clone(), &spawn)?;
        self.worker = Some(worker);
        self.shared.attach(interrupt);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        self.shared.detach();
        let handlers = Worker::stop_any(&mut self.worker)?;
        Ok(handlers
            .into_iter()
            .flat_map(Handler::into_queues)
            .collect())
    }

    fn reset(&mut self) {
        self.shared.reset();
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &self.shared.save())
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        self.shared.restore(&section.decode()?);
        Ok(())
    }
}
