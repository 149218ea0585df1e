//! `--rng`: the entropy device, which is always there.

use virtio_devices::Rng;

use super::{DeviceError, VirtioHost};
use crate::config::VmConfig;

pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<(), DeviceError> {
    let id = "_rng";
    let rng = Rng::open(id, &config.rng.src).map_err(DeviceError::option("--rng"))?;
    host.add_behind(id, Box::new(rng), config.rng.iommu)
}
