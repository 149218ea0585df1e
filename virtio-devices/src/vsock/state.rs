//! What is saved of a vsock device.

use serde::{Deserialize, Serialize};
use vm_migration::Schema;

/// Nothing: streams end in sockets of the host, which do not move. After a restore the driver is told that all are gone.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockV1 {}

impl Schema for VsockV1 {
    const KIND: &'static str = "virtio-vsock";
    const VERSION: u32 = 1;
}
