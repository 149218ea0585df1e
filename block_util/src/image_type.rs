//! What an image file is, by its magic: qcow2 (its header), VHD ("conectix" in the footer at the end, and at the start of
//! one that grows), VHDX ("vhdxfile" at the start). Anything else is raw.
//!
//! A guest writes a raw disk from the first byte to the last, so what is found there may be the guest's doing: a qcow2
//! header would have the next start follow a backing file of the guest's choice. So a raw image whose type was found and
//! not told is opened with [`crate::RawOptions::protect_format`].

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use thiserror::Error;

use crate::disk::{DiskError, DiskFile};
use crate::raw::{RawDisk, RawOptions};

/// Bytes at the start, and at the end, that a magic may be in.
pub(crate) const SECTOR: u64 = 512;

/// The format of an image.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ImageType {
    /// The disk's bytes and no more.
    Raw,
    /// QEMU's copy-on-write format, all versions.
    Qcow2,
    /// Virtual PC's, fixed or growing.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

impl ImageType {
    pub(crate) const QCOW: &[u8] = b"QFI\xfb";
    pub(crate) const VHD: &[u8] = b"conectix";
    pub(crate) const VHDX: &[u8] = b"vhdxfile";

    /// The format of the image at `path`, a file or a block device.
    ///
    /// # Errors
    ///
    /// [`DiskError::Open`], [`DiskError::NotADisk`], [`DiskError::Inspect`].
    pub fn of_path(path: &Path) -> Result<ImageType, DiskError> {
        let options = RawOptions {
            read_only: true,
            ..RawOptions::default()
        };
        let disk = RawDisk::open(path, &options)?;
        ImageType::probe(disk.file(), disk.size()).map_err(|source| DiskError::Inspect {
            path: path.to_owned(),
            what: "format",
            source,
        })
    }

    /// Looks at the first and the last sector. `size` is the file's length, or the block device's, in bytes.
    ///
    /// ```
    /// use block_util::ImageType;
    ///
    /// # fn main() -> std::io::Result<()> {
    /// let file = tempfile::tempfile()?;
    /// file.set_len(1 << 20)?;
    /// assert_eq!(ImageType::probe(&file, 1 << 20)?, ImageType::Raw);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// When the file cannot be read. Open it without `O_DIRECT`.
    pub fn probe(file: &File, size: u64) -> io::Result<ImageType> {
        let mut magic = [0; 8];
        let have = size.min(8) as usize;
        file.read_exact_at(&mut magic[..have], 0)?;
        if let Some(found) = ImageType::of_first_sector(&magic) {
            return Ok(found);
        }
        if let Some(footer) = size.checked_sub(SECTOR) {
            file.read_exact_at(&mut magic, footer)?;
            if ImageType::is_footer(&magic) {
                return Ok(ImageType::Vhd);
            }
        }
        Ok(ImageType::Raw)
    }

    /// The format whose image would start with these bytes; `None` for a raw one.
    pub fn of_first_sector(bytes: &[u8]) -> Option<ImageType> {
        if bytes.starts_with(Self::QCOW) {
            Some(ImageType::Qcow2)
        } else if bytes.starts_with(Self::VHDX) {
            Some(ImageType::Vhdx)
        } else if bytes.starts_with(Self::VHD) {
            Some(ImageType::Vhd)
        } else {
            None
        }
    }

    /// Whether the image's last sector, if it starts with these bytes, is a VHD footer.
    pub fn is_footer(bytes: &[u8]) -> bool {
        bytes.starts_with(Self::VHD)
    }
}

impl fmt::Display for ImageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageType::Raw => "raw",
            ImageType::Qcow2 => "qcow2",
            ImageType::Vhd => "vhd",
            ImageType::Vhdx => "vhdx",
        })
    }
}

/// A word that names no format.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{0:?} is no image type: it is raw, qcow2, vhd or vhdx")]
pub struct UnknownImageType(String);

impl FromStr for ImageType {
    type Err = UnknownImageType;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word.to_ascii_lowercase().as_str() {
            "raw" => Ok(ImageType::Raw),
            "qcow2" => Ok(ImageType::Qcow2),
            // The fixed kind has a spelling of its own in later releases.
            "vhd" | "fixedvhd" => Ok(ImageType::Vhd),
            "vhdx" => Ok(ImageType::Vhdx),
            _ => Err(UnknownImageType(word.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(start: &[u8], end: &[u8], size: u64) -> ImageType {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(start, 0).unwrap();
        if let Some(footer) = size.checked_sub(512) {
            file.write_all_at(end, footer).unwrap();
        }
        let size = file.metadata().unwrap().len();
        ImageType::probe(&file, size).unwrap()
    }

    #[test]
    fn every_format_is_found_by_its_magic() {
        assert_eq!(probe(b"", b"", 1 << 20), ImageType::Raw);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03", b"", 1 << 20), ImageType::Qcow2);
        assert_eq!(probe(b"vhdxfile", b"", 1 << 20), ImageType::Vhdx);
        assert_eq!(probe(b"conectix", b"conectix", 1 << 20), ImageType::Vhd);
        assert_eq!(probe(b"", b"conectix", 1 << 20), ImageType::Vhd);
        assert_eq!(probe(b"QFI", b"conecti", 1 << 20), ImageType::Raw);
    }

    #[test]
    fn short_files_are_raw() {
        assert_eq!(probe(b"", b"", 0), ImageType::Raw);
        assert_eq!(probe(b"QF", b"", 2), ImageType::Raw);
        assert_eq!(probe(b"QFI\xfb", b"", 4), ImageType::Qcow2);
        assert_eq!(probe(b"\0conectix", b"", 511), ImageType::Raw);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in [
            ImageType::Raw,
            ImageType::Qcow2,
            ImageType::Vhd,
            ImageType::Vhdx,
        ] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert_eq!("FixedVhd".parse(), Ok(ImageType::Vhd));
        let error = "vmdk".parse::<ImageType>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"vmdk\" is no image type: it is raw, qcow2, vhd or vhdx"
        );
    }
}
