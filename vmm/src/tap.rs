//! From a `NetConfig` to a tap that is up.

use std::io;

use net_util::{Interface, InterfaceError, MacAddr, Tap, TapError, TapOptions};
use thiserror::Error;

use crate::config::{ConfigError, DEFAULT_IP, DEFAULT_MASK, NetConfig};

/// Why a network device has no host's end.
#[derive(Debug, Error)]
pub enum TapSetupError {
    /// An address that is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tap cannot be had.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// It cannot be set up.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The kernel has no random numbers yet.
    #[error("choosing an Ethernet address")]
    Random(#[source] io::Error),
}

/// Opens the tap of `config`, or makes one, and takes it up. A tap that is there keeps its settings where the config says nothing
/// of them.
pub fn open(config: &NetConfig) -> Result<Tap, TapSetupError> {
    let found = match &config.tap {
        Some(name) => Interface::new(name)?.index().is_ok(),
        None => false,
    };
    let tap = Tap::open(&TapOptions {
        name: config.tap.clone(),
        queues: usize::from(config.num_queues / 2),
    })?;
    let interface = tap.interface();
    if let Some(mac) = config.host_mac()? {
        interface.set_mac(mac)?;
    }
    if let Some(mtu) = config.mtu {
        interface.set_mtu(mtu.into())?;
    }
    let ip = config.ip.or((!found).then_some(DEFAULT_IP));
    if let Some(ip) = ip {
        interface.set_ipv4(ip, config.mask.unwrap_or(DEFAULT_MASK))?;
    }
    if !interface.is_up()? {
        interface.set_up(true)?;
    }
    Ok(tap)
}

/// Ethernet address of the guest's end.
pub fn guest_mac(config: &NetConfig) -> Result<MacAddr, TapSetupError> {
    match config.guest_mac()? {
        Some(mac) => Ok(mac),
        None => MacAddr::random().map_err(TapSetupError::Random),
    }
}
