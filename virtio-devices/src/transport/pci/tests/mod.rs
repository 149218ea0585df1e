//! The device as its driver sees it.

pub(crate) mod driver;
mod hostile;
mod life;
mod registers;

use vm_migration::{MigrationError, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::testing::TestMemory;
use vm_virtio::{
    Activation, Context, DeviceError, DeviceQueue, Outcome, QueueError, QueueHandler, VirtioDevice,
    Worker, read_config_bytes,
};

/// Answers each request with its bytes in reverse, on a worker a queue; its configuration is some bytes.
pub(crate) struct Reverser {
    config: Vec<u8>,
    sizes: Vec<u16>,
    workers: Vec<Worker<Handler>>,
}

impl Reverser {
    pub(crate) fn boxed(queues: usize, config_len: usize) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(Self {
            config: (1..=255).cycle().take(config_len).collect(),
            sizes: vec![256; queues],
            workers: Vec::new(),
        })
    }
}

struct Handler {
    queue: DeviceQueue,
    memory: TestMemory,
}

impl QueueHandler for Handler {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn on_queue(&mut self, _: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let memory = &*self.memory;
        context.serve(&mut self.queue, memory, |chain| {
            let len = chain.readable_len().min(chain.writable_len()).min(4096);
            let mut bytes = vec![0; len as usize];
            chain.reader(memory).read(&mut bytes)?;
            bytes.reverse();
            chain.writer(memory).write(&bytes)?;
            Ok(Outcome::Used(len))
        })
    }
}

impl VirtioDevice<TestMemory> for Reverser {
    fn device_type(&self) -> u32 {
        0x20
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 0x15
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config_len(&self) -> usize {
        self.config.len()
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }

    fn activate(&mut self, activation: Activation<TestMemory>) -> Result<(), DeviceError> {
        for queue in activation.queues {
            let memory = activation.memory.clone();
            let handler = Handler { queue, memory };
            let interrupt = activation.interrupt.clone();
            let worker = Worker::start("rev", vec![handler], interrupt, &activation.spawn)?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        let mut queues = Vec::new();
        for worker in self.workers.drain(..) {
            queues.extend(worker.stop()?.into_iter().map(|handler| handler.queue));
        }
        Ok(queues)
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Ok(Section {
            kind: "reverser".into(),
            version: 1,
            id: id.into(),
            data: self.config.clone(),
        })
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        self.config.clone_from(&section.data);
        Ok(())
    }
}
