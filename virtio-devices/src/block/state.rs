//! What is saved of a block device: not the disk, which is the user's to move.

use serde::{Deserialize, Serialize};
use vm_migration::Schema;

/// What the driver told the device, and what the device told the driver.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BlockV1 {
    /// Bytes of the disk, as the driver knows them.
    pub capacity: u64,
    /// The driver wants writes to be cached.
    pub writeback: bool,
}

impl Schema for BlockV1 {
    const KIND: &'static str = "virtio-block";
    const VERSION: u32 = 1;
}
