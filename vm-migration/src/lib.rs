//! Versioned saved state: schemas, sections and the envelope they travel in, on disk and on the wire.
//!
//! What a component saves is a type of its own, a [`Schema`], never the running struct. Encoded it is a [`Section`];
//! the sections of a machine make a [`Snapshot`]. Restoring takes every section out again by its type and id:
//! one that is missing, of another version, or taken by nobody is an error that names it.
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use vm_migration::{Schema, Snapshot};
//!
//! #[derive(Deserialize, Serialize)]
//! #[serde(deny_unknown_fields)]
//! struct TimerV1 { count: u32 }
//!
//! impl Schema for TimerV1 {
//!     const KIND: &'static str = "timer";
//!     const VERSION: u32 = 1;
//! }
//!
//! # fn main() -> Result<(), vm_migration::MigrationError> {
//! let mut saved = Snapshot::new();
//! saved.save("timer0", &TimerV1 { count: 7 })?;
//! let mut file = Vec::new();
//! saved.write_to(&mut file)?;
//!
//! let mut restored = Snapshot::from_bytes(&file)?;
//! let timer: TimerV1 = restored.take("timer0")?;
//! assert_eq!(timer.count, 7);
//! restored.finish()?;
//! # Ok(()) }
//! ```

mod envelope;
mod section;
mod snapshot;

pub use envelope::{ENVELOPE_VERSION, MAX_DATA, MAX_NAME, MAX_SECTIONS, MAX_TOTAL};
pub use section::{Schema, Section};
pub use snapshot::Snapshot;

use std::io;

use thiserror::Error;

/// What can go wrong in saving and restoring.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// The state cannot be written as JSON.
    #[error("encoding section {kind:?} of {id:?}")]
    Encode {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The data are not what the schema says.
    #[error("decoding section {kind:?} of {id:?}")]
    Decode {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
        /// Where and why not.
        #[source]
        source: serde_json::Error,
    },
    /// The section was asked for as another kind.
    #[error("section {kind:?} of {id:?} was read as a {wanted:?}")]
    Kind {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
        /// Kind of the schema.
        wanted: &'static str,
    },
    /// The section is of a version that nobody knows here.
    #[error("section {kind:?} of {id:?} has version {found}, and only {known} is known here")]
    Version {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
        /// The section's version.
        found: u32,
        /// The schema's version.
        known: u32,
    },
    /// The data are as the schema says, and no component could have saved them.
    #[error("section {kind:?} of {id:?} has {what}")]
    Impossible {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A component's section is not there.
    #[error("there is no section {kind:?} of {id:?}")]
    Absent {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
    },
    /// A section belongs to no component of this machine.
    #[error("section {kind:?} of {id:?}, version {version}, belongs to nothing in this machine")]
    NotTaken {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
        /// The section's version.
        version: u32,
    },
    /// Two sections of one kind and id.
    #[error("there are two sections {kind:?} of {id:?}")]
    Twice {
        /// The section's kind.
        kind: String,
        /// Whose state it is.
        id: String,
    },
    /// Something is larger than the envelope allows.
    #[error("{what} is {size} long, and at most {limit} is allowed")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// Its length, in bytes or sections.
        size: u64,
        /// The most there may be.
        limit: u64,
    },
    /// Not an envelope of ours.
    #[error("this is no saved machine state: it does not start with the mark of one")]
    Magic,
    /// An envelope of another version.
    #[error("the saved state has envelope version {0}, and only {ENVELOPE_VERSION} is known here")]
    EnvelopeVersion(u32),
    /// A kind or id is not UTF-8.
    #[error("the name of a section is not text")]
    NotText,
    /// It ends too early.
    #[error("the saved state is cut short")]
    Truncated,
    /// Bits changed since it was written.
    #[error(
        "the saved state is damaged: its checksum is {computed:#010x} and should be {stored:#010x}"
    )]
    Checksum {
        /// Of what was read.
        computed: u32,
        /// As it was written.
        stored: u32,
    },
    /// There are bytes after the end.
    #[error("{0} bytes follow the end of the saved state")]
    Trailing(u64),
    /// The file or connection failed.
    #[error("{0} the saved state")]
    Io(&'static str, #[source] io::Error),
}
