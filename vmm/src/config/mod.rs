//! What a VM is to be: `VmConfig`, read from option texts or JSON, and its validation.
//!
//! Text becomes a device's config in the file of that device; [`VmConfig::validate`] then checks
//! what no single option can know. Neither touches the host.

mod balloon;
mod console;
mod cpus;
mod disk;
mod memory;
mod net;
mod net_user;
mod payload;
mod pmem;
mod rate_limit;
mod rate_limit_group;
mod vsock;

pub use balloon::BalloonConfig;
pub use console::{ConsoleConfig, ConsoleMode};
pub use cpus::{CpuTopologyConfig, CpusConfig};
pub use disk::{DiskConfig, ImageType, LockGranularity, QueueAffinity};
pub use memory::{HOTPLUG_ALIGNMENT, HOTPLUG_BLOCK, HotplugMethod, MemoryConfig};
pub use net::{DEFAULT_IP, NetConfig};
pub use net_user::UserNetworkConfig;
pub use payload::PayloadConfig;
pub use pmem::{PMEM_ALIGNMENT, PmemConfig};
pub use rate_limit::{RateLimitConfig, TokenBucketConfig};
pub use rate_limit_group::RateLimitGroupConfig;
pub use virtio_devices::{Offered, OfferedOption, RngConfig, WatchdogConfig};
pub use vsock::VsockConfig;

use option_parser::OptionText;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A configuration that cannot be. Each message names the option, the value and what would do.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// An option's text is wrong.
    #[error(transparent)]
    Option(#[from] option_parser::OptionError),
    /// Text right, value not.
    #[error("{option}: {what}")]
    Value {
        /// The option, e.g. `--cpus`.
        option: &'static str,
        /// What is wrong, with the value, and what would be right.
        what: String,
    },
}

impl ConfigError {
    pub(crate) fn value(option: &'static str, what: impl Into<String>) -> Self {
        Self::Value {
            option,
            what: what.into(),
        }
    }

    pub(crate) fn not_built(option: &'static str, key: &str) -> Self {
        Self::value(option, format!("{key} is not built yet in this version"))
    }
}

/// Reads an option's text. Of `not_built`, keys of the surface that come later, only a wish to switch them off is taken.
fn read_keys(
    option: &'static str,
    known: &[&str],
    not_built: &[&str],
    text: &str,
) -> Result<OptionText, ConfigError> {
    let all: Vec<&str> = known.iter().chain(not_built).copied().collect();
    let text = OptionText::parse(option, &all, text)?;
    let wanted = |key: &&&str| {
        text.text(key)
            .is_some_and(|v| option_parser::parse_toggle(v) != Some(false))
    };
    match not_built.iter().find(wanted) {
        Some(key) => Err(ConfigError::not_built(option, key)),
        None => Ok(text),
    }
}

/// A number from `least` to `most`.
fn number(text: &OptionText, key: &str, least: u16, most: u16) -> Result<Option<u16>, ConfigError> {
    let value = text.number(key, least.into(), most.into())?;
    Ok(value.and_then(|n| u16::try_from(n).ok()))
}

/// Everything that defines a VM.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// What runs first.
    pub payload: Option<PayloadConfig>,
    /// COM1.
    pub serial: ConsoleConfig,
    /// The virtio console; where not told, the terminal, unless COM1 has it.
    pub console: Option<ConsoleConfig>,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Limits that disks share.
    pub rate_limit_groups: Vec<RateLimitGroupConfig>,
    /// Network devices, in the order in which the guest finds them.
    pub net: Vec<NetConfig>,
    /// Persistent memory devices, in the order in which the guest finds them.
    pub pmem: Vec<PmemConfig>,
    /// A balloon.
    pub balloon: Option<BalloonConfig>,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// The guest can tell that it panicked.
    pub pvpanic: bool,
    /// Devices that are in one file each, members of their own names.
    #[serde(flatten)]
    pub offered: Offered,
}

impl VmConfig {
    /// Where the virtio console's bytes go.
    pub fn console_mode(&self) -> &ConsoleMode {
        match (&self.console, &self.serial.mode) {
            (Some(console), _) => &console.mode,
            (None, ConsoleMode::Tty) => &ConsoleMode::Off,
            (None, _) => &ConsoleMode::Tty,
        }
    }

    /// Whether a device is to be behind the virtual IOMMU.
    pub fn wants_iommu(&self) -> bool {
        self.offered.wants_iommu()
            || self.console.as_ref().is_some_and(|console| console.iommu)
            || self.vsock.as_ref().is_some_and(|vsock| vsock.iommu)
            || self.disks.iter().any(|disk| disk.iommu)
            || self.net.iter().any(|net| net.iommu)
            || self.pmem.iter().any(|pmem| pmem.iommu)
    }

