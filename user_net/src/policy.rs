//! Where the guest's packets may go, and what the addresses of its network stand for on the host.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::time::Instant;

use crate::config::{Network, UserNetConfig};
use crate::dns::HostResolver;

/// What becomes of a packet for an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// It goes there.
    Host(SocketAddrV4),
    /// Gateway or DNS server have nothing on that port.
    NoPort,
    /// Nobody has this address of the network.
    NoHost,
    /// Nothing of the guest goes there.
    Closed,
}

/// The rules.
pub struct Policy {
    network: Network,
    host_loopback: bool,
    resolver: HostResolver,
}

impl Policy {
    pub fn new(config: &UserNetConfig) -> Policy {
        Policy {
            network: config.network,
            host_loopback: config.host_loopback,
            resolver: HostResolver::new(config.resolver.clone()),
        }
    }

    pub fn network(&self) -> Network {
        self.network
    }

    /// Whether we answer to this address ourselves.
    pub fn is_ours(&self, address: Ipv4Addr) -> bool {
        address == self.network.gateway() || address == self.network.dns()
    }

    /// Where connections and datagrams for `to` go.
    pub fn target(&mut self, to: SocketAddrV4, now: Instant) -> Target {
        let address = *to.ip();
        if to.port() == 0 {
            Target::Closed
        } else if address == self.network.dns() {
            if to.port() == 53 {
                Target::Host(self.resolver.address(now))
            } else {
                Target::NoPort
            }
        } else if address == self.network.gateway() {
            if self.host_loopback {
                Target::Host(SocketAddrV4::new(Ipv4Addr::LOCALHOST, to.port()))
            } else {
                Target::NoPort
            }
        } else if is_closed(address) || address == self.network.broadcast() {
            Target::Closed
        } else if self.network.contains(address) {
            Target::NoHost
        } else {
            Target::Host(to)
        }
    }
}

/// Addresses that mean the host itself, or whoever is on its own wire: this network (0/8, by which Linux reaches itself),
/// loopback, link-local (where clouds give out credentials), multicast, reserved, broadcast.
pub fn is_closed(address: Ipv4Addr) -> bool {
    let first = address.octets()[0];
    first == 0 || first >= 224 || address.is_loopback() || address.is_link_local()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resolver;

    fn target(host_loopback: bool, to: &str) -> Target {
        let mut policy = Policy::new(&UserNetConfig {
            host_loopback,
            resolver: Resolver::Address("127.0.0.53:5300".parse().unwrap()),
            ..UserNetConfig::default()
        });
        policy.target(to.parse().unwrap(), Instant::ZERO)
    }

    #[test]
    fn addresses_of_the_host_are_closed() {
        for loopback in [false, true] {
            for to in [
                "0.0.0.0:80",
                "0.1.2.3:80",
                "127.0.0.1:80",
                "127.255.255.254:80",
                "169.254.169.254:80",
                "169.254.0.1:80",
                "224.0.0.251:5353",
                "239.255.255.250:1900",
                "240.0.0.1:80",
                "255.255.255.255:80",
                "10.0.2.255:80",
                "192.0.2.1:0",
            ] {
                assert_eq!(target(loopback, to), Target::Closed, "{to}");
            }
        }
    }

    #[test]
    fn the_gateway_leads_to_the_host_only_when_asked_for() {
        assert_eq!(target(false, "10.0.2.2:22"), Target::NoPort);
        let host = "127.0.0.1:22".parse().unwrap();
        assert_eq!(target(true, "10.0.2.2:22"), Target::Host(host));
    }

    #[test]
    fn the_network_has_a_resolver_and_nobody_else() {
        let resolver = "127.0.0.53:5300".parse().unwrap();
        assert_eq!(target(false, "10.0.2.3:53"), Target::Host(resolver));
        assert_eq!(target(true, "10.0.2.3:22"), Target::NoPort);
        assert_eq!(target(true, "10.0.2.77:80"), Target::NoHost);
    }

    #[test]
    fn all_else_is_open() {
        for to in [
            "192.0.2.1:443",
            "10.0.3.1:80",
            "192.168.1.1:80",
            "1.1.1.1:53",
        ] {
            assert_eq!(target(false, to), Target::Host(to.parse().unwrap()));
        }
    }
}
