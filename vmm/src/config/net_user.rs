//! `--net user`: the network that is in this process, without a tap.

use std::net::{Ipv4Addr, SocketAddrV4};

use option_parser::OptionText;
use serde::{Deserialize, Serialize};
use user_net::{HostForward, MTUS, Network, Resolver, UserNetConfig};

use super::{ConfigError, NetConfig};

const OPTION: &str = "--net";
/// What `--net user` has that other networks do not.
pub(super) const KEYS: [&str; 4] = ["network", "dns", "host_loopback", "hostfwd"];
/// Of the server that `dns` names, unless it says another.
const DNS_PORT: u16 = 53;

/// What a `--net user` says of its network.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserNetworkConfig {
    /// Its addresses, of which the gateway has the second, the DNS server the third, and the guest the fifteenth.
    pub network: Network,
    /// Whom the DNS server asks; the host's resolver where not told.
    pub dns: Option<SocketAddrV4>,
    /// The gateway's ports are those of the host's 127.0.0.1.
    pub host_loopback: bool,
    /// Ports of the host that lead to the guest.
    pub hostfwd: Vec<HostForward>,
}

impl UserNetworkConfig {
    /// Takes `user` off a text that begins with it; what is left has keys.
    pub(super) fn split(text: &str) -> (bool, &str) {
        match text.strip_prefix("user") {
            Some("") => (true, ""),
            Some(rest) if rest.starts_with(',') => (true, rest.trim_start_matches(',')),
            _ => (false, text),
        }
    }

    /// Reads the keys that only such a network has.
    pub(super) fn parse(text: &OptionText) -> Result<Self, ConfigError> {
        let network = text.text("network").map(|network| {
            let read = network.parse::<Network>();
            read.map_err(|error| ConfigError::value(OPTION, error.to_string()))
        });
        let dns = text.convert(
            "dns",
            "an address such as 192.0.2.1 or 192.0.2.1:5353 is allowed",
            |dns| {
                let with_port = |address| SocketAddrV4::new(address, DNS_PORT);
                let alone = || dns.parse::<Ipv4Addr>().ok().map(with_port);
                dns.parse().ok().or_else(alone)
            },
        )?;
        let hostfwd = text.list("hostfwd")?.unwrap_or_default();
        let hostfwd = hostfwd.iter().map(|forward| {
            let read = forward.parse::<HostForward>();
            read.map_err(|error| ConfigError::value(OPTION, error.to_string()))
        });
        Ok(Self {
            network: network.transpose()?.unwrap_or_default(),
            dns,
            host_loopback: text.toggle("host_loopback")?.unwrap_or(false),
            hostfwd: hostfwd.collect::<Result<_, _>>()?,
        })
    }

    /// The keys of `text` that such a network has alone, for one that is none.
    pub(super) fn refuse(text: &OptionText) -> Result<(), ConfigError> {
        let given = |key: &str| Some((key.to_owned(), text.text(key)?.to_owned()));
        match KEYS.into_iter().find_map(given) {
            Some((key, value)) => {
                let what = format!("{key}={value} is for a user network; user has to come first");
                Err(ConfigError::value(OPTION, what))
            }
            None => Ok(()),
        }
    }

