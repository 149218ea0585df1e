//! A port of the host that leads into the guest, and its text: `tcp:127.0.0.1:2222-:22`.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// What a forward carries.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams, each client of the host for itself.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// A text that is no [`HostForward`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HostForwardError {
    /// It lacks a part.
    #[error(
        "forward \"{0}\" is not of the form PROTOCOL:[HOST_ADDRESS]:HOST_PORT-[GUEST_ADDRESS]:GUEST_PORT, as in tcp:127.0.0.1:2222-:22"
    )]
    Form(String),
    /// Neither `tcp` nor `udp`.
    #[error("forward \"{text}\": protocol \"{protocol}\" is neither tcp nor udp")]
    Protocol {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        protocol: String,
    },
    /// Not an IPv4 address.
    #[error("forward \"{text}\": \"{address}\" is no IPv4 address")]
    Address {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        address: String,
    },
    /// Not a port.
    #[error("forward \"{text}\": \"{port}\" is no port from 1 to 65535")]
    Port {
        /// The whole text.
        text: String,
        /// The part that is wrong.
        port: String,
    },
}

/// A port of the host that leads to a port of the guest, which sees its clients come from the gateway.
///
/// Written as `PROTOCOL:[HOST_ADDRESS]:HOST_PORT-[GUEST_ADDRESS]:GUEST_PORT`. Without a host address it is 127.0.0.1, so that
/// nobody but the host itself reaches the guest: `0.0.0.0` has to be asked for. Without a guest address it is the one that DHCP
/// gives out, and another one is refused when the network starts.
///
/// ```
/// use user_net::{HostForward, Protocol};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ssh: HostForward = "tcp::2222-:22".parse()?;
/// assert_eq!(ssh.protocol, Protocol::Tcp);
/// assert_eq!(ssh.host, "127.0.0.1:2222".parse()?);
/// assert_eq!((ssh.guest_address, ssh.guest_port), (None, 22));
/// assert_eq!(ssh.to_string(), "tcp:127.0.0.1:2222-:22");
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct HostForward {
    /// Connections or datagrams.
    pub protocol: Protocol,
    /// Where the host listens. Port 0, which the text cannot say: the kernel chooses, and
    /// [`UserNet::forwards`](crate::UserNet::forwards) tells.
    pub host: SocketAddrV4,
    /// The guest's address, if it was said.
    pub guest_address: Option<Ipv4Addr>,
    /// The guest's port, 1 to 65535.
    pub guest_port: u16,
}

impl fmt::Display for HostForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}-", self.protocol, self.host)?;
        if let Some(address) = self.guest_address {
            write!(f, "{address}")?;
        }
        write!(f, ":{}", self.guest_port)
    }
}

impl FromStr for HostForward {
    type Err = HostForwardError;

    fn from_str(text: &str) -> Result<HostForward, HostForwardError> {
        let form = || HostForwardError::Form(text.to_owned());
        let (protocol, rest) = text.split_once(':').ok_or_else(form)?;
        let (host, guest) = rest.split_once('-').ok_or_else(form)?;
        let (host_address, host_port) = host.split_once(':').ok_or_else(form)?;
        let (guest_address, guest_port) = guest.split_once(':').ok_or_else(form)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => {
                return Err(HostForwardError::Protocol {
                    text: text.to_owned(),
                    protocol: protocol.to_owned(),
                });
            }
        };
        Ok(HostForward {
            protocol,
            host: SocketAddrV4::new(
                address(text, host_address)?.unwrap_or(Ipv4Addr::LOCALHOST),
                port(text, host_port)?,
            ),
            guest_address: address(text, guest_address)?,
            guest_port: port(text, guest_port)?,
        })
    }
}

fn address(text: &str, part: &str) -> Result<Option<Ipv4Addr>, HostForwardError> {
    if part.is_empty() {
        return Ok(None);
    }
    let address = part.parse().map_err(|_| HostForwardError::Address {
        text: text.to_owned(),
        address: part.to_owned(),
    })?;
    Ok(Some(address))
}

fn port(text: &str, part: &str) -> Result<u16, HostForwardError> {
    part.parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| HostForwardError::Port {
            text: text.to_owned(),
            port: part.to_owned(),
        })
}

impl Serialize for HostForward {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostForward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<HostForward, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_and_written() {
        for (text, written) in [
            ("tcp:127.0.0.1:2222-:22", "tcp:127.0.0.1:2222-:22"),
            ("tcp::2222-:22", "tcp:127.0.0.1:2222-:22"),
            (
                "udp:0.0.0.0:5353-10.0.2.15:53",
                "udp:0.0.0.0:5353-10.0.2.15:53",
            ),
        ] {
            let forward: HostForward = text.parse().unwrap();
            assert_eq!(forward.to_string(), written);
            assert_eq!(written.parse(), Ok(forward));
            let json = serde_json::to_string(&forward).unwrap();
            assert_eq!(json, format!("\"{written}\""));
            assert_eq!(serde_json::from_str::<HostForward>(&json).unwrap(), forward);
        }
    }

    #[test]
    fn a_wrong_forward_is_told_in_one_line() {
        for (text, said) in [
            ("tcp", "is not of the form"),
            ("tcp:2222", "is not of the form"),
            ("tcp:2222-:22", "is not of the form"),
            ("tcp::2222-22", "is not of the form"),
            ("sctp::1-:1", "\"sctp\" is neither"),
            ("tcp:localhost:1-:1", "\"localhost\" is no IPv4 address"),
            ("tcp:::1-:1", "\":1\" is no port"),
            ("tcp::0-:1", "\"0\" is no port"),
            ("tcp::1-:65536", "\"65536\" is no port"),
            ("tcp::1-fe80:1", "\"fe80\" is no IPv4 address"),
            ("udp::-:1", "\"\" is no port"),
        ] {
            let error = text.parse::<HostForward>().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
            assert!(error.contains(text) && !error.contains('\n'), "{error}");
        }
    }
}
