//! The persistent memory device (virtio 1.2 §5.19): a range of guest-physical memory that is a file of the host, and a queue of requests
//! to make what was written there last.
//!
//! The device says where the memory is; to have the file there is the affair of whoever makes it.
//!
//! ```
//! use virtio_devices::{Pmem, PmemConfig};
//! use vm_virtio::testing::{Guest, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = tempfile::tempfile()?;
//! file.set_len(2 << 20)?;
//! let config = PmemConfig { id: "pmem0".into(), start: 4 << 30, size: 2 << 20 };
//! // A VMM gives the mapping here, so that it lives as long as the device.
//! let mut guest = Guest::running(Box::new(Pmem::new(config, Some(file), Box::new(()))));
//!
//! // FLUSH is answered with OK.
//! let answer = guest.ask(0, &Request { readable: vec![0; 4], writable: 4 });
//! assert_eq!(answer, [0; 4]);
//! # Ok(()) }
//! ```

use std::fs::File;
use std::io;

use log::debug;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::GuestMemory;
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, Chain, Context, DeviceError, DeviceMemory, DeviceQueue, Fault, Outcome, QueueError,
    QueueHandler, VirtioDevice, Worker, read_config_bytes,
};

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes of the configuration space (§5.19.4): le64 start, le64 size.
const CONFIG_LEN: usize = 16;
/// The only type of request (§5.19.6).
const TYPE_FLUSH: u32 = 0;
/// Answer: it is done (§5.19.6.1).
const RESPONSE_OK: u32 = 0;
/// Answer: it failed.
const RESPONSE_EIO: u32 = 1;
/// Bytes of an answer.
const RESPONSE_LEN: u32 = 4;

/// Where the memory is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PmemConfig {
    /// Names the device's thread.
    pub id: String,
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// The file cannot be used from the device's thread.
#[derive(Debug, Error)]
#[error("using the file of persistent memory {id:?}")]
struct ShareError {
    id: String,
    #[source]
    source: io::Error,
}

/// A persistent memory device.
pub struct Pmem<M> {
    config: PmemConfig,
    /// None where writes are not to last.
    file: Option<File>,
    worker: Option<Worker<Handler<M>>>,
    /// Dropped after all else.
    _mapping: Box<dyn Send>,
}

impl<M> Pmem<M> {
    /// Memory at the place of `config` that is `file`, or, without one, memory whose content nobody keeps. `mapping` is dropped with the
    /// device: it takes the memory away from the guest.
    #[must_use]
    pub fn new(config: PmemConfig, file: Option<File>, mapping: Box<dyn Send>) -> Self {
        Self {
            config,
            file,
            worker: None,
            _mapping: mapping,
        }
    }
}

/// The device has no state of its own.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PmemV1 {}

impl Schema for PmemV1 {
    const KIND: &'static str = "virtio-pmem";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioDevice<M> for Pmem<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let PmemConfig { start, size, .. } = self.config;
        let fields = [start.to_le_bytes(), size.to_le_bytes()];
        read_config_bytes(fields.as_flattened(), offset, data);
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let file = self.file.as_ref().map(File::try_clone).transpose();
        let handler = Handler {
            queues: activation.queues,
            memory: activation.memory,
            file: file.map_err(|source| {
                let id = self.config.id.clone();
                DeviceError::Device("persistent memory", Box::new(ShareError { id, source }))
            })?,
        };
        self.worker = Some(Worker::start(
            &self.config.id,
            vec![handler],
            activation.interrupt,
            &activation.spawn,
        )?);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        let handlers = Worker::stop_any(&mut self.worker)?;
        Ok(handlers.into_iter().flat_map(|h| h.queues).collect())
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &PmemV1 {})
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let PmemV1 {} = section.decode()?;
        Ok(())
    }
}

/// Serves the one queue.
struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    file: Option<File>,
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
        // A flush can take long: after each the worker looks whether it is to stop.
        let mut flushed = false;
        context.serve(queue, &*memory, |chain| {
            if flushed {
                return Ok(Outcome::Later);
            }
            flushed = true;
            answer(self.file.as_ref(), &*memory, chain)
        })?;
        if flushed {
            context.again(index);
        }
        Ok(())
    }
}

