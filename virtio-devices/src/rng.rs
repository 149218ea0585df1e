//! The entropy device (virtio 1.2 §5.4): fills the driver's buffers from a file of the host, `/dev/urandom` as a rule.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::debug;
use option_parser::{OptionError, OptionText};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::{GuestMemory, ReadVolatile, VolatileMemoryError};
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, Chain, Context, DeviceError, DeviceMemory, DeviceQueue, EventSet, Fault, Outcome,
    QueueError, QueueHandler, Source, VirtioDevice, Worker,
};

use crate::offer::{HostError, Offer, Services};

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// The most bytes for one request: a device may fill less than the driver has room for (§5.4.6.2), and a request takes little time.
const MAX_REQUEST: u32 = 64 << 10;
/// O_NONBLOCK of Linux: a source that has nothing at the moment must not hold up a pause.
const O_NONBLOCK: i32 = 0o4000;

/// Why there is no entropy.
#[derive(Debug, Error)]
pub enum RngError {
    /// The source does not open.
    #[error("opening the source of entropy {path:?}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The source is a directory, which has no bytes.
    #[error("the source of entropy {path:?} is a directory")]
    Directory {
        /// Its path.
        path: PathBuf,
    },
    /// There is no second descriptor of it, for the device's thread.
    #[error("using the source of entropy {path:?}")]
    Share {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What can be chosen of the device, which is always there.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RngConfig {
    /// A file whose bytes are random.
    pub src: PathBuf,
    /// Behind the virtual IOMMU.
    pub iommu: bool,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
            iommu: false,
        }
    }
}

impl Offer for RngConfig {
    const HELP: &'static str =
        "src=FILE (/dev/urandom), iommu=on|off (off): entropy; the device is always there";
    const VALUE: Option<&'static str> = Some("list");

    fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        let text = OptionText::parse(option, &["src", "iommu"], text)?;
        let default = Self::default();
        Ok(Self {
            src: text.text("src").map_or(default.src, PathBuf::from),
            iommu: text.toggle("iommu")?.unwrap_or(default.iommu),
        })
    }

    fn iommu(&self) -> bool {
        self.iommu
    }

    fn make<M: DeviceMemory>(
        &self,
        id: &str,
        _: &Services,
    ) -> Result<Option<Box<dyn VirtioDevice<M>>>, HostError> {
        Ok(Some(Box::new(Rng::open(id, &self.src)?)))
    }
}

/// An entropy device.
pub struct Rng<M> {
    id: String,
    path: PathBuf,
    source: File,
    worker: Option<Worker<Handler<M>>>,
}

impl<M> Rng<M> {
    /// Reads from `path`. `id` names the device's thread.
    ///
    /// # Errors
    /// [`RngError::Open`], [`RngError::Directory`].
    pub fn open(id: &str, path: &Path) -> Result<Self, RngError> {
        let failed = |source| RngError::Open {
            path: path.to_owned(),
            source,
        };
        let source = OpenOptions::new()
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        if source.metadata().map_err(failed)?.is_dir() {
            return Err(RngError::Directory {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            id: id.to_owned(),
            path: path.to_owned(),
            source,
            worker: None,
        })
    }
}

/// The device has no state of its own.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RngV1 {}

impl Schema for RngV1 {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioDevice<M> for Rng<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let source = self.source.try_clone().map_err(|source| {
            let path = self.path.clone();
            DeviceError::Device("entropy", Box::new(RngError::Share { path, source }))
        })?;
        let handler = Handler {
            queues: activation.queues,
            memory: activation.memory,
            source,
        };
        self.worker = Some(Worker::start(
            &self.id,
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
        Section::encode(id, &RngV1 {})
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let RngV1 {} = section.decode()?;
        Ok(())
    }
}

/// Serves the one queue.
struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    source: File,
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn on_queue(&mut self, _index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.first_mut() else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let mut dry = false;
        context.serve(queue, &*memory, |chain| {
            let outcome = fill(&mut self.source, &*memory, chain)?;
            dry = outcome == Outcome::Later;
            Ok(outcome)
        })?;
        if dry {
            let watched = context.watch(&Source {
                fd: self.source.as_raw_fd(),
                events: EventSet::IN,
                token: 0,
            });
            watched.map_err(|error| {
                debug!("waiting for entropy: {error}");
                queue.error(Fault::Request("the source of entropy cannot be waited for"))
            })?;
        }
        Ok(())
    }

