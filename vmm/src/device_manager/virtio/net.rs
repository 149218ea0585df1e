//! `--net`: network devices.

use virtio_devices::{Net, NetConfig as NetDevice, PacketQueue};

use super::{DeviceError, Links, Memory, VirtioHost};
use crate::config::{NetConfig, VmConfig};
use crate::{tap, user_network};

const OPTION: &str = "--net";

/// Makes the devices. Their links are those of their interfaces.
pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<Links, DeviceError> {
    if config.net.is_empty() {
        return Ok(Links::default());
    }
    let mut links = Links::new();
    for (index, net) in config.net.iter().enumerate() {
        let id = net.id.clone().unwrap_or_else(|| format!("_net{index}"));
        let device = network(host, &id, net, &mut links)?;
        host.add_behind(&id, Box::new(device), net.iommu)?;
    }
    Ok(links)
}

/// A network device on the tap of `config`, which is opened or made, or on the network in this process.
fn network(
    host: &VirtioHost<'_>,
    id: &str,
    config: &NetConfig,
    links: &mut Links,
) -> Result<Net<Memory>, DeviceError> {
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
    let made = match &config.user {
        Some(user) => {
            let end = user_network::start(id, config, user, host.events)
                .map_err(DeviceError::option(OPTION))?;
            let end = Box::new(end) as Box<dyn PacketQueue>;
            Net::with_queues(net, user_network::OFFLOADS, vec![end])
        }
        None => {
            let tap = tap::open(config).map_err(DeviceError::option(OPTION))?;
            let interface = tap.interface().clone();
            Net::new(net, tap).inspect(|device| links.add(interface, device.control()))
        }
    };
    made.map_err(DeviceError::option(OPTION))
}
