//! `--balloon`, or `--memory balloon=on`: the balloon.

use std::sync::Arc;

use virtio_devices::{Balloon, BalloonConfig as BalloonDevice, BalloonControl};
use vm_memory::GuestMemoryMmap;

use super::{DeviceError, VirtioHost};
use crate::config::{BalloonConfig, VmConfig};

const OPTION: &str = "--balloon";

/// Makes the balloon, if there is to be one. Pages of `ram` can be in it.
pub(super) fn add(
    host: &VirtioHost<'_>,
    config: &VmConfig,
    ram: GuestMemoryMmap,
) -> Result<Option<BalloonControl>, DeviceError> {
    let balloon = match &config.balloon {
        Some(balloon) => balloon.clone(),
        None if config.memory.balloon => BalloonConfig::default(),
        None => return Ok(None),
    };
    let id = balloon.id.unwrap_or_else(|| "_balloon".to_owned());
    let device = BalloonDevice {
        id: id.clone(),
        size: balloon.size,
        ram: config.memory.most(),
        deflate_on_oom: balloon.deflate_on_oom,
        free_page_reporting: balloon.free_page_reporting,
    };
    let balloon = Balloon::new(device, Arc::new(ram)).map_err(DeviceError::option(OPTION))?;
    let control = balloon.control();
    host.add(&id, Box::new(balloon))?;
    Ok(Some(control))
}
