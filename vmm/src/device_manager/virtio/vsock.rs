//! `--vsock`: sockets between the guest and the host.

use virtio_devices::{Vsock, VsockListener};

use super::{DeviceError, VirtioHost};
use crate::config::VmConfig;

/// Makes the device, where there is one. `listener` is where programs of the host connect.
pub(super) fn add(
    host: &VirtioHost<'_>,
    config: &VmConfig,
    listener: Option<&VsockListener>,
) -> Result<(), DeviceError> {
    let (Some(vsock), Some(listener)) = (&config.vsock, listener) else {
        return Ok(());
    };
    let id = vsock.id.as_deref().unwrap_or("_vsock0");
    let device = Vsock::new(id, vsock.cid.into(), listener.clone())
        .map_err(DeviceError::option("--vsock"))?;
    host.add_behind(id, Box::new(device), vsock.iommu)
}
