//! `--net`: a virtio network device on a tap of the host, or on a network in this process.

use std::net::{IpAddr, Ipv4Addr};

use net_util::{MacAddr, Offloads};
use serde::{Deserialize, Serialize};

use super::net_user::{self, UserNetworkConfig};
use super::{ConfigError, RateLimitConfig, number, rate_limit, read_keys};

const OPTION: &str = "--net";
const KNOWN: &[&str] = &[
    "iommu",
    "tap",
    "ip",
    "mask",
    "mac",
    "host_mac",
    "mtu",
    "num_queues",
    "queue_size",
    "id",
    "fd",
    "offload_tso",
    "offload_ufo",
    "offload_csum",
];
/// Keys of the surface that come later.
const NOT_BUILT: &[&str] = &["vhost_user", "socket"];
/// Most queues: 128 pairs.
const MAX_QUEUES: u16 = 256;
/// Names of interfaces have up to 15 bytes (IFNAMSIZ of Linux).
const NAME_LENGTH: usize = 15;

/// Address of the host's end of a tap that is made.
pub const DEFAULT_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 249, 1));
/// Bits of its network.
const DEFAULT_PREFIX: u8 = 24;
/// Bits of the network of an IPv6 address.
const DEFAULT_PREFIX6: u8 = 64;

/// One `--net`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// Instead of a tap, a network in this process.
    pub user: Option<UserNetworkConfig>,
    /// Name of the tap; one is made where not told.
    pub tap: Option<String>,
    /// Address of the host's end; [`DEFAULT_IP`] for a tap that is made, and whatever it has for one that is there.
    pub ip: Option<IpAddr>,
    /// Its mask, of the same kind; of 24 bits (64 for IPv6) where not told.
    pub mask: Option<IpAddr>,
    /// Ethernet address of the guest's end; at random where not told.
    pub mac: Option<String>,
    /// Ethernet address of the host's end; the kernel's choice where not told.
    pub host_mac: Option<String>,
    /// Largest packet in bytes, without the Ethernet header.
    pub mtu: Option<u16>,
    /// Queues, receiving and sending ones: twice the pairs.
    pub num_queues: u16,
    /// Entries a queue: a power of two.
    pub queue_size: u16,
    /// The device's name in the API.
    pub id: Option<String>,
    /// Behind the virtual IOMMU.
    pub iommu: bool,
    /// Descriptors of a tap that whoever starts the VMM has opened, one a pair of queues.
    #[serde(rename = "fds")]
    pub fd: Option<Vec<i32>>,
    /// TCP segments may be left to the other side.
    pub offload_tso: bool,
    /// UDP fragments may.
    pub offload_ufo: bool,
    /// Checksums may; without them nothing else.
    pub offload_csum: bool,
    /// Limits, of each direction.
    pub rate_limiter_config: Option<RateLimitConfig>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            user: None,
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            id: None,
            iommu: false,
            fd: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            rate_limiter_config: None,
        }
    }
}

