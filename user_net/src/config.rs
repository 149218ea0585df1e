//! What a user network is made of: its addresses, its limits, the ports that lead into it.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

use crate::forward::HostForward;

/// Of the addresses of the network: the gateway's place.
const GATEWAY: u32 = 2;
/// The place of the DNS server.
const DNS: u32 = 3;
/// The guest's place.
const GUEST: u32 = 15;
/// The smallest network that has a place for all of them and for the broadcast address.
const LONGEST_PREFIX: u8 = 27;
const SHORTEST_PREFIX: u8 = 8;

/// Why a [`Network`] cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NetworkError {
    /// Not of the form `ADDRESS/PREFIX`.
    #[error("network \"{0}\" is not of the form ADDRESS/PREFIX, as in 10.0.2.0/24")]
    Form(String),
    /// The prefix leaves too few addresses, or is no network anybody has.
    #[error("network {address}/{prefix}: the prefix has to be from 8 to 27")]
    Prefix {
        /// As given.
        address: Ipv4Addr,
        /// As given.
        prefix: u8,
    },
    /// Multicast, loopback, link-local or reserved addresses.
    #[error("network {address}/{prefix}: a guest cannot have such addresses")]
    Address {
        /// As given.
        address: Ipv4Addr,
        /// As given.
        prefix: u8,
    },
}

/// The IPv4 network that guest and gateway are in. Written as `10.0.2.0/24`; bits of the address past the prefix are dropped.
///
/// ```
/// use user_net::Network;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let network: Network = "192.168.7.0/24".parse()?;
/// assert_eq!(network.gateway().to_string(), "192.168.7.2");
/// assert_eq!(network.dns().to_string(), "192.168.7.3");
/// assert_eq!(network.guest().to_string(), "192.168.7.15");
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    base: u32,
    prefix: u8,
}

impl Network {
    /// The network that `address` is in.
    ///
    /// # Errors
    ///
    /// When the prefix is below 8 or above 27, or the addresses are none that a guest can have.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Result<Network, NetworkError> {
        if !(SHORTEST_PREFIX..=LONGEST_PREFIX).contains(&prefix) {
            return Err(NetworkError::Prefix { address, prefix });
        }
        let network = Network {
            base: address.to_bits() & mask(prefix),
            prefix,
        };
        let first = network.at(0);
        if first.octets()[0] == 0
            || first.octets()[0] >= 224
            || first.is_loopback()
            || first.is_link_local()
        {
            return Err(NetworkError::Address { address, prefix });
        }
        Ok(network)
    }

    /// The gateway: the second address after the network's own. It answers ARP, DHCP and echo requests.
    pub fn gateway(self) -> Ipv4Addr {
        self.at(GATEWAY)
    }

    /// The DNS server: the third. Port 53 leads to the host's resolver.
    pub fn dns(self) -> Ipv4Addr {
        self.at(DNS)
    }

    /// The guest: the fifteenth.
    pub fn guest(self) -> Ipv4Addr {
        self.at(GUEST)
    }

    /// The mask, as DHCP tells it.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask(self.prefix))
    }

    /// The address that means everybody in the network.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base | !mask(self.prefix))
    }

    /// Whether `address` is one of the network's.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.base
    }

    fn at(self, place: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base | place)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX << (32 - u32::from(prefix))
}

impl Default for Network {
    /// 10.0.2.0/24.
    fn default() -> Network {
        Network {
            base: Ipv4Addr::new(10, 0, 2, 0).to_bits(),
            prefix: 24,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.at(0), self.prefix)
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Network, NetworkError> {
        let parts = text
            .split_once('/')
            .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)));
        let (address, prefix) = parts.ok_or_else(|| NetworkError::Form(text.to_owned()))?;
        Network::new(address, prefix)
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Network, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// Whom the network's DNS server asks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Resolver {
    /// The first IPv4 `nameserver` of such a file, which is read again when it has changed; 127.0.0.1 if it names none.
    File(PathBuf),
    /// This one.
    Address(SocketAddrV4),
}

impl Default for Resolver {
    /// `/etc/resolv.conf`.
    fn default() -> Resolver {
        Resolver::File(PathBuf::from("/etc/resolv.conf"))
    }
}

/// Everything that a [`UserNet`](crate::UserNet) has to know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UserNetConfig {
    /// Its addresses: 10.0.2.0/24, unless something else is wanted.
    pub network: Network,
    /// Bytes of the largest IPv4 packet, 576 to 65 521: 1500, unless something else is wanted. The guest learns it by DHCP.
    pub mtu: u16,
    /// Whether the gateway's address leads to the host's 127.0.0.1. False: it has no ports but the forwarded ones.
    pub host_loopback: bool,
    /// Ports of the host that lead to the guest.
    pub hostfwd: Vec<HostForward>,
    /// Whom the DNS server asks.
    pub resolver: Resolver,
}

impl Default for UserNetConfig {
    fn default() -> UserNetConfig {
        UserNetConfig {
            network: Network::default(),
            mtu: 1500,
            host_loopback: false,
            hostfwd: Vec::new(),
            resolver: Resolver::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_written() {
        let network: Network = "172.16.5.77/20".parse().unwrap();
        assert_eq!(network.to_string(), "172.16.0.0/20");
        assert_eq!(network.mask(), Ipv4Addr::new(255, 255, 240, 0));
        assert_eq!(network.broadcast(), Ipv4Addr::new(172, 16, 15, 255));
        assert!(network.contains(Ipv4Addr::new(172, 16, 15, 1)));
        assert!(!network.contains(Ipv4Addr::new(172, 16, 16, 1)));
        let json = serde_json::to_string(&network).unwrap();
        assert_eq!(json, "\"172.16.0.0/20\"");
        assert_eq!(serde_json::from_str::<Network>(&json).unwrap(), network);
        assert_eq!(Network::default(), "10.0.2.0/24".parse().unwrap());
    }

    #[test]
    fn networks_nobody_can_have_are_refused() {
        for text in ["10.0.2.0", "10.0.2/24", "x/24", "10.0.2.0/", "10.0.2.0/256"] {
            assert!(matches!(
                text.parse::<Network>(),
                Err(NetworkError::Form(_))
            ));
        }
        for text in ["10.0.2.0/28", "10.0.2.0/7", "10.0.2.0/0"] {
            assert!(matches!(
                text.parse::<Network>(),
                Err(NetworkError::Prefix { .. })
            ));
        }
        for text in [
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/24",
            "0.1.0.0/24",
        ] {
            assert!(matches!(
                text.parse::<Network>(),
                Err(NetworkError::Address { .. })
            ));
        }
    }
}
