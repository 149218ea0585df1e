//! The envelope: bytes that hold sections, on disk and on the wire.
//!
//! All numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | the mark `VMSTATE` and a zero |
//! | 4 | version of the envelope, 1 |
//! | 4 | number of sections |
//! | … | the sections |
//! | 4 | CRC-32 (ISO 3309) of all bytes before it |
//!
//! and a section is
//!
//! | bytes | what |
//! |---|---|
//! | 1, then as many | kind, UTF-8 |
//! | 1, then as many | id, UTF-8 |
//! | 4 | version |
//! | 4, then as many | data |
//!
//! Whoever reads it may be given anything: lengths are held against the limits, and memory is taken as data arrive.

use std::io::{self, Read, Write};

use crc32fast::Hasher;

use crate::{MigrationError, Section};

const MAGIC: [u8; 8] = *b"VMSTATE\0";
/// The version that is written, and the only one that is read.
pub const ENVELOPE_VERSION: u32 = 1;
/// Most bytes of a kind or id.
pub const MAX_NAME: usize = u8::MAX as usize;
/// Most bytes of one section's data.
pub const MAX_DATA: u64 = 16 << 20;
/// Most sections.
pub const MAX_SECTIONS: u32 = 4096;
/// Most bytes of all sections' data together.
pub const MAX_TOTAL: u64 = 64 << 20;

fn limit(what: &'static str, size: u64, limit: u64) -> Result<(), MigrationError> {
    if size > limit {
        return Err(MigrationError::TooLong { what, size, limit });
    }
    Ok(())
}

/// Whether the envelope can hold the section.
pub(crate) fn check(section: &Section) -> Result<(), MigrationError> {
    limit(
        "the kind of a section",
        section.kind.len() as u64,
        MAX_NAME as u64,
    )?;
    limit(
        "the id of a section",
        section.id.len() as u64,
        MAX_NAME as u64,
    )?;
    limit("the data of a section", section.data.len() as u64, MAX_DATA)
}

pub(crate) fn write(sections: &[Section], to: &mut dyn Write) -> Result<(), MigrationError> {
    limit(
        "the list of sections",
        sections.len() as u64,
        MAX_SECTIONS.into(),
    )?;
    let total = sections.iter().map(|s| s.data.len() as u64).sum();
    limit("the data of all sections", total, MAX_TOTAL)?;

    let mut out = Summed {
        inner: to,
        sum: Hasher::new(),
    };
    out.put(&MAGIC)?;
    out.put(&ENVELOPE_VERSION.to_le_bytes())?;
    // Held against the limits above and by `check`, so no cast cuts anything off.
    out.put(&(sections.len() as u32).to_le_bytes())?;
    for section in sections {
        check(section)?;
        for name in [&section.kind, &section.id] {
            out.put(&[name.len() as u8])?;
            out.put(name.as_bytes())?;
        }
        out.put(&section.version.to_le_bytes())?;
        out.put(&(section.data.len() as u32).to_le_bytes())?;
        out.put(&section.data)?;
    }
    let sum = out.sum.clone().finalize();
    out.put(&sum.to_le_bytes())?;
    out.inner.flush().map_err(writing)
}

pub(crate) fn read(from: &mut dyn Read) -> Result<Vec<Section>, MigrationError> {
    let mut input = Summed {
        inner: from,
        sum: Hasher::new(),
    };
    if input.array()? != MAGIC {
        return Err(MigrationError::Magic);
    }
    let version = input.number()?;
    if version != ENVELOPE_VERSION {
        return Err(MigrationError::EnvelopeVersion(version));
    }
    let count = input.number()?;
    limit("the list of sections", count.into(), MAX_SECTIONS.into())?;
    let mut sections = Vec::new();
    let mut total = 0;
    for _ in 0..count {
        let kind = input.name()?;
        let id = input.name()?;
        let version = input.number()?;
        let length = u64::from(input.number()?);
        limit("the data of a section", length, MAX_DATA)?;
        total += length;
        limit("the data of all sections", total, MAX_TOTAL)?;
        let data = input.bytes(length)?;
        sections.push(Section {
            kind,
            version,
            id,
            data,
        });
    }
    let computed = input.sum.clone().finalize();
    let stored = input.number()?;
    if stored != computed {
        return Err(MigrationError::Checksum { computed, stored });
    }
    Ok(sections)
}