impl NetConfig {
    /// Reads `tap=,mac=,ip=,mask=` or `user,mac=`; empty values are the defaults.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let default = Self::default();
        let (is_user, text) = UserNetworkConfig::split(text);
        let text = read_keys(
            OPTION,
            &[KNOWN, &net_user::KEYS, &rate_limit::KEYS].concat(),
            NOT_BUILT,
            text,
        )?;
        let user = if is_user {
            Some(UserNetworkConfig::parse(&text)?)
        } else {
            UserNetworkConfig::refuse(&text)?;
            None
        };
        let address = |key| {
            text.convert(
                key,
                "an address such as 192.168.249.1 or fd00::1 is allowed",
                |v| v.parse::<IpAddr>().ok(),
            )
        };
        let fd = text.list("fd")?.map(|list| {
            let numbers: Option<Vec<i32>> = list.iter().map(|n| n.parse().ok()).collect();
            numbers.ok_or_else(|| {
                let what = format!(
                    "fd={} is wrong; descriptors such as fd=[3,4] are allowed",
                    list.join(",")
                );
                ConfigError::value(OPTION, what)
            })
        });
        Ok(Self {
            user,
            tap: text.text("tap").map(str::to_owned),
            ip: address("ip")?,
            mask: address("mask")?,
            mac: text.text("mac").map(str::to_owned),
            host_mac: text.text("host_mac").map(str::to_owned),
            mtu: number(&text, "mtu", 68, 65521)?,
            num_queues: number(&text, "num_queues", 2, MAX_QUEUES)?.unwrap_or(default.num_queues),
            queue_size: number(&text, "queue_size", 1, 32768)?.unwrap_or(default.queue_size),
            id: text.text("id").map(str::to_owned),
            iommu: text.toggle("iommu")?.unwrap_or(default.iommu),
            fd: fd.transpose()?,
            offload_tso: text.toggle("offload_tso")?.unwrap_or(default.offload_tso),
            offload_ufo: text.toggle("offload_ufo")?.unwrap_or(default.offload_ufo),
            offload_csum: text.toggle("offload_csum")?.unwrap_or(default.offload_csum),
            rate_limiter_config: RateLimitConfig::parse(OPTION, &text)?,
        })
    }

    /// Bits of the network that `address` is in.
    pub fn prefix(&self, address: IpAddr) -> Result<u8, ConfigError> {
        let prefix = match (address, self.mask) {
            (IpAddr::V4(_), None) => Some(DEFAULT_PREFIX),
            (IpAddr::V6(_), None) => Some(DEFAULT_PREFIX6),
            (IpAddr::V4(_), Some(IpAddr::V4(mask))) => {
                ones(u32::from(mask).leading_ones(), u32::from(mask).count_ones())
            }
            (IpAddr::V6(_), Some(IpAddr::V6(mask))) => ones(
                u128::from(mask).leading_ones(),
                u128::from(mask).count_ones(),
            ),
            _ => None,
        };
        let example = match address {
            IpAddr::V4(_) => "255.255.255.0",
            IpAddr::V6(_) => "ffff:ffff:ffff:ffff::",
        };
        let mask = self.mask.map(|mask| mask.to_string()).unwrap_or_default();
        prefix.ok_or_else(|| {
            let what = format!("mask={mask} is wrong; one such as {example} is allowed");
            ConfigError::value(OPTION, what)
        })
    }

    /// What host and guest may leave to each other.
    pub fn offloads(&self) -> Offloads {
        let mut offloads = Offloads::all();
        if !self.offload_tso {
            offloads -= Offloads::TSO4 | Offloads::TSO6 | Offloads::TSO_ECN;
        }
        if !self.offload_ufo {
            offloads -= Offloads::UFO | Offloads::USO4 | Offloads::USO6;
        }
        if !self.offload_csum {
            offloads = Offloads::empty();
        }
        offloads
    }

    /// Ethernet address of the guest's end, if told.
    pub fn guest_mac(&self) -> Result<Option<MacAddr>, ConfigError> {
        mac("mac", self.mac.as_deref())
    }

    /// Ethernet address of the host's end, if told.
    pub fn host_mac(&self) -> Result<Option<MacAddr>, ConfigError> {
        mac("host_mac", self.host_mac.as_deref())
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        if let Some(user) = &self.user {
            user.validate(self)?;
        }
        if !self.num_queues.is_multiple_of(2) || !(2..=MAX_QUEUES).contains(&self.num_queues) {
            return wrong(format!(
                "num_queues={} is wrong; an even number from 2 to {MAX_QUEUES} is allowed",
                self.num_queues
            ));
        }
        if !self.queue_size.is_power_of_two() || !(16..=32768).contains(&self.queue_size) {
            return wrong(format!(
                "queue_size={} is wrong; a power of two from 16 to 32768 is allowed",
                self.queue_size
            ));
        }
        if let Some(tap) = &self.tap
            && (tap.len() > NAME_LENGTH || tap.contains(['/', ' ']))
        {
            return wrong(format!(
                "tap={tap} is wrong; up to {NAME_LENGTH} bytes without / and spaces are allowed"
            ));
        }
        self.prefix(self.ip.unwrap_or(DEFAULT_IP))?;
        if let Some(fds) = &self.fd {
            if fds.len() != usize::from(self.num_queues / 2) {
                return wrong(format!(
                    "fd has {} descriptors, and num_queues={} needs {}",
                    fds.len(),
                    self.num_queues,
                    self.num_queues / 2
                ));
            }
            if let Some(fd) = fds.iter().find(|fd| **fd < 3) {
                return wrong(format!("fd={fd} is wrong; numbers from 3 on are allowed"));
            }
            if self.tap.is_some() {
                return wrong("tap and fd exclude each other".into());
            }
        }
        if let Some(limits) = &self.rate_limiter_config {
            limits.validate(OPTION)?;
        }
        if let Some(mac) = self.guest_mac()?
            && mac.is_group()
        {
            return wrong(format!("mac={mac} is wrong; it is a group's address"));
        }
        self.host_mac().map(drop)
    }
}

