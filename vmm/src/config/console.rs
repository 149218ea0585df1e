//! Where a console's bytes go.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The host's end of a console.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ConsoleMode {
    /// The guest has no such device.
    Off,
    /// The device is there; its output is dropped.
    #[default]
    Null,
    /// Standard input and output.
    Tty,
    /// Output goes to a file, which is created or emptied.
    File(PathBuf),
    /// A pseudo-terminal of its own; where it is, is known once the VM runs.
    Pty(Option<PathBuf>),
    /// Whoever connects to a UNIX socket at this path.
    Socket(PathBuf),
}

/// `--serial`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "ConsoleJson", into = "ConsoleJson")]
pub struct ConsoleConfig {
    /// Where its bytes go.
    pub mode: ConsoleMode,
    /// Behind the virtual IOMMU.
    pub iommu: bool,
}

/// Its JSON form: the mode's name, and the file or socket of that one which has it.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct ConsoleJson {
    mode: ModeName,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    iommu: bool,
}

#[derive(Default, Deserialize, Serialize)]
enum ModeName {
    Off,
    #[default]
    Null,
    Tty,
    File,
    Pty,
    Socket,
}

impl TryFrom<ConsoleJson> for ConsoleConfig {
    type Error = &'static str;

    fn try_from(json: ConsoleJson) -> Result<Self, Self::Error> {
        let told = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
        if json.socket.is_some() && !matches!(json.mode, ModeName::Socket) {
            return Err("only mode Socket has a socket");
        }
        let mode = match (json.mode, json.file) {
            (ModeName::File, file) => {
                ConsoleMode::File(told(file).ok_or("mode File needs a file")?)
            }
            // Where the last one was, of a configuration that was shown.
            (ModeName::Pty, _) => ConsoleMode::Pty(None),
            (_, Some(_)) => return Err("only mode File has a file"),
            (ModeName::Off, None) => ConsoleMode::Off,
            (ModeName::Null, None) => ConsoleMode::Null,
            (ModeName::Tty, None) => ConsoleMode::Tty,
            (ModeName::Socket, None) => {
                ConsoleMode::Socket(told(json.socket).ok_or("mode Socket needs a socket")?)
            }
        };
        Ok(Self {
            mode,
            iommu: json.iommu,
        })
    }
}

impl From<ConsoleConfig> for ConsoleJson {
    fn from(config: ConsoleConfig) -> Self {
        let (mode, file, socket) = match config.mode {
            ConsoleMode::Off => (ModeName::Off, None, None),
            ConsoleMode::Null => (ModeName::Null, None, None),
            ConsoleMode::Tty => (ModeName::Tty, None, None),
            ConsoleMode::File(file) => (ModeName::File, Some(file), None),
            ConsoleMode::Pty(path) => (ModeName::Pty, path, None),
            ConsoleMode::Socket(path) => (ModeName::Socket, None, Some(path)),
        };
        Self {
            mode,
            file,
            socket,
            iommu: config.iommu,
        }
    }
}

impl ConsoleConfig {
    /// Reads `off`, `null`, `tty`, `pty`, `file=PATH` or `socket=PATH`, with `,iommu=on` or `,iommu=off` behind it or not.
    pub fn parse(option: &'static str, text: &str) -> Result<Self, ConfigError> {
        let (text, iommu) = match text.rsplit_once(",iommu=") {
            Some((mode, toggle)) => match option_parser::parse_toggle(toggle) {
                Some(iommu) => (mode, iommu),
                None => {
                    let what = format!("iommu={toggle} is wrong; on or off is allowed");
                    return Err(ConfigError::value(option, what));
                }
            },
            None => (text, false),
        };
        let mode = match text.split_once('=') {
            None if text == "off" => ConsoleMode::Off,
            None if text == "null" || text.is_empty() => ConsoleMode::Null,
            None if text == "tty" => ConsoleMode::Tty,
            None if text == "pty" => ConsoleMode::Pty(None),
            Some((key @ ("file" | "socket"), "")) => {
                let what = format!("{key}= needs a path, as in {key}=/tmp/console");
                return Err(ConfigError::value(option, what));
            }
            Some(("file", path)) => ConsoleMode::File(path.into()),
            Some(("socket", path)) => ConsoleMode::Socket(path.into()),
            _ => {
                return Err(ConfigError::value(
                    option,
                    format!(
                        "{text:?} is unknown; off, null, tty, pty, file=PATH or socket=PATH would do"
                    ),
                ));
            }
        };
        Ok(Self { mode, iommu })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_read() {
        let read = |text| ConsoleConfig::parse("--serial", text).unwrap().mode;
        assert_eq!(read("off"), ConsoleMode::Off);
        assert_eq!(read("null"), ConsoleMode::Null);
        assert_eq!(read(""), ConsoleMode::Null);
        assert_eq!(read("tty"), ConsoleMode::Tty);
        assert_eq!(read("pty"), ConsoleMode::Pty(None));
        assert_eq!(read("socket=/s"), ConsoleMode::Socket("/s".into()));
        assert_eq!(read("file=/a=b,c"), ConsoleMode::File("/a=b,c".into()));
    }

    #[test]
    fn json_names_mode_and_file() {
        for (text, json) in [
            ("tty", r#"{"mode":"Tty"}"#),
            ("file=/a", r#"{"mode":"File","file":"/a"}"#),
            ("pty", r#"{"mode":"Pty"}"#),
            ("socket=/s", r#"{"mode":"Socket","socket":"/s"}"#),
        ] {
            let config = ConsoleConfig::parse("--serial", text).unwrap();
            assert_eq!(serde_json::to_string(&config).unwrap(), json);
            assert_eq!(serde_json::from_str::<ConsoleConfig>(json).unwrap(), config);
        }
        for wrong in [
            r#"{"mode":"File"}"#,
            r#"{"mode":"File","file":""}"#,
            r#"{"mode":"Null","file":"/a"}"#,
            r#"{"mode":"Pipe"}"#,
            r#"{"mode":"Socket"}"#,
            r#"{"mode":"Tty","socket":"/s"}"#,
        ] {
            assert!(
                serde_json::from_str::<ConsoleConfig>(wrong).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn wrong_modes_say_what_would_do() {
        for text in ["ttyy", "file", "file=", "socket=", "tty=1"] {
            let error = ConsoleConfig::parse("--serial", text)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("--serial: "), "{error}");
            assert!(error.contains("=/") || error.contains("=PATH"), "{error}");
        }
    }
}
