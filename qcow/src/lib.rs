//! The qcow2 disk image format as a library, after QEMU's `docs/interop/qcow2.txt`.
//!
//! | where | what |
//! |---|---|
//! | [`Image`] | an open image. Data: `read_at`, `write_at`, `write_compressed_at`, `write_zeroes`, `discard`, `flush`. Structure: `create_snapshot`, `apply_snapshot`, `delete_snapshot`, `resize`, `map`, `info`, `check` |
//! | [`OpenOptions`], [`CreateOptions`] | how; no other file is opened unless they say so. [`OpenOptions::direct`] is past the page cache |
//! | [`check()`], [`Repair`] | an image from outside, corrupt ones too |
//! | [`Convert`], [`commit`] | whole disks from file to file |
//! | [`Hold`] | for who moves data with its own asynchronous I/O |
//! | [`Storage`] | where the bytes live: [`FileStorage`], [`MemStorage`], or your own |
//! | [`Header`] | the header alone, for who wants to look first |
//!
//! Any number of threads may use one [`Image`]. The lock in it covers metadata; data is read and written without it.
//!
//! Images are hostile input: a malformed one is an [`Error`], never a panic or an endless loop. A kill at any moment leaves at worst
//! leaked clusters, because metadata reaches the disk in order (`writeback.rs`).
//!
//! ```
//! use qcow::{CreateOptions, Image, OpenOptions};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("disk.qcow2");
//! let image = Image::create(&path, &CreateOptions::new(1 << 30))?;
//! image.write_at(b"hello", 123_456)?;
//! image.close()?;
//!
//! let image = Image::open(&path, &OpenOptions::new())?;
//! let mut buf = [0; 7];
//! image.read_at(&mut buf, 123_455)?;
//! assert_eq!(&buf, b"\0hello\0");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// The format, bits and bytes.
mod compress;
mod header;
mod layout;
mod refcount;
mod snapshot_table;

// What is in memory, and how it reaches the disk.
mod alloc;
mod cache;
mod meta;
mod refmap;
mod switch;
mod tickets;
mod unpacked;
mod walk;
mod writeback;

// What a user does.
mod backing;
mod bitmap;
mod check;
mod convert;
mod create;
mod direct;
mod error;
mod image;
mod map;
mod odirect;
mod options;
mod read;
mod resize;
mod snapshot;
mod storage;
mod write;
mod write_compressed;
mod zero;

pub use bitmap::Bitmap;
pub use check::{CheckReport, Repair, check, check_storage};
pub use convert::{Convert, Format, Progress, commit};
pub use direct::{Hold, Piece, Place};
pub use error::{Error, Result};
pub use header::{BitmapExtension, Compression, Header, MAGIC, is_qcow2};
pub use image::Image;
pub use map::{Extent, ExtentKind, ImageInfo, info};
pub use options::{CreateOptions, OpenOptions};
pub use resize::Shrink;
pub use snapshot_table::Snapshot;
pub use storage::{FileStorage, MemStorage, Storage};
