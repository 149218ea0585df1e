//! The sections of one machine.

use std::io::{Read, Write};

use crate::{MigrationError, Schema, Section, envelope};

/// The sections of one machine: filled by saving, emptied by restoring.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Snapshot {
    sections: Vec<Section>,
}

impl Snapshot {
    /// No section yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Encodes and adds the `state` of `id`. Errors as for [`Section::encode`] and [`add`](Self::add).
    pub fn save<S: Schema>(&mut self, id: &str, state: &S) -> Result<(), MigrationError> {
        self.add(Section::encode(id, state)?)
    }

    /// Adds a section. Errors where there is one of its kind and id, or it is larger than the envelope allows.
    pub fn add(&mut self, section: Section) -> Result<(), MigrationError> {
        envelope::check(&section)?;
        if self.find(&section.kind, &section.id).is_some() {
            return Err(MigrationError::Twice {
                kind: section.kind,
                id: section.id,
            });
        }
        self.sections.push(section);
        Ok(())
    }

    /// The version of the section of `kind` and `id`, for components that restore from several versions.
    #[must_use]
    pub fn version(&self, kind: &str, id: &str) -> Option<u32> {
        let at = self.find(kind, id)?;
        self.sections.get(at).map(|section| section.version)
    }

    /// Takes out and decodes the state of `id`. Errors where there is none, and as for [`Section::decode`]; the section
    /// stays if it is of another version.
    pub fn take<S: Schema>(&mut self, id: &str) -> Result<S, MigrationError> {
        let absent = || MigrationError::Absent {
            kind: S::KIND.to_owned(),
            id: id.to_owned(),
        };
        let at = self.find(S::KIND, id).ok_or_else(absent)?;
        let state = self.sections.get(at).ok_or_else(absent)?.decode()?;
        self.sections.remove(at);
        Ok(state)
    }

    /// Ends restoring. An error is [`MigrationError::NotTaken`] with the first section that is left.
    pub fn finish(self) -> Result<(), MigrationError> {
        match self.sections.into_iter().next() {
            None => Ok(()),
            Some(Section {
                kind, version, id, ..
            }) => Err(MigrationError::NotTaken { kind, id, version }),
        }
    }

    /// What is there, in the order of adding.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Writes the envelope to a file or connection.
    pub fn write_to(&self, to: &mut dyn Write) -> Result<(), MigrationError> {
        envelope::write(&self.sections, to)
    }

    /// Reads one envelope, and not a byte more, from a file or connection that may hold anything.
    pub fn read_from(from: &mut dyn Read) -> Result<Self, MigrationError> {
        let mut snapshot = Self::new();
        for section in envelope::read(from)? {
            snapshot.add(section)?;
        }
        Ok(snapshot)
    }

    /// As [`read_from`](Self::read_from), of a whole file: bytes after the envelope are an error too.
    pub fn from_bytes(mut bytes: &[u8]) -> Result<Self, MigrationError> {
        let snapshot = Self::read_from(&mut bytes)?;
        if bytes.is_empty() {
            Ok(snapshot)
        } else {
            Err(MigrationError::Trailing(bytes.len() as u64))
        }
    }

    fn find(&self, kind: &str, id: &str) -> Option<usize> {
        self.sections
            .iter()
            .position(|section| section.kind == kind && section.id == id)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    struct V1(u8);
    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    struct V2(u8, u8);

    impl Schema for V1 {
        const KIND: &'static str = "disk";
        const VERSION: u32 = 1;
    }

    impl Schema for V2 {
        const KIND: &'static str = "disk";
        const VERSION: u32 = 2;
    }

    fn two_disks() -> Snapshot {
        let mut snapshot = Snapshot::new();
        snapshot.save("a", &V1(1)).unwrap();
        snapshot.save("b", &V2(2, 3)).unwrap();
        snapshot
    }

    fn through_bytes(snapshot: &Snapshot) -> Snapshot {
        let mut bytes = Vec::new();
        snapshot.write_to(&mut bytes).unwrap();
        Snapshot::from_bytes(&bytes).unwrap()
    }

    #[test]
    fn all_is_taken_once() {
        let mut back = through_bytes(&two_disks());
        assert_eq!(back, two_disks());
        assert_eq!(back.take::<V2>("b").unwrap(), V2(2, 3));
        assert_eq!(back.take::<V1>("a").unwrap(), V1(1));
        let gone = back.take::<V1>("a").unwrap_err();
        assert_eq!(gone.to_string(), r#"there is no section "disk" of "a""#);
        back.finish().unwrap();
        through_bytes(&Snapshot::new()).finish().unwrap();
    }

    #[test]
    fn what_nobody_took_is_named() {
        let mut back = two_disks();
        back.take::<V1>("a").unwrap();
        let error = back.finish().unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"section "disk" of "b", version 2, belongs to nothing in this machine"#
        );
    }

    #[test]
    fn an_unknown_version_is_named_and_stays() {
        let mut back = two_disks();
        let error = back.take::<V2>("a").unwrap_err();
        assert!(
            matches!(
                error,
                MigrationError::Version {
                    found: 1,
                    known: 2,
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(back.version("disk", "a"), Some(1));
        assert_eq!(back.version("disk", "c"), None);
        assert_eq!(back.version("net", "a"), None);
        back.take::<V1>("a").unwrap();
    }

    #[test]
    fn one_section_a_kind_and_id() {
        let mut snapshot = two_disks();
        let error = snapshot.save("a", &V2(0, 0)).unwrap_err();
        assert_eq!(error.to_string(), r#"there are two sections "disk" of "a""#);
        let other_kind = Section {
            kind: "net".into(),
            version: 1,
            id: "a".into(),
            data: Vec::new(),
        };
        snapshot.add(other_kind).unwrap();
        assert_eq!(snapshot.sections().len(), 3);
    }
}
