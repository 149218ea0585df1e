//! `--disk`: a virtio block device on an image or a block device of the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, number, read_keys};

const OPTION: &str = "--disk";
const KNOWN: &[&str] = &[
    "path",
    "readonly",
    "direct",
    "num_queues",
    "queue_size",
    "image_type",
    "backing_files",
    "serial",
    "id",
    "poll_queue",
];
/// Keys of the surface that come later.
const NOT_BUILT: &[&str] = &["iommu", "vhost_user", "socket"];
/// Most queues of a disk.
const MAX_QUEUES: u16 = 256;
/// Bytes of the answer to GET_ID (virtio 1.2 §5.2.6).
const SERIAL_LENGTH: usize = 20;

/// What the image is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// The guest's bytes and no more.
    Raw,
    /// qcow2.
    Qcow2,
}

/// One `--disk`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskConfig {
    /// Image or block device.
    pub path: PathBuf,
    /// The guest cannot write.
    pub readonly: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Request queues, each with a thread.
    pub num_queues: u16,
    /// Entries a queue: a power of two.
    pub queue_size: u16,
    /// What the image is; found out where not told.
    pub image_type: Option<ImageType>,
    /// Files that a qcow2 image names, such as its backing file, are opened too.
    pub backing_files: bool,
    /// What the guest's GET_ID gives.
    pub serial: Option<String>,
    /// The device's name in the API.
    pub id: Option<String>,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            image_type: None,
            backing_files: false,
            serial: None,
            id: None,
        }
    }
}

impl DiskConfig {
    /// Reads `path=disk.raw,readonly=on`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let default = Self::default();
        let text = read_keys(OPTION, KNOWN, NOT_BUILT, text)?;
        // Polling is the driver's affair by EVENT_IDX; the key is taken for compatibility.
        text.toggle("poll_queue")?;
        Ok(Self {
            path: text.required("path")?.into(),
            readonly: text.toggle("readonly")?.unwrap_or(default.readonly),
            direct: text.toggle("direct")?.unwrap_or(default.direct),
            num_queues: number(&text, "num_queues", 1, MAX_QUEUES)?.unwrap_or(default.num_queues),
            queue_size: number(&text, "queue_size", 1, 32768)?.unwrap_or(default.queue_size),
            image_type: text.convert("image_type", "raw or qcow2 is allowed", |v| match v {
                "raw" => Some(ImageType::Raw),
                "qcow2" => Some(ImageType::Qcow2),
                _ => None,
            })?,
            backing_files: text
                .toggle("backing_files")?
                .unwrap_or(default.backing_files),
            serial: text.text("serial").map(str::to_owned),
            id: text.text("id").map(str::to_owned),
        })
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        if self.path.as_os_str().is_empty() {
            return wrong("path is missing".into());
        }
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return wrong(format!(
                "num_queues={} is wrong; 1 to {MAX_QUEUES} are allowed",
                self.num_queues
            ));
        }
        // A request takes two entries besides its data.
        if !self.queue_size.is_power_of_two() || !(4..=32768).contains(&self.queue_size) {
            return wrong(format!(
                "queue_size={} is wrong; a power of two from 4 to 32768 is allowed",
                self.queue_size
            ));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_LENGTH || !serial.is_ascii())
        {
            return wrong(format!(
                "serial={serial} is wrong; up to {SERIAL_LENGTH} ASCII characters are allowed"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<DiskConfig, String> {
        let config = DiskConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn defaults_and_keys() {
        let disk = checked("path=/a").unwrap();
        let expected = DiskConfig {
            path: "/a".into(),
            ..DiskConfig::default()
        };
        assert_eq!(disk, expected);
        let disk = checked("path=/a,readonly=on,direct=true,num_queues=4,queue_size=256,image_type=raw,serial=s1,id=d,iommu=off,vhost_user=false")
            .unwrap();
        assert!(disk.readonly && disk.direct);
        assert_eq!((disk.num_queues, disk.queue_size), (4, 256));
        assert_eq!(disk.image_type, Some(ImageType::Raw));
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "",
            "readonly=on",
            "path=/a,num_queues=0",
            "path=/a,queue_size=100",
            "path=/a,queue_size=2",
            "path=/a,image_type=vmdk",
            "path=/a,serial=123456789012345678901",
            "path=/a,iommu=on",
            "path=/a,socket=/s",
            "path=/a,colour=red",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--disk: "), "{error}");
        }
    }
}
