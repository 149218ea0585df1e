//! `--pmem`: persistent memory devices.

use virtio_devices::{Pmem, PmemConfig as PmemDevice};

use super::{DeviceError, VirtioHost};
use crate::config::{PMEM_ALIGNMENT, PmemConfig, VmConfig};
use crate::pmem::{self, Before, PmemFile};

const OPTION: &str = "--pmem";

/// Makes the devices. The files are as before when what this gives is dropped instead of kept.
pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<Vec<Before>, DeviceError> {
    let each = config.pmem.iter().enumerate();
    each.map(|(index, pmem)| {
        let id = pmem.id.clone().unwrap_or_else(|| format!("_pmem{index}"));
        add_one(host, &id, pmem)
    })
    .collect()
}

fn add_one(host: &VirtioHost<'_>, id: &str, config: &PmemConfig) -> Result<Before, DeviceError> {
    let PmemFile {
        file,
        mapping,
        before,
    } = pmem::open(config).map_err(DeviceError::option(OPTION))?;
    let size = mapping.size() as u64;
    let mapped = host
        .slots
        .map(mapping, PMEM_ALIGNMENT)
        .map_err(DeviceError::option(OPTION))?;
    let place = PmemDevice {
        id: id.to_owned(),
        start: mapped.address(),
        size,
    };
    let file = (!config.discard_writes).then_some(file);
    let pmem = Pmem::new(place, file, Box::new(mapped));
    host.add_behind(id, Box::new(pmem), config.iommu)?;
    Ok(before)
}