/// The length of a mask whose bits are ones, then zeros.
fn ones(leading: u32, all: u32) -> Option<u8> {
    u8::try_from(leading).ok().filter(|_| leading == all)
}

fn mac(key: &str, text: Option<&str>) -> Result<Option<MacAddr>, ConfigError> {
    let Some(text) = text else {
        return Ok(None);
    };
    match text.parse() {
        Ok(mac) => Ok(Some(mac)),
        Err(_) => Err(ConfigError::value(
            OPTION,
            format!("{key}={text} is wrong; one such as 2e:89:a8:e4:92:00 is allowed"),
        )),
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

    #[test]
    fn empty_values_are_the_defaults() {
        assert_eq!(
            checked("tap=,mac=,ip=,mask=").unwrap(),
            NetConfig::default()
        );
        assert_eq!(checked("").unwrap(), NetConfig::default());
    }

    #[test]
    fn every_key_is_read() {
        let net = checked("tap=t0,ip=10.0.0.1,mask=255.0.0.0,mac=2e:89:a8:e4:92:00,host_mac=12:34:56:78:9a:bc,mtu=9000,num_queues=4,queue_size=64,id=n,iommu=off")
            .unwrap();
        assert_eq!(net.tap.as_deref(), Some("t0"));
        let ip = net.ip.unwrap();
        assert_eq!(
            (ip.to_string().as_str(), net.prefix(ip).unwrap()),
            ("10.0.0.1", 8)
        );
        assert_eq!(
            (net.mtu, net.num_queues, net.queue_size),
            (Some(9000), 4, 64)
        );
        assert_eq!(
            net.guest_mac().unwrap().unwrap().to_string(),
            "2e:89:a8:e4:92:00"
        );
    }

    #[test]
    fn addresses_are_of_either_kind() {
        for (text, prefix) in [
            ("", 24),
            ("ip=fd00::1", 64),
            ("ip=fd00::1,mask=ffff:ff00::", 24),
            ("ip=10.0.0.1,mask=255.255.255.255", 32),
            ("mask=255.255.0.0", 16),
        ] {
            let net = checked(text).unwrap();
            let address = net.ip.unwrap_or(DEFAULT_IP);
            assert_eq!(net.prefix(address).unwrap(), prefix, "{text}");
        }
    }

    #[test]
    fn offloads_can_be_left_out() {
        let offloads = |text| checked(text).unwrap().offloads();
        assert_eq!(offloads(""), Offloads::all());
        assert_eq!(offloads("offload_csum=off"), Offloads::empty());
        let some = offloads("offload_tso=off,offload_ufo=on");
        assert!(some.contains(Offloads::CSUM | Offloads::UFO));
        assert!(!some.intersects(Offloads::TSO4 | Offloads::TSO6));
    }

    #[test]
    fn descriptors_are_one_a_pair() {
        assert_eq!(checked("fd=7").unwrap().fd, Some(vec![7]));
        assert_eq!(
            checked("fd=[7,8],num_queues=4").unwrap().fd,
            Some(vec![7, 8])
        );
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "ip=1.2.3",
            "mask=255.0.255.0",
            "mac=12:34",
            "mac=01:00:5e:00:00:01",
            "host_mac=x",
            "mtu=10",
            "num_queues=3",
            "num_queues=0",
            "queue_size=100",
            "tap=a-name-that-is-too-long",
            "tap=a/b",
            "vhost_user=on",
            "fd=x",
            "fd=1",
            "fd=[3,4]",
            "fd=3,tap=t",
            "mask=ffff::",
            "ip=fd00::1,mask=255.255.255.0",
            "bw_size=1M",
            "offload_tso=maybe",
            "speed=10",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--net: "), "{error}");
        }
    }
}
