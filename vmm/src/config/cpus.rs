//! `--cpus`: how many vCPUs, and how they are grouped.

use option_parser::OptionText;
use serde::{Deserialize, Serialize};

use super::ConfigError;

const OPTION: &str = "--cpus";
/// Most vCPUs of a VM: xAPIC ids 0 to 253, with 255 the broadcast.
pub const MAX_VCPUS: u8 = 254;

/// Threads a core, cores a die, dies a package, packages.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTopologyConfig {
    /// Threads a core.
    pub threads_per_core: u8,
    /// Cores a die.
    pub cores_per_die: u8,
    /// Dies a package.
    pub dies_per_package: u8,
    /// Packages.
    pub packages: u8,
}

impl CpuTopologyConfig {
    fn product(self) -> u64 {
        [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
            self.packages,
        ]
        .into_iter()
        .map(u64::from)
        .product()
    }

    /// Reads `2:4:1:1`.
    fn read(text: &str) -> Option<Self> {
        let mut numbers = text
            .split(':')
            .map(|n| n.parse::<u8>().ok().filter(|&n| n > 0));
        let topology = Self {
            threads_per_core: numbers.next()??,
            cores_per_die: numbers.next()??,
            dies_per_package: numbers.next()??,
            packages: numbers.next()??,
        };
        numbers.next().is_none().then_some(topology)
    }
}

/// `--cpus`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct CpusConfig {
    /// vCPUs at boot.
    #[serde(rename = "boot_vcpus")]
    pub boot: u8,
    /// Most that there can be.
    #[serde(rename = "max_vcpus")]
    pub max: u8,
    /// How they are grouped; one package of single-threaded cores where not told.
    pub topology: Option<CpuTopologyConfig>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot: 1,
            max: 1,
            topology: None,
        }
    }
}

impl CpusConfig {
    /// Reads `boot=2,max=4,topology=1:4:1:1`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        // The old form `--cpus 4`.
        if let Ok(boot @ 1..=MAX_VCPUS) = text.parse::<u8>() {
            return Ok(Self {
                boot,
                max: boot,
                topology: None,
            });
        }
        let text = OptionText::parse(OPTION, &["boot", "max", "topology"], text)?;
        let number = |key| -> Result<Option<u8>, ConfigError> {
            let value = text.number(key, 1, MAX_VCPUS.into())?;
            Ok(value.and_then(|n| u8::try_from(n).ok()))
        };
        let boot = number("boot")?.unwrap_or(1);
        let max = number("max")?.unwrap_or(boot);
        let topology = text.convert(
            "topology",
            "four numbers over 0 are allowed: threads:cores:dies:packages",
            CpuTopologyConfig::read,
        )?;
        Ok(Self {
            boot,
            max,
            topology,
        })
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.boot) {
            return Err(ConfigError::value(
                OPTION,
                format!(
                    "boot={} is wrong; 1 to {MAX_VCPUS} vCPUs are allowed",
                    self.boot
                ),
            ));
        }
        if !(self.boot..=MAX_VCPUS).contains(&self.max) {
            return Err(ConfigError::value(
                OPTION,
                format!(
                    "max={} is wrong; boot={} to {MAX_VCPUS} is allowed",
                    self.max, self.boot
                ),
            ));
        }
        if let Some(topology) = self.topology
            && topology.product() != u64::from(self.max)
        {
            return Err(ConfigError::value(
                OPTION,
                format!(
                    "topology={}:{}:{}:{} makes {} vCPUs; max={} must be the same number",
                    topology.threads_per_core,
                    topology.cores_per_die,
                    topology.dies_per_package,
                    topology.packages,
                    topology.product(),
                    self.max
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<CpusConfig, String> {
        let config = CpusConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn defaults() {
        assert_eq!(checked("").unwrap(), CpusConfig::default());
        let four = checked("boot=4").unwrap();
        assert_eq!((four.boot, four.max), (4, 4));
        assert_eq!(checked("4").unwrap(), four);
    }

    #[test]
    fn topology_must_make_max() {
        let topology = checked("boot=2,max=8,topology=2:2:1:2")
            .unwrap()
            .topology
            .unwrap();
        assert_eq!(topology.product(), 8);
        let error = checked("boot=2,topology=2:2:1:2").unwrap_err();
        assert_eq!(
            error,
            "--cpus: topology=2:2:1:2 makes 8 vCPUs; max=2 must be the same number"
        );
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "boot=0",
            "boot=255",
            "boot=x",
            "boot=4,max=2",
            "topology=1:1:1",
            "topology=1:1:1:0",
            "topology=1:1:1:1:1",
            "cores=2",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--cpus: "), "{error}");
        }
    }
}
