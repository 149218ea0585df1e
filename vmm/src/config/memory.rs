//! `--memory`: how much RAM, and of what kind.

use serde::{Deserialize, Serialize};

use super::{ConfigError, read_keys};

const OPTION: &str = "--memory";
const KNOWN: &[&str] = &[
    "size",
    "mergeable",
    "shared",
    "hugepages",
    "hotplug_method",
    "hotplug_size",
    "hotplugged_size",
    "balloon",
];
/// Keys of the surface that come later.
const NOT_BUILT: &[&str] = &["file"];
const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// Below this not even the tables and a small kernel fit.
const LEAST: u64 = 16 << 20;
/// What the page tables of any x86-64 processor reach, less the space for devices.
const MOST: u64 = 64 << 40;

/// `hotplug_size` is a multiple of this, and so is where that memory lies: what Linux adds at once.
pub const HOTPLUG_ALIGNMENT: u64 = 128 << 20;
/// `hotplugged_size` is a multiple of this: a block of virtio-mem.
pub const HOTPLUG_BLOCK: u64 = 2 << 20;

/// How RAM is added to a running guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum HotplugMethod {
    /// Memory devices of ACPI.
    #[default]
    #[serde(alias = "acpi")]
    Acpi,
    /// A virtio-mem device.
    #[serde(alias = "virtio-mem")]
    VirtioMem,
}

/// `--memory`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// Bytes.
    pub size: u64,
    /// The host may merge equal pages (KSM).
    pub mergeable: bool,
    /// In a memfd that other processes can map.
    pub shared: bool,
    /// Of huge pages.
    pub hugepages: bool,
    /// How RAM is added.
    pub hotplug_method: HotplugMethod,
    /// Bytes that can be added.
    pub hotplug_size: Option<u64>,
    /// Bytes of them that are added at the start.
    pub hotplugged_size: Option<u64>,
    /// An empty balloon, as `--balloon size=0` gives.
    pub balloon: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            mergeable: false,
            shared: false,
            hugepages: false,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
            balloon: false,
        }
    }
}

impl MemoryConfig {
    /// Reads `size=1G,shared=on`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let default = Self::default();
        let text = read_keys(OPTION, KNOWN, NOT_BUILT, text)?;
        let method = text.convert(
            "hotplug_method",
            "acpi or virtio-mem is allowed",
            |v| match v {
                "acpi" => Some(HotplugMethod::Acpi),
                "virtio-mem" => Some(HotplugMethod::VirtioMem),
                _ => None,
            },
        )?;
        Ok(Self {
            size: text.size("size")?.unwrap_or(default.size),
            mergeable: text.toggle("mergeable")?.unwrap_or(default.mergeable),
            shared: text.toggle("shared")?.unwrap_or(default.shared),
            hugepages: text.toggle("hugepages")?.unwrap_or(default.hugepages),
            hotplug_method: method.unwrap_or_default(),
            hotplug_size: text.size("hotplug_size")?,
            hotplugged_size: text.size("hotplugged_size")?,
            balloon: text.toggle("balloon")?.unwrap_or(default.balloon),
        })
    }

    /// Bytes that a virtio-mem device can add; none without such a device.
    pub fn virtio_mem_size(&self) -> Option<u64> {
        match self.hotplug_method {
            HotplugMethod::VirtioMem => self.hotplug_size.filter(|size| *size > 0),
            HotplugMethod::Acpi => None,
        }
    }

    /// Bytes that there are when all is added.
    pub fn most(&self) -> u64 {
        self.size
            .saturating_add(self.virtio_mem_size().unwrap_or(0))
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        if !(LEAST..=MOST).contains(&self.size) {
            return wrong(format!(
                "size={} is wrong; 16M to 64T are allowed",
                self.size
            ));
        }
        let page = if self.hugepages { HUGE_PAGE } else { PAGE };
        if !self.size.is_multiple_of(page) {
            return wrong(format!(
                "size={} is wrong; a multiple of {page} is allowed{}",
                self.size,
                if self.hugepages {
                    " with hugepages=on"
                } else {
                    ""
                }
            ));
        }
        if self.mergeable && self.hugepages {
            return wrong(
                "mergeable=on and hugepages=on exclude each other: huge pages are never merged"
                    .into(),
            );
        }
        self.validate_hotplug()
    }

    fn validate_hotplug(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        let (most, now) = (
            self.hotplug_size.unwrap_or(0),
            self.hotplugged_size.unwrap_or(0),
        );
        if most > 0 && self.hotplug_method == HotplugMethod::Acpi {
            return wrong(
                "hotplug_size with hotplug_method=acpi is not built yet in this version; hotplug_method=virtio-mem is"
                    .into(),
            );
        }
        if !most.is_multiple_of(HOTPLUG_ALIGNMENT) || self.most() > MOST {
            return wrong(format!(
                "hotplug_size={most} is wrong; a multiple of 128M is allowed, and 64T with size"
            ));
        }
        if now > most || !now.is_multiple_of(HOTPLUG_BLOCK) {
            return wrong(format!(
                "hotplugged_size={now} is wrong; a multiple of 2M is allowed, up to hotplug_size, which is {most}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<MemoryConfig, String> {
        let config = MemoryConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn defaults_and_keys() {
        assert_eq!(checked("").unwrap(), MemoryConfig::default());
        let config = checked("size=2G,shared=on,hugepages=true").unwrap();
        assert_eq!(config.size, 2 << 30);
        assert!(config.shared && config.hugepages && !config.mergeable);
    }

    #[test]
    fn memory_that_comes_later() {
        let config = checked(
            "size=1G,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=6M,balloon=on",
        )
        .unwrap();
        assert_eq!(config.virtio_mem_size(), Some(2 << 30));
        assert_eq!(config.hotplugged_size, Some(6 << 20));
        assert_eq!(config.most(), 3 << 30);
        assert!(config.balloon);
        let config = checked("hotplug_method=virtio-mem").unwrap();
        assert_eq!((config.virtio_mem_size(), config.most()), (None, 512 << 20));
        checked("hotplug_method=acpi,hotplug_size=0").unwrap();
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "size=0",
            "size=1M",
            "size=100T",
            "size=20000001",
            "size=33M,hugepages=on",
            "size=x",
            "shared=maybe",
            "mergeable=on,hugepages=on",
            "hotplug_size=1G",
            "hotplug_method=acpi,hotplug_size=1G",
            "hotplug_method=dimm",
            "hotplug_method=virtio-mem,hotplug_size=100M",
            "hotplug_method=virtio-mem,hotplug_size=64T",
            "hotplug_method=virtio-mem,hotplug_size=128M,hotplugged_size=129M",
            "hotplug_method=virtio-mem,hotplug_size=128M,hotplugged_size=130M",
            "hotplugged_size=2M",
            "file=/x",
            "sise=1",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--memory: "), "{error}");
        }
        assert_eq!(
            checked("file=/x").unwrap_err(),
            "--memory: file is not built yet in this version"
        );
    }
}
