//! `--net`: a virtio network device on a tap of the host.

use std::net::Ipv4Addr;

use net_util::MacAddr;
use serde::{Deserialize, Serialize};

use super::{ConfigError, number, read_keys};

const OPTION: &str = "--net";
const KNOWN: &[&str] = &[
    "tap",
    "ip",
    "mask",
    "mac",
    "host_mac",
    "mtu",
    "num_queues",
    "queue_size",
    "id",
];
/// Keys of the surface that come later.
const NOT_BUILT: &[&str] = &["iommu", "vhost_user", "socket", "fd"];
/// Most queues: 128 pairs.
const MAX_QUEUES: u16 = 256;
/// Names of interfaces have up to 15 bytes (IFNAMSIZ of Linux).
const NAME_LENGTH: usize = 15;

/// Address of the host's end of a tap that is made.
pub const DEFAULT_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 249, 1);
/// Its mask.
pub const DEFAULT_MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// One `--net`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the tap; one is made where not told.
    pub tap: Option<String>,
    /// Address of the host's end; [`DEFAULT_IP`] for a tap that is made, and whatever it has for one that is there.
    pub ip: Option<Ipv4Addr>,
    /// Its mask; [`DEFAULT_MASK`] where not told.
    pub mask: Option<Ipv4Addr>,
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
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            id: None,
        }
    }
}

impl NetConfig {
    /// Reads `tap=,mac=,ip=,mask=`; empty values are the defaults.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let default = Self::default();
        let text = read_keys(OPTION, KNOWN, NOT_BUILT, text)?;
        let address = |key| {
            text.convert(key, "an address such as 192.168.249.1 is allowed", |v| {
                v.parse::<Ipv4Addr>().ok()
            })
        };
        Ok(Self {
            tap: text.text("tap").map(str::to_owned),
            ip: address("ip")?,
            mask: address("mask")?,
            mac: text.text("mac").map(str::to_owned),
            host_mac: text.text("host_mac").map(str::to_owned),
            mtu: number(&text, "mtu", 68, 65521)?,
            num_queues: number(&text, "num_queues", 2, MAX_QUEUES)?.unwrap_or(default.num_queues),
            queue_size: number(&text, "queue_size", 1, 32768)?.unwrap_or(default.queue_size),
            id: text.text("id").map(str::to_owned),
        })
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
        if let Some(mask) = self.mask {
            // Ones, then zeros.
            let bits = u32::from(mask);
            if bits.leading_ones() + bits.trailing_zeros() != 32 {
                return wrong(format!(
                    "mask={mask} is wrong; one such as 255.255.255.0 is allowed"
                ));
            }
        }
        if let Some(mac) = self.guest_mac()?
            && mac.is_group()
        {
            return wrong(format!("mac={mac} is wrong; it is a group's address"));
        }
        self.host_mac().map(drop)
    }
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
        assert_eq!(net.ip, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(net.mask, Some(Ipv4Addr::new(255, 0, 0, 0)));
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
            "fd=3",
            "speed=10",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--net: "), "{error}");
        }
    }
}
