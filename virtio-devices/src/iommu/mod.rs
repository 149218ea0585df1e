//! The IOMMU (virtio 1.2 §5.13): its driver says which memory other devices see, and at which addresses.
//!
//! ```text
//!   driver ──requests──> Iommu ──> Domains ──a new table──> Endpoint <──a View── EndpointMemory of the device behind it
//!          <──faults────                                        └──────a fault──> event queue
//! ```
//!
//! A device behind it is given a [`EndpointMemory`] of its [`Endpoint`] instead of guest memory. There is no lock between the two: a change makes a new
//! table, and a request of a device keeps the one that it began with.

mod domains;
mod endpoint;
mod mappings;
mod memory;
mod request;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_IOMMU;
use vm_memory::{GuestMemory, Permissions};
use vm_migration::{MigrationError, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, Chain, Context, DeviceError, DeviceMemory, DeviceQueue, EventSet, Outcome,
    QueueError, QueueHandler, Source, VirtioDevice, Worker, read_config_bytes,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use domains::{DOMAINS, Domains, INPUT, PAGE};
use endpoint::{Fault, Faults};
use request::{Negotiated, PROBE_SIZE};

pub use domains::MAX_MAPPINGS as MAX_IOMMU_MAPPINGS;
pub use endpoint::Endpoint;
pub use memory::{EndpointMemory, Held, View};
pub use state::{DomainV1, IommuV1, MappingV1};

const F_INPUT_RANGE: u64 = 1 << 0;
const F_DOMAIN_RANGE: u64 = 1 << 1;
const F_MAP_UNMAP: u64 = 1 << 2;
const F_PROBE: u64 = 1 << 4;
const F_MMIO: u64 = 1 << 5;
const F_BYPASS_CONFIG: u64 = 1 << 6;

const REQUESTS: u16 = 0;
const EVENTS: u16 = 1;
/// Entries of both queues. Linux waits for a full request queue, so this bounds its batches.
const QUEUE_SIZES: [u16; 2] = [256, 64];
/// Bytes of the configuration space (§5.13.4), and where in it the bypass is.
const CONFIG_LEN: usize = 40;
const BYPASS: usize = 36;

/// Fault flags (§5.13.6.9).
const FAULT_READ: u32 = 1 << 0;
const FAULT_WRITE: u32 = 1 << 1;
/// The address is valid.
const FAULT_ADDRESS: u32 = 1 << 8;
/// Bytes of a fault.
const FAULT_LEN: usize = 24;

/// Why there is no IOMMU.
#[derive(Debug, Error)]
pub enum IommuError {
    /// The kernel gave no eventfd.
    #[error("creating the fault event of IOMMU {id:?}")]
    Event {
        /// Its name.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What the device and those behind it share.
#[derive(Debug)]
struct Shared {
    domains: Mutex<Domains>,
    faults: Arc<Faults>,
}

impl Shared {
    fn domains(&self) -> MutexGuard<'_, Domains> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The machine's end of an IOMMU.
#[derive(Clone, Debug)]
pub struct IommuControl(Arc<Shared>);

impl IommuControl {
    /// The endpoint with the number `id`: for a device on PCI its bus, device and function, below its segment. It is made if there is none; its
    /// device sees what the driver, or the bypass, lets it.
    pub fn endpoint(&self, id: u32) -> Arc<Endpoint> {
        self.0.domains().endpoint(id, &self.0.faults)
    }

    /// The device of the endpoint `id` is gone.
    pub fn remove(&self, id: u32) {
        self.0.domains().remove_endpoint(id);
    }
}

/// An IOMMU.
pub struct Iommu<M> {
    id: String,
    shared: Arc<Shared>,
    worker: Option<Worker<Handler<M>>>,
}

impl<M> Iommu<M> {
    /// An IOMMU with no endpoints. `id` names its thread.
    ///
    /// # Errors
    /// [`IommuError::Event`].
    pub fn new(id: &str) -> Result<Self, IommuError> {
        let wake =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| IommuError::Event {
                id: id.to_owned(),
                source,
            })?;
        Ok(Self {
            id: id.to_owned(),
            shared: Arc::new(Shared {
                domains: Mutex::default(),
                faults: Arc::new(Faults::new(wake)),
            }),
            worker: None,
        })
    }

    /// For whoever puts devices behind it.
    #[must_use]
    pub fn control(&self) -> IommuControl {
        IommuControl(self.shared.clone())
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Iommu<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_IOMMU
    }

    fn features(&self) -> u64 {
        RING_FEATURES
            | F_INPUT_RANGE
            | F_DOMAIN_RANGE
            | F_MAP_UNMAP
            | F_PROBE
            | F_MMIO
            | F_BYPASS_CONFIG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; CONFIG_LEN];
        // Any size from a page on: its lowest bit counts.
        config[0..8].copy_from_slice(&(!(PAGE - 1)).to_le_bytes());
        config[8..16].copy_from_slice(&INPUT.start().to_le_bytes());
        config[16..24].copy_from_slice(&INPUT.end().to_le_bytes());
        config[24..28].copy_from_slice(&DOMAINS.start().to_le_bytes());
        config[28..32].copy_from_slice(&DOMAINS.end().to_le_bytes());
        config[32..36].copy_from_slice(&PROBE_SIZE.to_le_bytes());
        config[BYPASS] = u8::from(self.shared.domains().bypass());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let byte = BYPASS.checked_sub(offset).and_then(|at| data.get(at));
        match byte {
            Some(value @ (0 | 1)) => self.shared.domains().set_bypass(*value == 1),
            Some(value) => debug!("IOMMU {:?}: bypass cannot be {value}", self.id),
            None => {}
        }
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let has = |feature| activation.features & feature != 0;
        let handler = Handler {
            negotiated: Negotiated {
                mmio: has(F_MMIO),
                bypass: has(F_BYPASS_CONFIG),
                probe: has(F_PROBE),
            },
            queues: activation.queues,
            memory: activation.memory,
            shared: self.shared.clone(),
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

    fn reset(&mut self) {
        self.shared.domains().reset();
        self.shared.faults.clear();
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &self.shared.domains().save())
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let state: IommuV1 = section.decode()?;
        let restored = self.shared.domains().restore(&state);
        restored.map_err(|what| MigrationError::Impossible {
            kind: section.kind.clone(),
            id: section.id.clone(),
            what,
        })
    }
}

/// Serves both queues.
struct Handler<M> {
    negotiated: Negotiated,
    queues: Vec<DeviceQueue>,
    memory: M,
    shared: Arc<Shared>,
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let shared = &self.shared;
        match index {
            REQUESTS => context.serve(queue, &*memory, |chain| {
                request::serve(&mut shared.domains(), self.negotiated, &*memory, chain)
            }),
            _ => context.serve(queue, &*memory, |chain| match shared.faults.take() {
                Some(fault) => tell(fault, &*memory, chain),
                None => Ok(Outcome::Later),
            }),
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.shared.faults.wake().as_raw_fd(),
            events: EventSet::IN,
            token: 0,
        }]
    }

    fn on_source(
        &mut self,
        _token: u32,
        _events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        // Only a wake-up: the faults are in their list.
        let _ = self.shared.faults.wake().read();
        self.on_queue(EVENTS, context)
    }
}

/// Writes `fault` into a buffer of the event queue.
fn tell<M: GuestMemory>(
    fault: Fault,
    memory: &M,
    chain: &Chain,
) -> Result<Outcome, vm_virtio::Fault> {
    let flag = |access, flag| if fault.access.allow(access) { flag } else { 0 };
    let flags =
        FAULT_ADDRESS | flag(Permissions::Read, FAULT_READ) | flag(Permissions::Write, FAULT_WRITE);
    let mut bytes = [0; FAULT_LEN];
    bytes[0] = fault.reason as u8;
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..12].copy_from_slice(&fault.endpoint.to_le_bytes());
    bytes[16..24].copy_from_slice(&fault.address.to_le_bytes());
    chain.writer(memory).write(&bytes)?;
    Ok(Outcome::Used(FAULT_LEN as u32))
}
