//! `--rng`: where the guest's entropy comes from.

use std::path::PathBuf;

use option_parser::OptionText;
use serde::{Deserialize, Serialize};

use super::ConfigError;

const OPTION: &str = "--rng";

/// `--rng`. The device is always there.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RngConfig {
    /// A file whose bytes are random.
    pub src: PathBuf,
    /// Behind the virtual IOMMU.
    pub iommu: bool,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
            iommu: false,
        }
    }
}

impl RngConfig {
    /// Reads `src=/dev/urandom`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let text = OptionText::parse(OPTION, &["src", "iommu"], text)?;
        let default = Self::default();
        Ok(Self {
            src: text.text("src").map_or(default.src, PathBuf::from),
            iommu: text.toggle("iommu")?.unwrap_or(default.iommu),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_keys() {
        assert_eq!(RngConfig::parse("").unwrap(), RngConfig::default());
        let rng = RngConfig::parse("src=/dev/hwrng,iommu=off").unwrap();
        assert_eq!(rng.src.to_str(), Some("/dev/hwrng"));
    }

    #[test]
    fn mistakes_are_named() {
        for wrong in ["iommu=2", "source=/x"] {
            let error = RngConfig::parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--rng: "), "{error}");
        }
    }
}
