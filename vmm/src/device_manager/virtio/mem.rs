//! `--memory hotplug_method=virtio-mem`: the memory device, by which RAM is added and taken away.

use std::sync::Arc;

use virtio_devices::{Mem, MemConfig, MemControl};
use vm_memory::GuestMemoryMmap;

use super::{DeviceError, VirtioHost};
use crate::config::{HOTPLUG_ALIGNMENT, VmConfig};
use crate::memory_manager::{HostMemory, MemoryError};

const OPTION: &str = "--memory";
const ID: &str = "_mem";

/// Makes the device, if RAM can be added. Gives also all of RAM: what the guest starts with, and the device's region.
pub(super) fn add(
    host: &VirtioHost<'_>,
    config: &VmConfig,
) -> Result<(Option<MemControl>, GuestMemoryMmap), DeviceError> {
    let memory = &config.memory;
    let ram = host.ram.ram().clone();
    let Some(size) = memory.virtio_mem_size() else {
        return Ok((None, ram));
    };
    let failed = DeviceError::option::<MemoryError>;
    let mapping = HostMemory::new(memory, size)
        .and_then(|host| host.map(0, size))
        .map_err(failed(OPTION))?;
    let mapped = host
        .slots
        .map(mapping, HOTPLUG_ALIGNMENT)
        .map_err(failed(OPTION))?;
    let ram = ram
        .insert_region(mapped.region().clone())
        .map_err(|e| failed(OPTION)(MemoryError::Arrange(e.to_string())))?;
    let device = MemConfig {
        id: ID.to_owned(),
        start: mapped.address(),
        size,
        requested: memory.hotplugged_size.unwrap_or(0),
    };
    let mem = Mem::new(device, Arc::new(ram.clone()), Box::new(mapped))
        .map_err(DeviceError::option(OPTION))?;
    let control = mem.control();
    host.add(ID, Box::new(mem))?;
    Ok((Some(control), ram))
}