/// Does one request.
fn answer<M: GuestMemory>(
    file: Option<&File>,
    memory: &M,
    chain: &Chain,
) -> Result<Outcome, Fault> {
    let kind = u32::from_le(chain.reader(memory).read_obj()?);
    let mut writer = chain.writer(memory);
    if writer.left() < RESPONSE_LEN as usize {
        return Err(Fault::Short {
            wanted: RESPONSE_LEN as usize,
            left: writer.left(),
        });
    }
    let response = match (kind, file) {
        // What the guest wrote through the mapping is in the file's page cache.
        (TYPE_FLUSH, Some(file)) => match file.sync_data() {
            Ok(()) => RESPONSE_OK,
            Err(error) => {
                debug!("flushing persistent memory: {error}");
                RESPONSE_EIO
            }
        },
        (TYPE_FLUSH, None) => RESPONSE_OK,
        _ => RESPONSE_EIO,
    };
    writer.write_obj(response.to_le())?;
    Ok(Outcome::Used(RESPONSE_LEN))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_virtio::testing::conformance::Subject;
    use vm_virtio::testing::{Guest, Request, TestMemory};

    use super::*;

    fn config() -> PmemConfig {
        PmemConfig {
            id: "pmem".into(),
            start: 0x1_2345_0000_0000,
            size: 6 << 20,
        }
    }

    fn device(file: Option<File>) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(Pmem::new(config(), file, Box::new(())))
    }

    fn request(kind: u32) -> Request {
        Request {
            readable: kind.to_le_bytes().to_vec(),
            writable: 4,
        }
    }

    struct Flushes;

    impl Subject for Flushes {
        fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
            device(Some(tempfile::tempfile().unwrap()))
        }

        fn request(&self, n: u32) -> Request {
            request(n % 2)
        }

        fn check(&self, n: u32, answer: &[u8]) {
            // Of the two types one is known.
            assert_eq!(answer, (n % 2).to_le_bytes());
        }
    }

    vm_virtio::conformance!(conformance, Flushes);

    #[test]
    fn the_driver_learns_where_the_memory_is() {
        let guest = Guest::new(device(None));
        let mut bytes = [0; 16];
        guest.core.read_config(0, &mut bytes);
        assert_eq!(bytes[..8], 0x1_2345_0000_0000u64.to_le_bytes());
        assert_eq!(bytes[8..], (6u64 << 20).to_le_bytes());
    }

    #[test]
    fn without_a_file_there_is_nothing_to_flush() {
        let mut guest = Guest::running(device(None));
        assert_eq!(guest.ask(0, &request(0)), [0; 4]);
    }

    #[test]
    fn a_flush_that_fails_is_told() {
        // A pipe cannot be flushed.
        let (_reader, writer) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let mut guest = Guest::running(device(Some(file)));
        for _ in 0..2 {
            assert_eq!(guest.ask(0, &request(0)), [1, 0, 0, 0]);
        }
    }

    #[test]
    fn requests_without_room_for_an_answer_are_refused() {
        for (readable, writable) in [(3, 4), (4, 3), (4, 0), (0, 4)] {
            let mut guest = Guest::running(device(None));
            let readable = vec![0; readable];
            guest.offer(0, &Request { readable, writable });
            guest.kick(0);
            guest.wait_needs_reset();
            assert_eq!(guest.take_used(0), None);
        }
    }

    #[test]
    fn the_mapping_goes_with_the_device() {
        struct Mapping(Arc<AtomicBool>);
        impl Drop for Mapping {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let gone = Arc::new(AtomicBool::new(false));
        let pmem = Pmem::new(config(), None, Box::new(Mapping(gone.clone())));
        let guest = Guest::running(Box::new(pmem));
        assert!(!gone.load(Ordering::Relaxed));
        drop(guest);
        assert!(gone.load(Ordering::Relaxed));
    }
}
