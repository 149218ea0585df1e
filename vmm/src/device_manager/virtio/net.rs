//! `--net`: network devices.

use virtio_devices::{Net, NetConfig as NetDevice};

use super::{DeviceError, Memory, VirtioHost};
use crate::config::{NetConfig, VmConfig};
use crate::tap;

const OPTION: &str = "--net";

pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<(), DeviceError> {
    for (index, net) in config.net.iter().enumerate() {
        let id = net.id.clone().unwrap_or_else(|| format!("_net{index}"));
        host.add_behind(&id, Box::new(network(&id, net)?), net.iommu)?;
    }
    Ok(())
}

/// A network device on the tap of `config`, which is opened or made.
fn network(id: &str, config: &NetConfig) -> Result<Net<Memory>, DeviceError> {
    let tap = tap::open(config).map_err(DeviceError::option(OPTION))?;
    let net = NetDevice {
        id: id.to_owned(),
        mac: tap::guest_mac(config).map_err(DeviceError::option(OPTION))?,
        mtu: config.mtu,
        queue_pairs: config.num_queues / 2,
        queue_size: config.queue_size,
        offloads: config.offloads(),
        limit: config
            .rate_limiter_config
            .map(|limits| limits.limiter())
            .unwrap_or_default(),
    };
    Net::new(net, tap).map_err(DeviceError::option(OPTION))
}
