//! The driver's side, for tests: a queue as a driver fills it, a guest that drives a device through its registers, and the suite that
//! every device is put to. Unit tests, property tests and fuzz targets share it.
//!
//! Everything here panics where something is not as it should be: that is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attack;
pub mod conformance;
mod guest;
mod interrupt;
mod ring;

use std::sync::Arc;
use std::thread::Builder;

use vm_memory::{GuestAddress, GuestMemoryMmap};

pub use guest::{Guest, Request};
pub use interrupt::TestInterrupt;
pub use ring::{Descriptor, DriverQueue, INDIRECT, NEXT, Used, WRITE};

use crate::Spawn;

/// Guest memory of tests.
pub type TestMemory = Arc<GuestMemoryMmap>;

/// Bytes of [`memory`]. There is nothing after it.
pub const MEMORY_SIZE: u64 = 4 << 20;
/// Where the first of the two regions of [`memory`] ends and the second starts.
pub const SEAM: u64 = 2 << 20;

/// Guest memory from 0 to [`MEMORY_SIZE`], in two regions: what lies across [`SEAM`] is not one piece in the host.
#[must_use]
pub fn memory() -> TestMemory {
    let ranges = [
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (MEMORY_SIZE - SEAM) as usize),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("mapping memory for a test"))
}

/// Plain threads.
#[must_use]
pub fn spawn() -> Spawn {
    Arc::new(|name, job| Builder::new().name(name).spawn(job).map(drop))
}
