//! What runs first in the guest: kernel (or PVH firmware), initramfs, command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// `--kernel`, `--initramfs`, `--cmdline`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PayloadConfig {
    /// An ELF or bzImage kernel, or a PVH firmware.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

impl PayloadConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::value(
                "--kernel",
                "empty; give the path of a kernel",
            ));
        }
        Ok(())
    }
}
