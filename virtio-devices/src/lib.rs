//! Virtio devices, a file or folder each, and the PCI transport that they sit behind. Knows no hypervisor: a device is given guest
//! memory, a way to start threads, and, on PCI, one to send messages.

mod block;
mod console;
mod rng;
pub mod transport;

pub use block::{Block, BlockConfig, BlockControl, BlockError, BlockV1, SERIAL_LEN};
pub use console::{Console, ConsoleError, ConsoleHandle, ConsoleInput, ConsoleV1};
pub use rng::{Rng, RngError};