    /// Of `net`, whose network this is, what cannot be.
    pub(super) fn validate(&self, net: &NetConfig) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        let fds = net.fd.as_ref().map(|fds| {
            let fds: Vec<String> = fds.iter().map(i32::to_string).collect();
            format!("[{}]", fds.join(","))
        });
        let of_taps = [
            ("tap", net.tap.clone()),
            ("fd", fds),
            ("ip", net.ip.map(|ip| ip.to_string())),
            ("mask", net.mask.map(|mask| mask.to_string())),
            ("host_mac", net.host_mac.clone()),
        ];
        for (key, value) in of_taps {
            if let Some(value) = value {
                return wrong(format!("{key}={value} is wrong; a user network has no tap"));
            }
        }
        if net.num_queues != 2 {
            return wrong(format!(
                "num_queues={} is wrong; a user network has 2",
                net.num_queues
            ));
        }
        if let Some(mtu) = net.mtu
            && !MTUS.contains(&mtu)
        {
            let (least, most) = (MTUS.start(), MTUS.end());
            return wrong(format!(
                "mtu={mtu} is wrong; a user network has {least} to {most}"
            ));
        }
        let guest = self.network.guest();
        for forward in &self.hostfwd {
            if let Some(address) = forward.guest_address.filter(|address| *address != guest) {
                return wrong(format!(
                    "hostfwd={forward} is wrong; the guest has {guest}, not {address}"
                ));
            }
        }
        Ok(())
    }

    /// As the network wants to be told.
    pub fn network(&self, mtu: Option<u16>) -> UserNetConfig {
        let default = UserNetConfig::default();
        UserNetConfig {
            network: self.network,
            mtu: mtu.unwrap_or(default.mtu),
            host_loopback: self.host_loopback,
            hostfwd: self.hostfwd.clone(),
            resolver: self.dns.map_or(default.resolver, Resolver::Address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<NetConfig, String> {
        let config = NetConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    fn user(text: &str) -> UserNetworkConfig {
        checked(text).unwrap().user.unwrap()
    }

    #[test]
    fn alone_it_has_the_usual_network() {
        for text in ["user", "user,", "user,mac=,hostfwd="] {
            assert_eq!(user(text), UserNetworkConfig::default(), "{text}");
        }
        let told = user("user").network(None);
        assert_eq!(told, UserNetConfig::default());
        assert_eq!(checked("id=user").unwrap().user, None);
    }

    #[test]
    fn every_key_is_read() {
        let text = "user,network=192.168.7.0/24,dns=192.0.2.1,host_loopback=on,\
                    hostfwd=[tcp:127.0.0.1:2222-:22,udp::5353-:53],mtu=9000,id=n,mac=2e:89:a8:e4:92:00,\
                    queue_size=64,iommu=on,offload_tso=off,ops_size=1,ops_refill_time=1";
        let net = checked(text).unwrap();
        assert_eq!((net.id.as_deref(), net.mtu), (Some("n"), Some(9000)));
        let told = net.user.unwrap().network(net.mtu);
        assert_eq!(told.network.to_string(), "192.168.7.0/24");
        assert_eq!(
            told.resolver,
            Resolver::Address("192.0.2.1:53".parse().unwrap())
        );
        assert!(told.host_loopback);
        assert_eq!(told.mtu, 9000);
        let forwards: Vec<_> = told.hostfwd.iter().map(HostForward::to_string).collect();
        assert_eq!(
            forwards,
            ["tcp:127.0.0.1:2222-:22", "udp:127.0.0.1:5353-:53"]
        );
        let one = user("user,hostfwd=tcp:127.0.0.1:2222-10.0.2.15:22,dns=192.0.2.1:5353");
        assert_eq!(one.hostfwd.len(), 1);
        assert_eq!(one.dns.unwrap().port(), 5353);
    }

    #[test]
    fn json_round_trip_keeps_everything() {
        for text in [
            "user",
            "user,hostfwd=tcp::1-:2,dns=192.0.2.1,network=10.1.0.0/16",
        ] {
            let net = checked(text).unwrap();
            let json = serde_json::to_string(&net).unwrap();
            assert_eq!(serde_json::from_str::<NetConfig>(&json).unwrap(), net);
        }
        let least: NetConfig = serde_json::from_str(r#"{"user": {}}"#).unwrap();
        assert_eq!(least, checked("user").unwrap());
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for (text, wanted) in [
            ("user,tap=t0", "tap=t0"),
            ("user,fd=[3]", "fd=[3]"),
            ("user,ip=10.0.2.2", "ip=10.0.2.2"),
            ("user,mask=255.0.0.0", "mask=255.0.0.0"),
            (
                "user,host_mac=02:00:00:00:00:01",
                "host_mac=02:00:00:00:00:01",
            ),
            ("user,num_queues=4", "num_queues=4"),
            ("user,vhost_user=on", "vhost_user"),
            ("user,mtu=100", "mtu=100"),
            ("user,network=10.0.2.0", "10.0.2.0"),
            ("user,network=127.0.0.0/8", "127.0.0.0/8"),
            ("user,dns=here", "dns=here"),
            ("user,host_loopback=2", "host_loopback=2"),
            ("user,hostfwd=sctp::1-:2", "sctp"),
            ("user,hostfwd=[tcp::1-:2,tcp::x-:2]", "\"x\""),
            ("user,hostfwd=tcp::1-10.0.2.99:2", "10.0.2.99"),
            ("hostfwd=tcp::1-:2", "hostfwd=tcp::1-:2"),
            ("host_loopback=on", "host_loopback=on"),
            ("users", "users"),
            ("mac=,user", "user"),
        ] {
            let error = checked(text).unwrap_err();
            assert!(error.starts_with("--net: "), "{error}");
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
