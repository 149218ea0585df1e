//! `--disk`: block devices.

use std::collections::BTreeMap;

use block_util::Engine;
use virtio_devices::{Block, BlockConfig, BlockControl, SERIAL_LEN};
use vm_virtio::Spawn;

use super::{DeviceError, Memory, VirtioHost};
use crate::config::{DiskConfig, VmConfig};
use crate::disk;

const OPTION: &str = "--disk";

/// Makes the disks, and gives what changes them, by id.
pub(super) fn add(
    host: &VirtioHost<'_>,
    config: &VmConfig,
) -> Result<BTreeMap<String, BlockControl>, DeviceError> {
    let mut controls = BTreeMap::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let id = disk.id.clone().unwrap_or_else(|| format!("_disk{index}"));
        let block = block(&id, disk, &host.spawn)?;
        let control = block.control();
        host.add(&id, Box::new(block))?;
        controls.insert(id, control);
    }
    Ok(controls)
}

/// A block device on the disk of `config`, which is opened and locked.
fn block(id: &str, config: &DiskConfig, spawn: &Spawn) -> Result<Block<Memory>, DeviceError> {
    let disk = disk::open(config, id, spawn).map_err(DeviceError::option(OPTION))?;
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
