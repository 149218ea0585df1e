//! What is saved of a console: not where it prints to, which is the host's.

use serde::{Deserialize, Serialize};
use vm_migration::Schema;

/// What the driver was told, and what is on its way.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleV1 {
    /// Columns of the terminal, as the driver knows them.
    pub columns: u16,
    /// Rows of the terminal, as the driver knows them.
    pub rows: u16,
    /// Input that the driver has not received, at most [`ConsoleInput::CAPACITY`](super::ConsoleInput::CAPACITY) bytes.
    pub input: Vec<u8>,
    /// Bytes of the next chain in the transmit queue that were printed already.
    pub sent: u32,
}

impl Schema for ConsoleV1 {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}