/// A reader or writer with the checksum of what went through.
struct Summed<T> {
    inner: T,
    sum: Hasher,
}

impl Summed<&mut dyn Write> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), MigrationError> {
        self.sum.update(bytes);
        self.inner.write_all(bytes).map_err(writing)
    }
}

impl Summed<&mut dyn Read> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], MigrationError> {
        let mut bytes = [0; N];
        self.inner
            .read_exact(&mut bytes)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => MigrationError::Truncated,
                _ => reading(e),
            })?;
        self.sum.update(&bytes);
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u32, MigrationError> {
        self.array().map(u32::from_le_bytes)
    }

    /// `length` bytes; what is allocated grows with what comes.
    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, MigrationError> {
        let mut bytes = Vec::new();
        Read::take(&mut *self.inner, length)
            .read_to_end(&mut bytes)
            .map_err(reading)?;
        if bytes.len() as u64 != length {
            return Err(MigrationError::Truncated);
        }
        self.sum.update(&bytes);
        Ok(bytes)
    }

    fn name(&mut self) -> Result<String, MigrationError> {
        let [length] = self.array()?;
        String::from_utf8(self.bytes(length.into())?).map_err(|_| MigrationError::NotText)
    }
}

fn reading(error: io::Error) -> MigrationError {
    MigrationError::Io("reading", error)
}

