//! What can go wrong with an image, one line each.

use std::io;
use std::path::PathBuf;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on an image failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened or created.
    #[error("opening {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The storage below the image failed.
    #[error("{action} at byte {offset:#x} of the {file}")]
    Io {
        /// Verb in progressive form: reading, writing, flushing.
        action: &'static str,
        /// Which of the image's files: "image file" or "data file" or "backing file".
        file: &'static str,
        /// Byte offset in that file.
        offset: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The first four bytes are not those of a qcow image.
    #[error("this is not a qcow2 image: its first bytes are {0:02x?}")]
    NotQcow2([u8; 4]),
    /// A feature of the format, or beyond it, that this crate does not read.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// A structure on disk breaks the format's rules.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// The structure.
        what: &'static str,
        /// The rule it breaks.
        why: String,
    },
    /// Metadata contradicts itself. The image has been marked corrupt where its version can hold the mark, and takes no writes.
    #[error("the image is corrupt: {0}")]
    Corrupt(String),
    /// The corrupt bit is set in the header: only reading and repair are allowed.
    #[error("the image is marked corrupt: open it read-only, or repair it")]
    MarkedCorrupt,
    /// An earlier failure left it unknown what is on the disk, so the image takes no more writes until it is opened anew.
    #[error("the image takes no more writes after an earlier failure: open it anew")]
    Stopped,
    /// A write to an image that was opened for reading.
    #[error("the image is read-only")]
    ReadOnly,
    /// An access outside of the virtual disk.
    #[error("{length} bytes at {offset:#x} reach past the end of the disk of {size} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Size of the virtual disk.
        size: u64,
    },
    /// The image names another file, and the caller did not allow that it be followed.
    #[error("the image names the {kind} {name:?}, and following it was not allowed")]
    NotAllowed {
        /// "backing file" or "data file".
        kind: &'static str,
        /// The name as the image has it.
        name: String,
    },
    /// The image's backing or data file could not be used.
    #[error("using the {kind} {name:?}")]
    Chain {
        /// "backing file" or "data file".
        kind: &'static str,
        /// The name as the image has it.
        name: String,
        /// What went wrong there.
        #[source]
        source: Box<Error>,
    },
    /// A table or counter of the format is full.
    #[error("the format's limit is reached: {0}")]
    Limit(String),
    /// No snapshot, or no bitmap, of that name.
    #[error("there is no {kind} {name:?}")]
    NotFound {
        /// "snapshot" or "bitmap".
        kind: &'static str,
        /// What was asked for.
        name: String,
    },
    /// The caller asked for something that makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    pub(crate) fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Error::Malformed {
            what,
            why: why.into(),
        }
    }

    pub(crate) fn io(
        action: &'static str,
        file: &'static str,
        offset: u64,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Error::Io {
            action,
            file,
            offset,
            source,
        }
    }
}
