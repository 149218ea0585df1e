//! Limits of devices: so many bytes and so many operations in a time.

use std::time::Duration;

use block_util::{BucketConfig, RateLimiterConfig};
use option_parser::OptionText;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The keys of an option whose device can be limited.
pub(super) const KEYS: [&str; 6] = [
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
];

/// One limit.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Bytes or operations that each `refill_time` brings.
    pub size: u64,
    /// As many more, once.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds.
    pub refill_time: u64,
}

/// Both limits of a device.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimitConfig {
    /// Of bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Of operations.
    pub ops: Option<TokenBucketConfig>,
}

impl RateLimitConfig {
    /// Reads the [`KEYS`] of an option; none of them is no limit.
    pub(super) fn parse(
        option: &'static str,
        text: &OptionText,
    ) -> Result<Option<Self>, ConfigError> {
        let [
            bw_size,
            bw_burst,
            bw_refill,
            ops_size,
            ops_burst,
            ops_refill,
        ] = KEYS;
        let limits = Self {
            bandwidth: bucket(option, text, [bw_size, bw_burst, bw_refill])?,
            ops: bucket(option, text, [ops_size, ops_burst, ops_refill])?,
        };
        Ok((limits != Self::default()).then_some(limits))
    }

    pub(super) fn validate(&self, option: &'static str) -> Result<(), ConfigError> {
        for (limit, name) in [(self.bandwidth, "bw"), (self.ops, "ops")] {
            let Some(limit) = limit else { continue };
            if limit.size == 0 || limit.refill_time == 0 {
                return Err(ConfigError::value(
                    option,
                    format!(
                        "{name}_size={},{name}_refill_time={} is wrong; neither may be 0",
                        limit.size, limit.refill_time
                    ),
                ));
            }
        }
        Ok(())
    }

    /// As a limiter takes it.
    pub fn limiter(&self) -> RateLimiterConfig {
        let bucket = |limit: TokenBucketConfig| BucketConfig {
            size: limit.size,
            one_time_burst: limit.one_time_burst.unwrap_or(0),
            refill: Duration::from_millis(limit.refill_time),
        };
        RateLimiterConfig {
            bandwidth: self.bandwidth.map(bucket),
            operations: self.ops.map(bucket),
        }
    }
}

/// Reads one limit: a size and a time, and perhaps a burst.
fn bucket(
    option: &'static str,
    text: &OptionText,
    [size_key, burst_key, refill_key]: [&str; 3],
) -> Result<Option<TokenBucketConfig>, ConfigError> {
    let size = text.size(size_key)?;
    let one_time_burst = text.size(burst_key)?;
    let refill_time = text.number(refill_key, 1, u64::MAX)?;
    match (size, refill_time) {
        (Some(size), Some(refill_time)) => Ok(Some(TokenBucketConfig {
            size,
            one_time_burst,
            refill_time,
        })),
        (None, None) if one_time_burst.is_none() => Ok(None),
        _ => Err(ConfigError::value(
            option,
            format!("a limit needs both {size_key} and {refill_key} (milliseconds)"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<RateLimitConfig>, String> {
        let text = OptionText::parse("--net", &KEYS, text).map_err(|e| e.to_string())?;
        let limits = RateLimitConfig::parse("--net", &text).map_err(|e| e.to_string())?;
        if let Some(limits) = &limits {
            limits.validate("--net").map_err(|e| e.to_string())?;
        }
        Ok(limits)
    }

    #[test]
    fn both_limits_are_read() {
        assert_eq!(parse(""), Ok(None));
        let limits = parse(
            "bw_size=1M,bw_refill_time=100,ops_size=500,ops_one_time_burst=20,ops_refill_time=1000",
        );
        let limits = limits.unwrap().unwrap().limiter();
        let bandwidth = limits.bandwidth.unwrap();
        assert_eq!((bandwidth.size, bandwidth.one_time_burst), (1 << 20, 0));
        assert_eq!(bandwidth.refill, Duration::from_millis(100));
        let operations = limits.operations.unwrap();
        assert_eq!((operations.size, operations.one_time_burst), (500, 20));
        assert_eq!(operations.refill, Duration::from_secs(1));
    }

    #[test]
    fn half_a_limit_is_refused() {
        for half in ["bw_size=1", "bw_refill_time=1", "bw_one_time_burst=1"] {
            assert_eq!(
                parse(half).unwrap_err(),
                "--net: a limit needs both bw_size and bw_refill_time (milliseconds)"
            );
        }
        assert_eq!(
            parse("ops_size=0,ops_refill_time=1").unwrap_err(),
            "--net: ops_size=0,ops_refill_time=1 is wrong; neither may be 0"
        );
    }
}
