//! `--rate-limit-group`: limits that several disks share.

use serde::{Deserialize, Serialize};

use super::rate_limit::KEYS;
use super::{ConfigError, RateLimitConfig, read_keys};

const OPTION: &str = "--rate-limit-group";

/// One `--rate-limit-group`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitGroupConfig {
    /// What disks call it.
    pub id: String,
    /// The limits of all its disks together.
    pub rate_limiter_config: RateLimitConfig,
}

impl RateLimitGroupConfig {
    /// Reads `id=g,bw_size=1M,bw_refill_time=100`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let keys: Vec<&str> = std::iter::once("id").chain(KEYS).collect();
        let text = read_keys(OPTION, &keys, &[], text)?;
        Ok(Self {
            id: text.required("id")?.to_owned(),
            rate_limiter_config: RateLimitConfig::parse(OPTION, &text)?.unwrap_or_default(),
        })
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        if self.id.is_empty() {
            return wrong("id is missing".into());
        }
        if self.rate_limiter_config == RateLimitConfig::default() {
            return wrong(format!(
                "id={} has no limits; bw_size and bw_refill_time, or ops_size and ops_refill_time, are needed",
                self.id
            ));
        }
        self.rate_limiter_config.validate(OPTION)
    }
}

/// Checks the groups, and that those which are `used`, each by an option, are there.
pub(super) fn validate<'a>(
    groups: &[RateLimitGroupConfig],
    used: impl Iterator<Item = (&'static str, &'a str)>,
) -> Result<(), ConfigError> {
    for (index, group) in groups.iter().enumerate() {
        group.validate()?;
        if groups.iter().take(index).any(|g| g.id == group.id) {
            let what = format!("id={} is given twice", group.id);
            return Err(ConfigError::value(OPTION, what));
        }
    }
    for (option, id) in used {
        if !groups.iter().any(|g| g.id == id) {
            let what = format!("rate_limit_group={id} is wrong; {OPTION} gives no such id");
            return Err(ConfigError::value(option, what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(texts: &[&str], used: &[&str]) -> Result<(), String> {
        let groups: Result<Vec<_>, _> = texts
            .iter()
            .map(|t| RateLimitGroupConfig::parse(t))
            .collect();
        let groups = groups.map_err(|e| e.to_string())?;
        let used = used.iter().map(|u| ("--disk", *u));
        validate(&groups, used).map_err(|e| e.to_string())
    }

    #[test]
    fn groups_are_told_once_and_have_limits() {
        let good = "id=a,ops_size=100,ops_refill_time=1000";
        checked(&[good], &["a", "a"]).unwrap();
        for (texts, used, error) in [
            (
                &["id=a"][..],
                &[][..],
                "--rate-limit-group: id=a has no limits",
            ),
            (
                &["ops_size=1,ops_refill_time=1"],
                &[],
                "--rate-limit-group: id is missing",
            ),
            (
                &[good, good],
                &[],
                "--rate-limit-group: id=a is given twice",
            ),
            (&[good], &["b"], "--disk: rate_limit_group=b is wrong"),
            (
                &["id=a,bw_size=1"],
                &[],
                "--rate-limit-group: a limit needs both",
            ),
        ] {
            let found = checked(texts, used).unwrap_err();
            assert!(found.starts_with(error), "{found}");
        }
    }
}
