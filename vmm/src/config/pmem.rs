//! `--pmem`: a virtio persistent memory device, which is a file of the host in the guest's memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, read_keys};

const OPTION: &str = "--pmem";
const KNOWN: &[&str] = &["file", "size", "mergeable", "discard_writes", "iommu", "id"];

/// The size is a multiple of this, and so is the address in the guest.
pub const PMEM_ALIGNMENT: u64 = 2 << 20;

/// One `--pmem`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PmemConfig {
    /// File or block device; or a directory, for an unnamed file in it.
    pub file: PathBuf,
    /// Bytes; where not told, as many as the file has.
    pub size: Option<u64>,
    /// The host may merge equal pages (KSM).
    pub mergeable: bool,
    /// What the guest writes stays in memory and never reaches the file.
    pub discard_writes: bool,
    /// Behind the virtual IOMMU.
    pub iommu: bool,
    /// The device's name in the API.
    pub id: Option<String>,
}

impl PmemConfig {
    /// Reads `file=/pmem,size=1G`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let text = read_keys(OPTION, KNOWN, &[], text)?;
        Ok(Self {
            file: text.required("file")?.into(),
            size: text.size("size")?,
            mergeable: text.toggle("mergeable")?.unwrap_or_default(),
            discard_writes: text.toggle("discard_writes")?.unwrap_or_default(),
            iommu: text.toggle("iommu")?.unwrap_or_default(),
            id: text.text("id").map(str::to_owned),
        })
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.file.as_os_str().is_empty() {
            return Err(ConfigError::value(OPTION, "file is missing"));
        }
        match self.size {
            Some(size) if size == 0 || !size.is_multiple_of(PMEM_ALIGNMENT) => {
                Err(ConfigError::value(
                    OPTION,
                    format!("size={size} is wrong; a multiple of 2M is allowed"),
                ))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<PmemConfig, String> {
        let config = PmemConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn defaults_and_keys() {
        let expected = PmemConfig {
            file: "/a".into(),
            ..PmemConfig::default()
        };
        assert_eq!(checked("file=/a").unwrap(), expected);
        let pmem =
            checked("file=/a,size=6M,mergeable=on,discard_writes=true,id=p,iommu=off").unwrap();
        assert_eq!(pmem.size, Some(6 << 20));
        assert!(pmem.mergeable && pmem.discard_writes);
        assert_eq!(pmem.id.as_deref(), Some("p"));
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "",
            "size=2M",
            "file=/a,size=3M",
            "file=/a,size=0",
            "file=/a,size=x",
            "file=/a,discard_writes=perhaps",
            "file=/a,iommu=2",
            "file=/a,path=/b",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--pmem: "), "{error}");
        }
        assert!(PmemConfig::default().validate().is_err());
    }
}
