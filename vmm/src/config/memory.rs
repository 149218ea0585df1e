//! `--memory`: how much RAM, and of what kind.

use option_parser::OptionText;
use serde::{Deserialize, Serialize};

use super::ConfigError;

const OPTION: &str = "--memory";
/// Keys of the surface whose devices come later.
const NOT_BUILT: &[&str] = &["hotplug_method", "hotplug_size", "file", "balloon"];
const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// Below this not even the tables and a small kernel fit.
const LEAST: u64 = 16 << 20;
/// What the page tables of any x86-64 processor reach, less the space for devices.
const MOST: u64 = 64 << 40;

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
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            mergeable: false,
            shared: false,
            hugepages: false,
        }
    }
}

impl MemoryConfig {
    /// Reads `size=1G,shared=on`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let default = Self::default();
        let known = ["size", "mergeable", "shared", "hugepages"];
        let all: Vec<&str> = known.iter().chain(NOT_BUILT).copied().collect();
        let text = OptionText::parse(OPTION, &all, text)?;
        if let Some(key) = NOT_BUILT.iter().find(|key| text.text(key).is_some()) {
            return Err(ConfigError::not_built(OPTION, key));
        }
        Ok(Self {
            size: text.size("size")?.unwrap_or(default.size),
            mergeable: text.toggle("mergeable")?.unwrap_or(default.mergeable),
            shared: text.toggle("shared")?.unwrap_or(default.shared),
            hugepages: text.toggle("hugepages")?.unwrap_or(default.hugepages),
        })
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
            "sise=1",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--memory: "), "{error}");
        }
        assert_eq!(
            checked("hotplug_size=1G").unwrap_err(),
            "--memory: hotplug_size is not built yet in this version"
        );
    }
}
