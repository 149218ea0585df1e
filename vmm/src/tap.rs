//! From a `NetConfig` to a tap that is up.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use net_util::{Interface, InterfaceError, MacAddr, Tap, TapError, TapOptions};
use thiserror::Error;

use crate::config::{ConfigError, DEFAULT_IP, NetConfig};

/// Why a network device has no host's end.
#[derive(Debug, Error)]
pub enum TapSetupError {
    /// An address that is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tap cannot be had.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A number that is no descriptor.
    #[error("fd={fd} is not open in this process")]
    Descriptor {
        /// As told.
        fd: RawFd,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
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
    let found = match (&config.tap, &config.fd) {
        (Some(name), None) => Interface::new(name)?.index().is_ok(),
        (None, None) => false,
        (_, Some(_)) => true,
    };
    let tap = match &config.fd {
        Some(fds) => Tap::from_fds(duplicate(fds)?)?,
        None => Tap::open(&TapOptions {
            name: config.tap.clone(),
            queues: usize::from(config.num_queues / 2),
        })?,
    };
    let interface = tap.interface();
    if let Some(mac) = config.host_mac()? {
        interface.set_mac(mac)?;
    }
    if let Some(mtu) = config.mtu {
        interface.set_mtu(mtu.into())?;
    }
    if let Some(address) = config.ip.or((!found).then_some(DEFAULT_IP)) {
        interface.add_address(address, config.prefix(address)?)?;
    }
    if !interface.is_up()? {
        interface.set_up(true)?;
    }
    Ok(tap)
}

/// Descriptors of our own for what was handed over: those stay open for a machine that is started again.
#[allow(unsafe_code)]
fn duplicate(fds: &[RawFd]) -> Result<Vec<OwnedFd>, TapSetupError> {
    let duplicate = |fd: &RawFd| {
        // SAFETY: it is only duplicated, and the kernel refuses a number that is no descriptor.
        let handed_over = unsafe { BorrowedFd::borrow_raw(*fd) };
        handed_over
            .try_clone_to_owned()
            .map_err(|source| TapSetupError::Descriptor { fd: *fd, source })
    };
    fds.iter().map(duplicate).collect()
}

/// Ethernet address of the guest's end.
pub fn guest_mac(config: &NetConfig) -> Result<MacAddr, TapSetupError> {
    match config.guest_mac()? {
        Some(mac) => Ok(mac),
        None => MacAddr::random().map_err(TapSetupError::Random),
    }
}