fn writing(error: io::Error) -> MigrationError {
    MigrationError::Io("writing", error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Snapshot;

    /// An envelope as version 1 writes it. It never changes.
    const GOLDEN: &[u8] = b"VMSTATE\0\x01\0\0\0\x02\0\0\0\
        \x06serial\x04com1\x01\0\0\0\x0e\0\0\0{\"divisor\":12}\
        \x03rtc\x00\x07\x02\0\0\x00\0\0\0\
        \x40\xdd\x23\x3a";

    fn section(kind: &str, version: u32, id: &str, data: &[u8]) -> Section {
        Section {
            kind: kind.to_owned(),
            version,
            id: id.to_owned(),
            data: data.to_vec(),
        }
    }

    fn golden_sections() -> Vec<Section> {
        vec![
            section("serial", 1, "com1", br#"{"divisor":12}"#),
            section("rtc", 0x207, "", b""),
        ]
    }

    fn bytes_of(sections: &[Section]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(sections, &mut bytes).unwrap();
        bytes
    }

    /// `bytes` with the checksum that they should have.
    fn summed(mut bytes: Vec<u8>) -> Vec<u8> {
        let end = bytes.len() - 4;
        let sum = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn error(bytes: &[u8]) -> MigrationError {
        Snapshot::from_bytes(bytes).unwrap_err()
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(bytes_of(&golden_sections()), GOLDEN);
        assert_eq!(
            Snapshot::from_bytes(GOLDEN).unwrap().sections(),
            golden_sections()
        );
    }

    #[test]
    fn cut_short_anywhere_it_is_refused() {
        for length in 0..GOLDEN.len() {
            assert!(
                matches!(error(&GOLDEN[..length]), MigrationError::Truncated),
                "{length}"
            );
        }
    }

    #[test]
    fn no_bit_can_change() {
        for bit in 0..GOLDEN.len() * 8 {
            let mut bytes = GOLDEN.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Snapshot::from_bytes(&bytes).is_err(), "bit {bit}");
        }
        let mut bytes = GOLDEN.to_vec();
        bytes[45] ^= 1;
        assert!(matches!(error(&bytes), MigrationError::Checksum { .. }));
    }

    #[test]
    fn bytes_after_the_end_are_for_the_next_reader_or_an_error() {
        let two = [GOLDEN, GOLDEN, b"rest"].concat();
        assert!(matches!(error(&two), MigrationError::Trailing(n) if n == GOLDEN.len() as u64 + 4));
        let mut from = &two[..];
        Snapshot::read_from(&mut from).unwrap();
        Snapshot::read_from(&mut from).unwrap();
        assert_eq!(from, b"rest");
    }

    #[test]
    fn others_files_and_later_versions_are_told_apart() {
        assert!(matches!(
            error(b"\x7fELF\x02\x01\x01\0"),
            MigrationError::Magic
        ));
        let mut later = GOLDEN.to_vec();
        later[8] = 2;
        assert!(matches!(
            error(&summed(later)),
            MigrationError::EnvelopeVersion(2)
        ));
    }

    #[test]
    fn too_long_is_refused_before_it_is_read() {
        let mut bytes = GOLDEN.to_vec();
        bytes[12..16].copy_from_slice(&(MAX_SECTIONS + 1).to_le_bytes());
        let too_long = error(&bytes).to_string();
        assert_eq!(
            too_long,
            "the list of sections is 4097 long, and at most 4096 is allowed"
        );
        let mut bytes = GOLDEN.to_vec();
        bytes[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            error(&bytes),
            MigrationError::TooLong {
                limit: MAX_DATA,
                ..
            }
        ));
        // A length within the limits whose data never come.
        bytes[32..36].copy_from_slice(&(MAX_DATA as u32).to_le_bytes());
        assert!(matches!(error(&bytes), MigrationError::Truncated));
    }

    #[test]
    fn all_sections_together_have_a_limit() {
        // Sections without names, each of as much data as one may have.
        let mut head = GOLDEN[..12].to_vec();
        head.extend(MAX_SECTIONS.to_le_bytes());
        let mut section = vec![0; 6];
        section.extend((MAX_DATA as u32).to_le_bytes());
        let mut input: Box<dyn Read> = Box::new(&head[..]);
        for _ in 0..=MAX_TOTAL / MAX_DATA {
            let data = io::repeat(0).take(MAX_DATA);
            input = Box::new(input.chain(&section[..]).chain(data));
        }
        let error = read(&mut input).unwrap_err();
        assert!(
            matches!(
                error,
                MigrationError::TooLong {
                    limit: MAX_TOTAL,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn what_could_not_be_read_is_not_written() {
        let long = "x".repeat(MAX_NAME + 1);
        let big = vec![0; MAX_DATA as usize + 1];
        for bad in [
            section(&long, 1, "", b""),
            section("", 1, &long, b""),
            section("", 1, "", &big),
        ] {
            let refused = write(std::slice::from_ref(&bad), &mut io::sink()).unwrap_err();
            assert!(matches!(refused, MigrationError::TooLong { .. }));
            assert!(Snapshot::new().add(bad).is_err());
        }
        let many = vec![section("", 1, "", b""); MAX_SECTIONS as usize + 1];
        assert!(write(&many, &mut io::sink()).is_err());
    }

    #[test]
    fn names_are_text_and_come_once() {
        let mut bytes = GOLDEN.to_vec();
        bytes[17] = 0xff;
        assert!(matches!(error(&summed(bytes)), MigrationError::NotText));
        let twice = [golden_sections(), golden_sections()].concat();
        assert!(matches!(
            error(&bytes_of(&twice)),
            MigrationError::Twice { .. }
        ));
    }

    #[test]
    fn failures_of_the_file_keep_their_cause() {
        let full = write(&golden_sections(), &mut &mut [0; 20][..]).unwrap_err();
        assert_eq!(full.to_string(), "writing the saved state");
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
        let broken = Snapshot::read_from(&mut Broken).unwrap_err();
        assert!(
            matches!(&broken, MigrationError::Io("reading", e) if e.kind() == io::ErrorKind::ConnectionReset)
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            sections in prop::collection::vec(("[a-z]{0,9}", any::<u32>(), ".{0,9}", prop::collection::vec(any::<u8>(), 0..99)), 0..9),
        ) {
            let sections: Vec<_> = sections
                .iter()
                .map(|(kind, version, id, data)| section(kind, *version, id, data))
                .collect();
            prop_assert_eq!(read(&mut &bytes_of(&sections)[..]).unwrap(), sections);
        }

        /// Anything at all, with a good checksum so that nothing is refused for that alone.
        #[test]
        fn anything_is_read_or_refused(tail in prop::collection::vec(prop_oneof![0..4u8, any::<u8>()], 8..200)) {
            let bytes = summed([&GOLDEN[..12], &tail].concat());
            if let Ok(sections) = read(&mut &bytes[..]) {
                prop_assert_eq!(&bytes_of(&sections)[..], &bytes[..bytes_of(&sections).len()]);
            }
        }
    }
}
