//! Disks of a virtual machine, without the machine.

mod buffer;
mod disk;
mod io;

pub use buffer::{AlignedBuf, IoBuf};
pub use disk::{DiskError, DiskFile, Engine, Geometry, IoOptions, LockMode};
pub use io::{Completion, DiskIo, Drain, Operation, QueueFull, Request};