    /// Checks the rules that span options, and each option's own.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.cpus.validate()?;
        self.memory.validate()?;
        let Some(payload) = &self.payload else {
            return Err(ConfigError::value(
                "--kernel",
                "missing; a VM needs a kernel or firmware to boot",
            ));
        };
        payload.validate()?;
        if self.serial.mode == ConsoleMode::Tty && *self.console_mode() == ConsoleMode::Tty {
            return Err(ConfigError::value(
                "--console",
                "tty is taken by --serial; only one of them can be the terminal",
            ));
        }
        if self.serial.iommu {
            let what = "iommu=on is wrong; COM1 reaches no memory";
            return Err(ConfigError::value("--serial", what));
        }
        for disk in &self.disks {
            disk.validate()?;
            if disk.vhost_user && !self.memory.shared {
                let what = "vhost_user=on needs memory that the back end can have too; --memory shared=on is that";
                return Err(ConfigError::value("--disk", what));
            }
        }
        let limited = self
            .disks
            .iter()
            .filter_map(|d| d.rate_limit_group.as_deref());
        rate_limit_group::validate(&self.rate_limit_groups, limited.map(|g| ("--disk", g)))?;
        for net in &self.net {
            net.validate()?;
        }
        for pmem in &self.pmem {
            pmem.validate()?;
        }
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.memory.most())?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        let mut ids = self.ids();
        ids.sort_unstable();
        if let Some([(id, first), (_, second)]) = ids.array_windows().find(|[a, b]| a.0 == b.0) {
            return Err(ConfigError::value(
                second,
                format!("id={id} is given to {first} too"),
            ));
        }
        Ok(())
    }

    /// The ids that the user gave, each with its option.
    fn ids(&self) -> Vec<(&str, &'static str)> {
        let disks = self.disks.iter().map(|d| (&d.id, "--disk"));
        let nets = self.net.iter().map(|n| (&n.id, "--net"));
        let balloon = self.balloon.iter().map(|b| (&b.id, "--balloon"));
        let pmems = self.pmem.iter().map(|p| (&p.id, "--pmem"));
        let vsock = self.vsock.iter().map(|v| (&v.id, "--vsock"));
        disks
            .chain(nets)
            .chain(pmems)
            .chain(balloon)
            .chain(vsock)
            .filter_map(|(id, option)| Some((id.as_deref()?, option)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_without_a_kernel_is_refused() {
        let error = VmConfig::default().validate().unwrap_err().to_string();
        assert!(error.starts_with("--kernel: missing"), "{error}");
    }

    fn offered(options: &[(&str, &str)]) -> Offered {
        let mut offered = Offered::default();
        for (option, text) in options {
            assert_eq!(offered.set(option, text), Ok(true), "{option}");
        }
        offered
    }

    #[test]
    fn json_round_trip_keeps_everything() {
        let config = VmConfig {
            cpus: CpusConfig::parse("boot=2,max=4").unwrap(),
            memory: MemoryConfig::parse("size=1G,shared=on").unwrap(),
            payload: Some(PayloadConfig {
                kernel: "/k".into(),
                ..PayloadConfig::default()
            }),
            serial: ConsoleConfig::parse("--serial", "file=/tmp/out").unwrap(),
            console: Some(ConsoleConfig::parse("--console", "null").unwrap()),
            disks: vec![
                DiskConfig::parse("path=/d,id=a,rate_limit_group=g,queue_affinity=[0@[1]]")
                    .unwrap(),
            ],
            rate_limit_groups: vec![
                RateLimitGroupConfig::parse("id=g,bw_size=1,bw_refill_time=1").unwrap(),
            ],
            net: vec![NetConfig::parse("tap=t,mtu=1400").unwrap()],
            pmem: vec![PmemConfig::parse("file=/p,size=2M").unwrap()],
            balloon: Some(BalloonConfig::parse("size=64M").unwrap()),
            vsock: Some(VsockConfig::parse("cid=3,socket=/v").unwrap()),
            pvpanic: true,
            offered: offered(&[("--rng", "src=/dev/random"), ("--watchdog", "")]),
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
        config.validate().unwrap();
    }

    #[test]
    fn one_terminal_has_one_console() {
        let config = |serial, console: Option<&str>| VmConfig {
            payload: Some(PayloadConfig {
                kernel: "/k".into(),
                ..PayloadConfig::default()
            }),
            serial: ConsoleConfig::parse("--serial", serial).unwrap(),
            console: console.map(|mode| ConsoleConfig::parse("--console", mode).unwrap()),
            ..VmConfig::default()
        };
        let error = config("tty", Some("tty"))
            .validate()
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("--console: tty"), "{error}");
        for (serial, console, mode) in [
            ("tty", None, ConsoleMode::Off),
            ("null", None, ConsoleMode::Tty),
            ("off", Some("null"), ConsoleMode::Null),
            ("tty", Some("file=/c"), ConsoleMode::File("/c".into())),
        ] {
            let config = config(serial, console);
            config.validate().unwrap();
            assert_eq!(*config.console_mode(), mode);
        }
    }

    #[test]
    fn any_device_behind_the_iommu_brings_it() {
        let config = |change: &dyn Fn(&mut VmConfig)| {
            let mut config = VmConfig {
                payload: Some(PayloadConfig {
                    kernel: "/k".into(),
                    ..PayloadConfig::default()
                }),
                ..VmConfig::default()
            };
            change(&mut config);
            config.validate().map_err(|e| e.to_string())?;
            Ok::<_, String>(config.wants_iommu())
        };
        assert_eq!(config(&|_| {}), Ok(false));
        let console = |text| ConsoleConfig::parse("--console", text).unwrap();
        for change in [
            &(|c: &mut VmConfig| c.offered = offered(&[("--rng", "iommu=on")]))
                as &dyn Fn(&mut VmConfig),
            &|c| c.console = Some(console("null,iommu=on")),
            &|c| c.disks = vec![DiskConfig::parse("path=/d,iommu=on").unwrap()],
            &|c| c.net = vec![NetConfig::parse("iommu=true").unwrap()],
            &|c| c.pmem = vec![PmemConfig::parse("file=/p,iommu=on").unwrap()],
            &|c| c.vsock = Some(VsockConfig::parse("cid=3,socket=/v,iommu=on").unwrap()),
        ] {
            assert_eq!(config(change), Ok(true));
        }
        assert_eq!(
            config(&|c| c.console = Some(console("null,iommu=off"))),
            Ok(false)
        );
        let error = config(&|c| c.serial = console("null,iommu=on")).unwrap_err();
        assert!(error.starts_with("--serial: iommu=on"), "{error}");
        let error = ConsoleConfig::parse("--console", "tty,iommu=2").unwrap_err();
        assert!(error.to_string().starts_with("--console: iommu=2"));
    }

    #[test]
    fn a_back_end_needs_shared_memory() {
        let config = |memory| VmConfig {
            memory: MemoryConfig::parse(memory).unwrap(),
            payload: Some(PayloadConfig {
                kernel: "/k".into(),
                ..PayloadConfig::default()
            }),
            disks: vec![DiskConfig::parse("vhost_user=on,socket=/s").unwrap()],
            ..VmConfig::default()
        };
        config("shared=on").validate().unwrap();
        config("shared=on,hugepages=on").validate().unwrap();
        for without in ["", "hugepages=on"] {
            let error = config(without).validate().unwrap_err().to_string();
            assert!(error.contains("--memory shared=on"), "{error}");
        }
    }

    #[test]
    fn two_devices_cannot_share_an_id() {
        let disk = |text| DiskConfig::parse(text).unwrap();
        let config = VmConfig {
            payload: Some(PayloadConfig {
                kernel: "/k".into(),
                ..PayloadConfig::default()
            }),
            disks: vec![disk("path=/d,id=a"), disk("path=/e")],
            net: vec![NetConfig::parse("id=a").unwrap()],
            ..VmConfig::default()
        };
        let error = config.validate().unwrap_err().to_string();
        assert_eq!(error, "--net: id=a is given to --disk too");
    }

    #[test]
    fn unknown_fields_are_refused() {
        let error = serde_json::from_str::<VmConfig>(r#"{"disk": []}"#).unwrap_err();
        assert!(error.to_string().contains("`disk`"), "{error}");
        // Members of devices in one file each are members like all others.
        let json = r#"{"rng": {"src": "/r"}, "watchdog": true, "pvpanic": true}"#;
        let config = serde_json::from_str::<VmConfig>(json).unwrap();
        assert!(config.pvpanic && config.offered.watchdog.0);
        assert_eq!(config.offered.rng.src.to_str(), Some("/r"));
        for wrong in [
            r#"{"rng": {"sauce": "/r"}}"#,
            r#"{"watchdogs": true}"#,
            r#"{"watchdog": 1}"#,
        ] {
            assert!(serde_json::from_str::<VmConfig>(wrong).is_err(), "{wrong}");
        }
    }
}
