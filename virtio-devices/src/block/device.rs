//! The device itself: how it is made, and how its workers start and stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block_util::{DiskFile, LimiterTimer, RateLimiter};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddressSpace;
use vm_migration::{MigrationError, Section};
use vm_virtio::{
    Activation, DeviceError, DeviceMemory, DeviceQueue, Spin, VirtioDevice, Worker,
    read_config_bytes,
};

use super::affinity;
use super::config::{self, FLUSH, Facts, WRITEBACK};
use super::queue::{Handler, Way};
use super::shared::{BlockControl, Shared};
use super::{BlockConfig, BlockError, BlockV1, SERIAL_LEN};

/// A block device.
pub struct Block<M: GuestAddressSpace> {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    /// Ways into the disk that no worker has.
    ways: Vec<Way>,
    limiter: Option<Arc<RateLimiter>>,
    affinity: Vec<Vec<usize>>,
    spin: Spin,
    workers: Vec<Worker<Handler<M>>>,
    /// Queues that the driver did not enable, while the device works.
    idle: Vec<DeviceQueue>,
}

impl<M: DeviceMemory> Block<M> {
    /// Offers `disk`, for reading only if it is that. Who else may use the disk is for the caller to see to, by
    /// [`lock`](DiskFile::lock).
    ///
    /// # Errors
    /// What is wrong with `config`, or that the disk does not open.
    pub fn new(config: BlockConfig, disk: Arc<dyn DiskFile>) -> Result<Self, BlockError> {
        let BlockConfig {
            id,
            queues,
            queue_size,
            serial,
            engine,
            affinity,
            poll,
        } = config;
        if queues == 0 {
            return Err(BlockError::NoQueues(id));
        }
        // Header, data and status take a descriptor each.
        if !queue_size.is_power_of_two() || queue_size < 4 {
            return Err(BlockError::QueueSize {
                id,
                size: queue_size,
            });
        }
        for (queue, cpus) in affinity.iter().enumerate() {
            affinity::check(cpus).map_err(|source| BlockError::Affinity {
                id: id.clone(),
                queue,
                cpus: cpus.clone(),
                source,
            })?;
        }
        let mut padded = [0; SERIAL_LEN];
        match padded.get_mut(..serial.len()) {
            Some(start) => start.copy_from_slice(serial.as_bytes()),
            None => return Err(BlockError::Serial { id, serial }),
        }
        let shared = Arc::new(Shared {
            id,
            serial: padded,
            facts: Facts {
                geometry: disk.geometry(),
                read_only: disk.is_read_only(),
                queues,
                queue_size,
            },
            capacity: AtomicU64::new(disk.size()),
            disk,
            engine,
            writeback: AtomicBool::new(true),
            driver: Mutex::default(),
        });
        let ways = (0..queues)
            .map(|_| {
                let io = shared.open_io()?;
                Ok(Way { io, timer: None })
            })
            .collect::<Result<_, _>>()
            .map_err(|source| BlockError::Disk {
                id: shared.id.clone(),
                source,
            })?;
        Ok(Self {
            shared,
            queue_sizes: vec![queue_size; usize::from(queues)],
            ways,
            limiter: None,
            affinity,
            spin: Spin::if_wanted(poll),
            workers: Vec::new(),
            idle: Vec::new(),
        })
    }

    /// Lets requests wait when they are more than `limiter` allows, which other disks may share.
    ///
    /// # Errors
    /// [`BlockError::Limit`].
    pub fn limit(&mut self, limiter: Arc<RateLimiter>) -> Result<(), BlockError> {
        for way in &mut self.ways {
            let timer = LimiterTimer::new(limiter.clone()).map_err(|source| BlockError::Limit {
                id: self.shared.id.clone(),
                source,
            })?;
            way.timer = Some(timer);
        }
        self.limiter = Some(limiter);
        Ok(())
    }

    /// A way into the disk instead of one that has failed.
    fn open(&self) -> Result<Way, DeviceError> {
        let failed = |error| DeviceError::Device("its way into the disk", error);
        let io = self.shared.open_io().map_err(|e| failed(e.into()))?;
        let timer = self.limiter.clone().map(LimiterTimer::new).transpose();
        Ok(Way {
            io,
            timer: timer.map_err(|e| failed(e.into()))?,
        })
    }

    /// To change the disk with, once the device is behind a transport.
    #[must_use]
    pub fn control(&self) -> BlockControl {
        BlockControl(self.shared.clone())
    }

    fn start(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let always_durable = activation.features & FLUSH == 0;
        if always_durable {
            // §5.2.5.2.
            self.shared.writeback.store(false, Ordering::Release);
        }
        for queue in activation.queues {
            if !queue.is_served() {
                self.idle.push(queue);
                continue;
            }
            let way = match self.ways.pop() {
                Some(way) => way,
                None => self.open()?,
            };
            let name = format!("{}_q{}", self.shared.id, queue.index());
            let cpus = self.affinity.get(usize::from(queue.index()));
            let spawn = affinity::bound(&activation.spawn, cpus.map_or(&[], Vec::as_slice));
            let handler = Handler::new(
                queue,
                way,
                activation.memory.clone(),
                self.shared.clone(),
                always_durable,
                self.spin.clone(),
            );
            self.workers.push(Worker::start(
                &name,
                vec![handler],
                activation.interrupt.clone(),
                &spawn,
            )?);
        }
        let mut driver = self.shared.driver();
        if std::mem::take(&mut driver.changed) {
            activation.interrupt.config_changed();
        }
        driver.interrupt = Some(activation.interrupt);
        Ok(())
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Block<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
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
        let shared = &self.shared;
        let capacity = shared.capacity.load(Ordering::Acquire);
        let config = shared.facts.bytes(capacity, shared.writeback());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // The one field that a driver may write (§5.2.4).
        if let (WRITEBACK, [value]) = (offset, data) {
            self.shared.writeback.store(*value != 0, Ordering::Release);
        }
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
        self.shared.driver().interrupt = None;
        let mut queues = std::mem::take(&mut self.idle);
        let mut stopped = Ok(());
        for worker in self.workers.drain(..) {
            match worker.stop() {
                Ok(handlers) => {
                    for handler in handlers {
                        queues.push(handler.queue);
                        self.ways.extend(handler.way);
                    }
                }
                Err(error) => stopped = Err(error),
            }
        }
        stopped?;
        queues.sort_by_key(DeviceQueue::index);
        Ok(queues)
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::Release);
        self.shared.driver().changed = false;
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        let state = BlockV1 {
            capacity: self.shared.capacity.load(Ordering::Acquire),
            writeback: self.shared.writeback(),
        };
        Section::encode(id, &state)
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let state: BlockV1 = section.decode()?;
        let shared = &self.shared;
        shared.writeback.store(state.writeback, Ordering::Release);
        // The driver hears of it if the disk is another size by now.
        shared.driver().changed = state.capacity != shared.capacity.load(Ordering::Acquire);
        Ok(())
    }
}
