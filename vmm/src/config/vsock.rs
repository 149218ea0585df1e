//! `--vsock`: sockets between the guest and the host.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, read_keys};

const OPTION: &str = "--vsock";
const KNOWN: &[&str] = &["cid", "socket", "iommu", "id"];
/// Context ids below are reserved (virtio 1.2 §5.10.4), and the one above is for any.
const FIRST_CID: u32 = 3;
const LAST_CID: u32 = u32::MAX - 1;
/// Most bytes of the path: the host's ports append `_` and a number, and 107 is the most that Linux takes.
const MOST_PATH: usize = 96;

/// `--vsock`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id.
    pub cid: u32,
    /// Where programs of the host connect to; nothing may be there.
    pub socket: PathBuf,
    /// Behind the virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// The device's name in the API.
    #[serde(default)]
    pub id: Option<String>,
}

impl VsockConfig {
    /// Reads `cid=3,socket=PATH`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let text = read_keys(OPTION, KNOWN, &[], text)?;
        let cid = text
            .number("cid", FIRST_CID.into(), LAST_CID.into())?
            .and_then(|cid| u32::try_from(cid).ok());
        Ok(Self {
            cid: cid.ok_or_else(|| ConfigError::value(OPTION, "cid is missing"))?,
            socket: text.required("socket")?.into(),
            iommu: text.toggle("iommu")?.unwrap_or_default(),
            id: text.text("id").map(str::to_owned),
        })
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        if !(FIRST_CID..=LAST_CID).contains(&self.cid) {
            return wrong(format!(
                "cid={} is wrong; {FIRST_CID} to {LAST_CID} are allowed",
                self.cid
            ));
        }
        let path = self.socket.as_os_str();
        if path.is_empty() {
            return wrong("socket is missing".into());
        }
        if path.len() > MOST_PATH || path.as_bytes().contains(&0) {
            return wrong(format!(
                "socket={} is wrong; up to {MOST_PATH} bytes are allowed, none of them 0",
                self.socket.display()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let vsock = VsockConfig::parse("cid=3,socket=/run/v,id=v0,iommu=off").unwrap();
        let wanted = VsockConfig {
            cid: 3,
            socket: "/run/v".into(),
            iommu: false,
            id: Some("v0".into()),
        };
        assert_eq!(vsock, wanted);
        vsock.validate().unwrap();
        let most = VsockConfig::parse("cid=4294967294,socket=v").unwrap();
        assert_eq!((most.cid, most.id), (LAST_CID, None));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, wanted) in [
            ("socket=/v", "cid"),
            ("cid=3", "socket"),
            ("cid=2,socket=/v", "cid=2"),
            ("cid=4294967295,socket=/v", "cid=4294967295"),
            ("cid=x,socket=/v", "cid=x"),
            ("cid=3,socket=/v,iommu=2", "iommu"),
            ("cid=3,socket=/v,port=1", "port"),
        ] {
            let error = VsockConfig::parse(text).unwrap_err().to_string();
            assert!(
                error.starts_with("--vsock: ") && error.contains(wanted),
                "{text}: {error}"
            );
        }
        let long = format!("cid=3,socket={}", "x".repeat(97));
        let error = VsockConfig::parse(&long).unwrap().validate().unwrap_err();
        assert!(error.to_string().contains("up to 96 bytes"), "{error}");
    }

    #[test]
    fn json_is_checked_too() {
        let vsock: VsockConfig = serde_json::from_str(r#"{"cid": 1, "socket": "/v"}"#).unwrap();
        let error = vsock.validate().unwrap_err().to_string();
        assert_eq!(
            error,
            "--vsock: cid=1 is wrong; 3 to 4294967294 are allowed"
        );
    }
}
