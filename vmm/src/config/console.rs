//! Where a console's bytes go.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The host's end of a console.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
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
}

/// `--serial`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Where its bytes go.
    pub mode: ConsoleMode,
}

impl ConsoleConfig {
    /// Reads `off`, `null`, `tty` or `file=PATH`.
    pub fn parse(option: &'static str, text: &str) -> Result<Self, ConfigError> {
        let mode = match text.split_once('=') {
            None if text == "off" => ConsoleMode::Off,
            None if text == "null" || text.is_empty() => ConsoleMode::Null,
            None if text == "tty" => ConsoleMode::Tty,
            Some(("file", "")) => {
                return Err(ConfigError::value(
                    option,
                    "file= needs a path, as in file=/tmp/log",
                ));
            }
            Some(("file", path)) => ConsoleMode::File(path.into()),
            _ => {
                return Err(ConfigError::value(
                    option,
                    format!("{text:?} is unknown; off, null, tty or file=PATH would do"),
                ));
            }
        };
        Ok(Self { mode })
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
        assert_eq!(read("file=/a=b,c"), ConsoleMode::File("/a=b,c".into()));
    }

    #[test]
    fn wrong_modes_say_what_would_do() {
        for text in ["ttyy", "file", "file=", "tty=1"] {
            let error = ConsoleConfig::parse("--serial", text)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("--serial: "), "{error}");
            assert!(error.contains("file="), "{error}");
        }
    }
}
