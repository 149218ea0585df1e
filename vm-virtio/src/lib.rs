//! What every virtio device and every transport shares (virtio 1.2, split rings): one trait for devices, one kind of queue, one worker
//! loop, one state machine, and a driver for tests.
//!
//! Knows no hypervisor and no bus. A transport gives addresses to the registers of a [`DeviceCore`] and delivers interrupts; a device
//! implements [`VirtioDevice`], and for each group of queues a [`QueueHandler`] that a [`Worker`] runs.

mod core;
mod device;
pub mod feature;
mod queue;
mod state;
mod worker;

pub use crate::core::{CoreError, DeviceCore};
pub use device::{
    Activation, DeviceError, DeviceMemory, Job, Spawn, VirtioDevice, VirtioInterrupt,
    read_config_bytes,
};
pub use queue::{
    Buffer, Chain, DeviceQueue, Fault, MAX_INDIRECT, Next, Outcome, QueueError, QueueV1, Reader,
    Slice, Writer,
};
pub use state::{DeviceState, Half, QueueAddress, RegistersV1, status};
pub use vmm_sys_util::epoll::EventSet;
pub use worker::{Context, QueueHandler, Source, Worker, WorkerError};
