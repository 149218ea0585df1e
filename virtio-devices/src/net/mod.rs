//! The network device (virtio 1.2 §5.1) over a tap: each pair of queues has a thread and a queue of the tap of its own, and packets go
//! between guest memory and kernel without a copy.
//!
//! Nothing is lost here: where the driver gives no buffers packets wait in the tap, and where the tap takes none they wait in the
//! driver's queue.

mod backend;
mod config;
mod control;
mod pair;
mod receive;
mod shared;
mod state;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::sync::Arc;

use block_util::{RateLimiter, RateLimiterConfig, RateLimiterError};
use net_util::{MacAddr, Offloads, Tap};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_migration::{MigrationError, Section};
use vm_virtio::{
    Activation, DeviceError, DeviceMemory, DeviceQueue, VirtioDevice, Worker, read_config_bytes,
};

pub use backend::PacketQueue;
pub use state::NetV1;

use config::{Facts, MQ, OFFLOADS};
use pair::Pair;
use shared::{Limits, Shared};

/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// The most pairs of queues: as many as a tap has.
const MAX_PAIRS: u16 = 256;
/// The shortest MTU that a driver may be told (§5.1.4.1).
const MIN_MTU: u16 = 68;

/// How a network device is offered to the driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetConfig {
    /// Names its threads.
    pub id: String,
    /// Its address, until the driver chooses another; of one station.
    pub mac: MacAddr,
    /// Bytes of the longest packet without its Ethernet header, at least 68, where the driver is to be told.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 256.
    pub queue_pairs: u16,
    /// The most entries of each queue for packets, a power of two from 2 to 32768.
    pub queue_size: u16,
    /// What host and driver may leave to each other, as far as the host's end can.
    pub offloads: Offloads,
    /// How much may come to the driver, and as much may go out: packets, and bytes of packets with their headers.
    pub limit: RateLimiterConfig,
}

/// All offloads that a network device can have.
pub const NET_OFFLOADS: Offloads = OFFLOADS;

