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
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
        }
    }
}

impl RngConfig {
    /// Reads `src=/dev/urandom`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let text = OptionText::parse(OPTION, &["src", "iommu"], text)?;
        if text.toggle("iommu")? == Some(true) {
            return Err(ConfigError::not_built(OPTION, "iommu"));
        }
        Ok(match text.text("src") {
            Some(src) => Self { src: src.into() },
            None => Self::default(),
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
        for wrong in ["iommu=on", "source=/x"] {
            let error = RngConfig::parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--rng: "), "{error}");
        }
    }
}
