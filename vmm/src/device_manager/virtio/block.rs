//! `--disk`: block devices.

use block_util::Engine;
use virtio_devices::{Block, BlockConfig, SERIAL_LEN};

use super::{DeviceError, Memory, VirtioHost};
use crate::config::{DiskConfig, VmConfig};
use crate::disk;

const OPTION: &str = "--disk";

pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<(), DeviceError> {
    for (index, disk) in config.disks.iter().enumerate() {
        let id = disk.id.clone().unwrap_or_else(|| format!("_disk{index}"));
        host.add(&id, Box::new(block(&id, disk)?))?;
    }
    Ok(())
}

/// A block device on the disk of `config`, which is opened and locked.
fn block(id: &str, config: &DiskConfig) -> Result<Block<Memory>, DeviceError> {
    let disk = disk::open(config).map_err(DeviceError::option(OPTION))?;
    let block = BlockConfig {
        id: id.to_owned(),
        queues: config.num_queues,
        queue_size: config.queue_size,
        // Without one of its own a disk is known by its name.
        serial: config.serial.clone().unwrap_or_else(|| {
            id.bytes()
                .filter(u8::is_ascii_graphic)
                .take(SERIAL_LEN)
                .map(char::from)
                .collect()
        }),
        engine: Engine::Auto,
    };
    Block::new(block, disk).map_err(DeviceError::option(OPTION))
}