    fn on_source(
        &mut self,
        token: u32,
        _events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        context.unwatch(token);
        self.on_queue(0, context)
    }
}

/// Fills what it can of `chain`, but no more than [`MAX_REQUEST`].
fn fill<M: GuestMemory>(source: &mut File, memory: &M, chain: &Chain) -> Result<Outcome, Fault> {
    let wanted = chain.writable_len().min(MAX_REQUEST);
    let mut filled = 0;
    let mut ended = None;
    chain.writer(memory).slices(wanted as usize, |mut slice| {
        while ended.is_none() && !slice.is_empty() {
            match source.read_volatile(&mut slice) {
                Ok(0) => ended = Some(io::ErrorKind::UnexpectedEof),
                Ok(count) => {
                    // No more than the slice, which is no more than what is wanted.
                    filled += count as u32;
                    slice = slice.offset(count).map_err(|_| Fault::Request("a slice"))?;
                }
                Err(VolatileMemoryError::IOError(e)) => match e.kind() {
                    io::ErrorKind::Interrupted => {}
                    kind => ended = Some(kind),
                },
                Err(_) => ended = Some(io::ErrorKind::Other),
            }
        }
        Ok(())
    })?;
    match ended {
        Some(io::ErrorKind::WouldBlock) if filled == 0 => Ok(Outcome::Later),
        Some(kind) if filled == 0 => {
            debug!("the source of entropy: {kind}");
            Err(Fault::Request("the source of entropy has ended"))
        }
        _ => Ok(Outcome::Used(filled)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Write, pipe};

    use vm_virtio::testing::conformance::Subject;
    use vm_virtio::testing::{Guest, Request, TestMemory};

    use super::*;

    fn open(path: &Path) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(Rng::open("rng", path).unwrap())
    }

    /// A device whose source is what a test writes.
    fn piped() -> (Guest, PipeReader, PipeWriter) {
        let (reader, writer) = pipe().unwrap();
        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        (Guest::running(open(Path::new(&path))), reader, writer)
    }

    fn room(writable: u32) -> Request {
        Request {
            readable: Vec::new(),
            writable,
        }
    }

    struct Urandom;

    impl Subject for Urandom {
        fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
            open(Path::new("/dev/urandom"))
        }

        fn request(&self, n: u32) -> Request {
            room(64 + n % 64)
        }

        fn check(&self, n: u32, answer: &[u8]) {
            assert_eq!(answer.len(), 64 + n as usize % 64);
            // Once in 2^512 this is wrong.
            assert!(answer.iter().any(|byte| *byte != 0));
        }
    }

    vm_virtio::conformance!(conformance, Urandom);

    #[test]
    fn what_the_source_gives_is_what_the_driver_gets() {
        let (mut guest, _reader, mut writer) = piped();
        writer.write_all(b"0123456789").unwrap();
        assert_eq!(guest.ask(0, &room(4)), b"0123");
        // Less than there is room for.
        assert_eq!(guest.ask(0, &room(100)), b"456789");
    }

    #[test]
    fn a_source_that_has_nothing_is_waited_for() {
        let (mut guest, _reader, mut writer) = piped();
        for round in 0..3 {
            guest.offer(0, &room(8));
            guest.offer(0, &room(8));
            guest.kick(0);
            // Neither holds it up.
            guest.core.pause().unwrap();
            assert_eq!(guest.take_used(0), None);
            guest.core.resume().unwrap();
            writer.write_all(&[round; 12]).unwrap();
            assert_eq!(guest.wait_used(0).1, [round; 8]);
            assert_eq!(guest.wait_used(0).1, [round; 4]);
        }
    }

    #[test]
    fn a_source_that_ends_wants_a_reset() {
        let (mut guest, _reader, writer) = piped();
        drop(writer);
        guest.offer(0, &room(8));
        guest.kick(0);
        guest.wait_needs_reset();
        assert_eq!(guest.take_used(0), None);
    }

    #[test]
    fn a_request_is_bounded() {
        let mut guest = Guest::running(open(Path::new("/dev/urandom")));
        assert_eq!(guest.ask(0, &room(300_000)).len(), 64 << 10);
    }

    #[test]
    fn options_have_defaults_and_mistakes_are_named() {
        let parse = |text| RngConfig::parse("--rng", text);
        assert_eq!(parse("").unwrap(), RngConfig::default());
        let rng = parse("src=/dev/hwrng,iommu=off").unwrap();
        assert_eq!(rng.src.to_str(), Some("/dev/hwrng"));
        for wrong in ["iommu=2", "source=/x"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--rng: "), "{error}");
        }
    }

    #[test]
    fn there_must_be_a_source() {
        let refused = |path| {
            let opened = Rng::<TestMemory>::open("rng", Path::new(path));
            opened.err().unwrap().to_string()
        };
        assert_eq!(
            refused("/no/such"),
            r#"opening the source of entropy "/no/such""#
        );
        assert_eq!(
            refused("/proc"),
            r#"the source of entropy "/proc" is a directory"#
        );
    }
}
