//! Schemas, and one component's state encoded by one.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::MigrationError;

/// A type of saved state.
///
/// Once released, a schema never changes: new state is a new type with the same `KIND` and the next `VERSION`. Fields
/// that are unknown should be refused (`#[serde(deny_unknown_fields)]`), for they are state that would be lost.
pub trait Schema: Serialize + DeserializeOwned {
    /// What it is the state of, e.g. `"serial"`: up to [`MAX_NAME`](crate::MAX_NAME) bytes.
    const KIND: &'static str;
    /// Counts the changes of this kind's form, from 1.
    const VERSION: u32;
}

/// The state of one component, encoded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Section {
    /// [`Schema::KIND`] of the type.
    pub kind: String,
    /// [`Schema::VERSION`] of the type.
    pub version: u32,
    /// Whose state it is among those of its kind, e.g. `"_disk0"`.
    pub id: String,
    /// The state as JSON.
    pub data: Vec<u8>,
}

impl Section {
    /// Encodes the `state` of `id`. An error is [`MigrationError::Encode`]: JSON cannot hold every type, for example no
    /// map whose keys are not texts or numbers.
    pub fn encode<S: Schema>(id: &str, state: &S) -> Result<Self, MigrationError> {
        let data = serde_json::to_vec(state).map_err(|source| MigrationError::Encode {
            kind: S::KIND.to_owned(),
            id: id.to_owned(),
            source,
        })?;
        Ok(Self {
            kind: S::KIND.to_owned(),
            version: S::VERSION,
            id: id.to_owned(),
            data,
        })
    }

    /// The state again. Errors where kind or version are not the schema's, or the data do not fit it.
    pub fn decode<S: Schema>(&self) -> Result<S, MigrationError> {
        let (kind, id) = (self.kind.clone(), self.id.clone());
        if self.kind != S::KIND {
            return Err(MigrationError::Kind {
                kind,
                id,
                wanted: S::KIND,
            });
        }
        if self.version != S::VERSION {
            return Err(MigrationError::Version {
                kind,
                id,
                found: self.version,
                known: S::VERSION,
            });
        }
        serde_json::from_slice(&self.data).map_err(|source| MigrationError::Decode {
            kind,
            id,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Timer {
        count: u64,
        name: Option<String>,
    }

    impl Schema for Timer {
        const KIND: &'static str = "timer";
        const VERSION: u32 = 2;
    }

    fn section() -> Section {
        let state = Timer {
            count: u64::MAX,
            name: None,
        };
        Section::encode("t0", &state).unwrap()
    }

    #[test]
    fn state_survives() {
        assert_eq!(
            section().data,
            br#"{"count":18446744073709551615,"name":null}"#
        );
        let back: Timer = section().decode().unwrap();
        assert_eq!(
            back,
            Timer {
                count: u64::MAX,
                name: None
            }
        );
    }

    #[test]
    fn another_kind_or_version_is_named() {
        let message = |section: Section| section.decode::<Timer>().unwrap_err().to_string();
        let other = Section {
            kind: "clock".into(),
            ..section()
        };
        assert_eq!(
            message(other),
            r#"section "clock" of "t0" was read as a "timer""#
        );
        for version in [0, 1, 3] {
            let other = Section {
                version,
                ..section()
            };
            let expected = format!(
                r#"section "timer" of "t0" has version {version}, and only 2 is known here"#
            );
            assert_eq!(message(other), expected);
        }
    }

    #[test]
    fn data_that_do_not_fit_are_refused() {
        for data in [
            "",
            "{}",
            "[1]",
            r#"{"count":-1}"#,
            r#"{"count":1,"more":2}"#,
            r#"{"count":1} "x""#,
        ] {
            let bad = Section {
                data: data.into(),
                ..section()
            };
            let error = bad.decode::<Timer>().unwrap_err();
            assert!(
                matches!(error, MigrationError::Decode { .. }),
                "{data}: {error}"
            );
        }
        // Deeper than any stack.
        let deep = Section {
            data: vec![b'['; 1 << 20],
            ..section()
        };
        assert!(deep.decode::<Timer>().is_err());
    }

    #[test]
    fn what_json_cannot_hold_is_an_error() {
        #[derive(Deserialize, Serialize)]
        struct Odd(BTreeMap<(u8, u8), u8>);
        impl Schema for Odd {
            const KIND: &'static str = "odd";
            const VERSION: u32 = 1;
        }
        let odd = Odd(BTreeMap::from([((1, 2), 3)]));
        let error = Section::encode("x", &odd).unwrap_err();
        assert_eq!(error.to_string(), r#"encoding section "odd" of "x""#);
    }
}