/// Why a network device cannot be offered.
#[derive(Debug, Error)]
pub enum NetError {
    /// No pairs, or more than there can be.
    #[error("network device {id:?} cannot have {pairs} pairs of queues: 1 to {MAX_PAIRS}")]
    Pairs {
        /// Of the device.
        id: String,
        /// As given.
        pairs: u16,
    },
    /// The host's end is for another number of pairs.
    #[error("network device {id:?} has {pairs} pairs of queues, and its host's end has {ends}")]
    Ends {
        /// Of the device.
        id: String,
        /// Of the device.
        pairs: u16,
        /// Queues of the tap.
        ends: usize,
    },
    /// A queue cannot have that size.
    #[error(
        "network device {id:?} cannot have queues of {size} entries: a power of two from 2 to 32768"
    )]
    QueueSize {
        /// Of the device.
        id: String,
        /// Entries.
        size: u16,
    },
    /// The address is for a group.
    #[error("network device {id:?} cannot have address {mac}, which is of a group")]
    Mac {
        /// Of the device.
        id: String,
        /// As given.
        mac: MacAddr,
    },
    /// The MTU is too small.
    #[error("network device {id:?} cannot have an MTU of {mtu}: at least {MIN_MTU}")]
    Mtu {
        /// Of the device.
        id: String,
        /// As given.
        mtu: u16,
    },
    /// It cannot be limited.
    #[error("limiting the rate of network device {id:?}")]
    Limit {
        /// Of the device.
        id: String,
        /// Why not.
        #[source]
        source: RateLimiterError,
    },
    /// The kernel gave no eventfd.
    #[error("creating the events of network device {id:?}")]
    Event {
        /// Of the device.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Changes a network device while it is behind a transport.
#[derive(Clone)]
pub struct NetControl(Arc<Shared>);

impl NetControl {
    /// Tells the driver whether there is a link, now or when the device works again. Packets move either way.
    pub fn set_link(&self, up: bool) {
        self.0.set_link(up);
    }
}

/// A network device.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use net_util::{MacAddr, Tap, TapOptions};
/// use virtio_devices::{Net, NetConfig};
/// use vm_memory::GuestMemoryMmap;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tap = Tap::open(&TapOptions { name: None, queues: 2 })?;
/// tap.interface().set_up(true)?;
/// let config = NetConfig {
///     id: "net0".into(),
///     mac: MacAddr::random()?,
///     mtu: None,
///     queue_pairs: 2,
///     queue_size: 256,
///     offloads: virtio_devices::NET_OFFLOADS,
///     limit: Default::default(),
/// };
/// let net = Net::<Arc<GuestMemoryMmap>>::new(config, tap)?;
/// # Ok(()) }
/// ```
pub struct Net<M> {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    workers: Vec<Worker<Pair<M>>>,
    /// Queues that the driver does not use, while the device works.
    idle: Vec<DeviceQueue>,
    /// Packets that waited for buffers when the device was stopped, by pair, in their order.
    waiting: Vec<(u16, Vec<u8>)>,
}

impl<M: DeviceMemory> Net<M> {
    /// Offers `tap`, which has a queue for each pair. Whether its interface is up is for the caller to see to.
    ///
    /// # Errors
    /// What is wrong with `config`, or with the tap's number of queues.
    pub fn new(config: NetConfig, tap: Tap) -> Result<Self, NetError> {
        let offloads = tap.supported_offloads(OFFLOADS);
        let end = |queue| Box::new(queue) as Box<dyn PacketQueue>;
        let ends = tap.into_queues().into_iter().map(end).collect();
        Self::with_queues(config, offloads, ends)
    }

    /// Offers the other end of `ends`, one for each pair, which can have any of `offloads`.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_queues(
        config: NetConfig,
        offloads: Offloads,
        ends: Vec<Box<dyn PacketQueue>>,
    ) -> Result<Self, NetError> {
        let NetConfig {
            id,
            mac,
            mtu,
            queue_pairs: pairs,
            queue_size: size,
            offloads: wanted,
            limit,
        } = config;
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(NetError::Pairs { id, pairs });
        }
        if ends.len() != usize::from(pairs) {
            let ends = ends.len();
            return Err(NetError::Ends { id, pairs, ends });
        }
        if !size.is_power_of_two() || size < 2 {
            return Err(NetError::QueueSize { id, size });
        }
        if mac.is_group() {
            return Err(NetError::Mac { id, mac });
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu { id, mtu });
        }
        let limiter = || {
            let is_one = limit != RateLimiterConfig::default();
            is_one
                .then(|| RateLimiter::new(&limit).map(Arc::new))
                .transpose()
                .map_err(|source| NetError::Limit {
                    id: id.clone(),
                    source,
                })
        };
        let limits = Limits {
            receive: limiter()?,
            transmit: limiter()?,
        };
        let facts = Facts {
            offloads: offloads & wanted,
            mtu,
            pairs,
        };
        let shared = Shared::new(id.clone(), facts, mac, limits, ends)
            .map_err(|source| NetError::Event { id, source })?;
        let mut queue_sizes = vec![size; 2 * usize::from(pairs)];
        queue_sizes.push(CONTROL_SIZE);
        // Without MQ the control queue is the one after the first pair (§5.1.2): each of them can be it.
        Ok(Self {
            shared: Arc::new(shared),
            queue_sizes,
            workers: Vec::new(),
            idle: Vec::new(),
            waiting: Vec::new(),
        })
    }

    /// To change the device with, once it is behind a transport.
    #[must_use]
    pub fn control(&self) -> NetControl {
        NetControl(self.shared.clone())
    }

    fn start(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            spawn,
        } = activation;
        let shared = &self.shared;
        shared
            .start(features)
            .map_err(|e| DeviceError::Device("the host's end of its queues", Box::new(e)))?;
        let pairs = match features & MQ {
            0 => 1,
            _ => shared.facts.pairs,
        };
        let mut queues = queues.into_iter();
        let mut groups: Vec<Vec<DeviceQueue>> = (0..pairs)
            .map(|_| queues.by_ref().take(2).collect())
            .collect();
        if let Some(first) = groups.first_mut() {
            first.extend(queues.next());
        }
        self.idle.extend(queues);
        for (number, group) in (0..).zip(groups) {
            if !group.iter().any(DeviceQueue::is_served) {
                self.idle.extend(group);
                continue;
            }
            let name = format!("{}_q{number}", shared.id);
            let waiting = self.waiting.iter().filter(|(pair, _)| *pair == number);
            let pair = Pair::new(
                number,
                group,
                memory.clone(),
                features,
                shared.clone(),
                waiting.map(|(_, packet)| packet.clone()),
            )
            .map_err(|e| DeviceError::Device("its limits", Box::new(e)))?;
            let worker = Worker::start(&name, vec![pair], interrupt.clone(), &spawn)?;
            self.workers.push(worker);
        }
        self.waiting.clear();
        shared.started(interrupt);
        Ok(())
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Net<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.shared.facts.features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_len(&self) -> usize {
        config::SIZE
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let started = self.start(activation);
        if started.is_err() {
            self.workers.clear();
            self.idle.clear();
        }
        started
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        self.shared.stopped();
        let mut queues = std::mem::take(&mut self.idle);
        let mut stopped = Ok(());
        for worker in self.workers.drain(..) {
            match worker.stop() {
                Ok(pairs) => {
                    let waiting = pairs.iter().flat_map(Pair::waiting);
                    self.waiting
                        .extend(waiting.map(|(n, packet)| (n, packet.to_vec())));
                    queues.extend(pairs.into_iter().flat_map(Pair::into_queues));
                }
                Err(error) => stopped = Err(error),
            }
        }
        stopped?;
        queues.sort_by_key(DeviceQueue::index);
        Ok(queues)
    }

    fn reset(&mut self) {
        self.shared.reset();
        self.waiting.clear();
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &self.shared.save())
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        self.shared.restore(&section.decode()?)
    }
}
