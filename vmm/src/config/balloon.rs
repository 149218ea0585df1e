//! `--balloon`: a virtio balloon, by which the host has RAM of the guest back.

use option_parser::OptionText;
use serde::{Deserialize, Serialize};

use super::ConfigError;

const OPTION: &str = "--balloon";
const PAGE: u64 = 4096;

/// `--balloon`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonConfig {
    /// Bytes that the guest is to give up at first.
    pub size: u64,
    /// The guest may have them back when it has no others left.
    pub deflate_on_oom: bool,
    /// The guest tells of its free pages, which the host has until they are used.
    pub free_page_reporting: bool,
    /// The device's name in the API.
    pub id: Option<String>,
}

impl BalloonConfig {
    /// Reads `size=128M,deflate_on_oom=on`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let keys = ["size", "deflate_on_oom", "free_page_reporting", "id"];
        let text = OptionText::parse(OPTION, &keys, text)?;
        Ok(Self {
            size: text.size("size")?.unwrap_or_default(),
            deflate_on_oom: text.toggle("deflate_on_oom")?.unwrap_or_default(),
            free_page_reporting: text.toggle("free_page_reporting")?.unwrap_or_default(),
            id: text.text("id").map(str::to_owned),
        })
    }

    /// `most` is the RAM that there can be.
    pub(super) fn validate(&self, most: u64) -> Result<(), ConfigError> {
        if self.size > most || !self.size.is_multiple_of(PAGE) {
            let what = format!(
                "size={} is wrong; a multiple of {PAGE} is allowed, up to the guest's RAM of {most}",
                self.size
            );
            return Err(ConfigError::value(OPTION, what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<BalloonConfig, String> {
        let config = BalloonConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate(1 << 30).map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn defaults_and_keys() {
        assert_eq!(checked("").unwrap(), BalloonConfig::default());
        let balloon = checked("size=1G,deflate_on_oom=on,free_page_reporting=on,id=b").unwrap();
        assert_eq!(balloon.size, 1 << 30);
        assert!(balloon.deflate_on_oom && balloon.free_page_reporting);
        assert_eq!(balloon.id.as_deref(), Some("b"));
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "size=1025M",
            "size=5000",
            "size=x",
            "deflate_on_oom=2",
            "iommu=on",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--balloon: "), "{error}");
        }
    }
}
