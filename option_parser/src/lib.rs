//! The `key=value,key=[a,b]` text that every command-line option uses.
//!
//! ```
//! use option_parser::OptionText;
//!
//! let text = OptionText::parse("--memory", &["size", "shared"], "size=1G,shared=on")?;
//! assert_eq!(text.size("size")?, Some(1 << 30));
//! assert_eq!(text.toggle("shared")?, Some(true));
//! assert_eq!(
//!     OptionText::parse("--memory", &["size"], "sise=1G").unwrap_err().to_string(),
//!     "--memory: unknown key \"sise\"; it has size"
//! );
//! # Ok::<(), option_parser::OptionError>(())
//! ```

mod split;
mod value;

use thiserror::Error;
pub use value::{parse_size, parse_toggle};

/// What is wrong with an option's text. Each message names the option, the key, and what is allowed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum OptionError {
    /// No such key.
    #[error("{option}: unknown key {key:?}; it has {known}")]
    UnknownKey {
        /// The option, e.g. `--memory`.
        option: &'static str,
        /// What was written.
        key: String,
        /// The keys that there are.
        known: String,
    },
    /// A key came twice.
    #[error("{option}: {key} is given twice")]
    Twice {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
    },
    /// A key without `=value`.
    #[error("{option}: {key} needs a value, as in {key}=VALUE")]
    NoValue {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
    },
    /// A value that the key does not take.
    #[error("{option}: {key}={value} is wrong; {allowed}")]
    Value {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
        /// What was written.
        value: String,
        /// What would do.
        allowed: String,
    },
    /// A key that must be there.
    #[error("{option}: {key} is missing")]
    Missing {
        /// The option.
        option: &'static str,
        /// The key.
        key: &'static str,
    },
    /// Brackets or quotes do not close.
    #[error("{option}: {what} in {text:?}")]
    Unbalanced {
        /// The option.
        option: &'static str,
        /// Which.
        what: &'static str,
        /// The whole text.
        text: String,
    },
}

/// The keys and values of one option.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OptionText {
    option: &'static str,
    pairs: Vec<(String, String)>,
}

impl OptionText {
    /// Splits `text` at commas outside of `[...]` and `"..."`. An empty text has no keys.
    ///
    /// # Errors
    /// Unknown or repeated keys, keys without a value, brackets that do not close.
    pub fn parse(option: &'static str, known: &[&str], text: &str) -> Result<Self, OptionError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in split::at_commas(option, text)? {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.trim(), Some(value)),
                None => (part.trim(), None),
            };
            if !known.contains(&key) {
                return Err(OptionError::UnknownKey {
                    option,
                    key: key.to_owned(),
                    known: known.join(", "),
                });
            }
            let key = key.to_owned();
            let Some(value) = value else {
                return Err(OptionError::NoValue { option, key });
            };
            if pairs.iter().any(|(k, _)| *k == key) {
                return Err(OptionError::Twice { option, key });
            }
            pairs.push((key, split::unquote(value)));
        }
        Ok(Self { option, pairs })
    }

    /// The value as it was written, without its quotes. An empty one counts as not given.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.pairs
            .iter()
            .find(|(k, v)| k == key && !v.is_empty())
            .map(|(_, v)| v.as_str())
    }

    /// As [`text`](Self::text), for a key that must be there.
    ///
    /// # Errors
    /// [`OptionError::Missing`].
    pub fn required(&self, key: &'static str) -> Result<&str, OptionError> {
        self.text(key).ok_or(OptionError::Missing {
            option: self.option,
            key,
        })
    }

    /// A whole number from `least` to `most`.
    ///
    /// # Errors
    /// [`OptionError::Value`] with the range.
    pub fn number(&self, key: &str, least: u64, most: u64) -> Result<Option<u64>, OptionError> {
        self.convert(
            key,
            &format!("a number from {least} to {most} is allowed"),
            |text| text.parse().ok().filter(|n| (least..=most).contains(n)),
        )
    }

    /// A size in bytes: a number, with K, M, G or T for powers of 1024.
    ///
    /// # Errors
    /// [`OptionError::Value`].
    pub fn size(&self, key: &str) -> Result<Option<u64>, OptionError> {
        self.convert(
            key,
            "a size such as 512M, with K, M, G or T, is allowed",
            parse_size,
        )
    }

    /// `on`, `off`, `true` or `false`, in any case.
    ///
    /// # Errors
    /// [`OptionError::Value`].
    pub fn toggle(&self, key: &str) -> Result<Option<bool>, OptionError> {
        self.convert(key, "on or off is allowed", parse_toggle)
    }

    /// The elements of `[a,b,c]`; a value without brackets is a list of one.
    ///
    /// # Errors
    /// Brackets or quotes inside that do not close.
    pub fn list(&self, key: &str) -> Result<Option<Vec<String>>, OptionError> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        let inner = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(text);
        let parts = split::at_commas(self.option, inner)?;
        Ok(Some(parts.iter().map(|p| split::unquote(p)).collect()))
    }

    /// Any other value, by `read`; `allowed` says in the error what would do.
    ///
    /// # Errors
    /// [`OptionError::Value`] where `read` gives `None`.
    pub fn convert<T>(
        &self,
        key: &str,
        allowed: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionError> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        match read(text) {
            Some(value) => Ok(Some(value)),
            None => Err(OptionError::Value {
                option: self.option,
                key: key.to_owned(),
                value: text.to_owned(),
                allowed: allowed.to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
