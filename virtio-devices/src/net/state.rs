//! What is saved of a network device: not the host's end, nor packets on their way.

use net_util::MacAddr;
use serde::{Deserialize, Serialize};
use vm_migration::Schema;

/// What the driver told the device, and what the device told the driver.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetV1 {
    /// The address, perhaps one that the driver chose.
    pub mac: MacAddr,
    /// The driver was told that there is a link.
    pub link_up: bool,
    /// Pairs of queues that the driver uses.
    pub pairs: u16,
    /// Bits of the features that the driver chose as offloads by a command; none did.
    pub offloads: Option<u64>,
}

impl Schema for NetV1 {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}
