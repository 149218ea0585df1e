//! What every virtio device and every transport shares (virtio 1.2, split rings): one trait for devices, one kind of queue, one worker
//! loop, one state machine, and a driver for tests.
//!
//! Knows no hypervisor and no bus. A transport gives addresses to the registers of a [`DeviceCore`] and delivers interrupts; a device
//! implements [`VirtioDevice`], and for each group of queues a [`QueueHandler`] that a [`Worker`] runs.
//!
//! A device that greets, and a driver that is greeted:
//!
//! ```
//! use vm_migration::{MigrationError, Schema, Section};
//! use vm_virtio::testing::{Guest, Request};
//! use vm_virtio::{
//!     Activation, Context, DeviceError, DeviceMemory, DeviceQueue, Outcome, QueueError, QueueHandler, VirtioDevice,
//!     Worker, feature,
//! };
//!
//! struct Greeter<M> { worker: Option<Worker<Greetings<M>>> }
//!
//! struct Greetings<M> { queues: Vec<DeviceQueue>, memory: M }
//!
//! impl<M: DeviceMemory> QueueHandler for Greetings<M> {
//!     fn queues(&mut self) -> &mut [DeviceQueue] {
//!         &mut self.queues
//!     }
//!
//!     fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
//!         let memory = self.memory.memory();
//!         context.serve(&mut self.queues[usize::from(index)], &*memory, |chain| {
//!             chain.writer(&*memory).write(b"hello")?;
//!             Ok(Outcome::Used(5))
//!         })
//!     }
//! }
//!
//! impl<M: DeviceMemory> VirtioDevice<M> for Greeter<M> {
//!     fn device_type(&self) -> u32 { 0x123 }
//!     fn features(&self) -> u64 { feature::RING_FEATURES }
//!     fn queue_max_sizes(&self) -> &[u16] { &[64] }
//!
//!     fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
//!         let Activation { queues, memory, interrupt, spawn, .. } = activation;
//!         let handlers = vec![Greetings { queues, memory }];
//!         self.worker = Some(Worker::start("greeter", handlers, interrupt, &spawn)?);
//!         Ok(())
//!     }
//!
//!     fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
//!         let handlers = Worker::stop_any(&mut self.worker)?;
//!         Ok(handlers.into_iter().flat_map(|handler| handler.queues).collect())
//!     }
//!
//!     fn save(&self, id: &str) -> Result<Section, MigrationError> {
//!         Section::encode(id, &GreeterV1 {})
//!     }
//!
//!     fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
//!         section.decode::<GreeterV1>().map(drop)
//!     }
//! }
//!
//! #[derive(serde::Deserialize, serde::Serialize)]
//! struct GreeterV1 {}
//!
//! impl Schema for GreeterV1 {
//!     const KIND: &'static str = "greeter";
//!     const VERSION: u32 = 1;
//! }
//!
//! let mut guest = Guest::running(Box::new(Greeter { worker: None }));
//! let request = Request { readable: Vec::new(), writable: 16 };
//! assert_eq!(guest.ask(0, &request), b"hello");
//! ```

mod core;
mod device;
pub mod feature;
mod queue;
mod state;
pub mod testing;
mod worker;

pub use crate::core::{CoreError, DeviceCore};
pub use device::{
    Activation, DeviceError, DeviceMemory, Job, Spawn, VirtioDevice, VirtioInterrupt,
    read_config_bytes,
};
pub use queue::{
    Buffer, Chain, DeviceQueue, Fault, MAX_INDIRECT, Next, Outcome, QueueError, QueueV1, Reader,
    Slice, Taken, Writer,
};
pub use state::{DeviceState, Half, QueueAddress, RegistersV1, status};
pub use vmm_sys_util::epoll::EventSet;
pub use worker::{Context, QueueHandler, Source, Spin, Worker, WorkerError};
