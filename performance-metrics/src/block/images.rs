//! The images that disks are made of. Every block of 4 KiB begins with its mark (`order.rs`); of the rest a third is noise.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use qcow::CreateOptions;

use super::{CLUSTER, SPAN};
use crate::order::{BLOCK, mark};

/// A kind of image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Image {
    /// Its bytes are the disk's.
    Raw,
    /// qcow2, all of it allocated.
    Qcow2,
    /// An empty qcow2 over a raw file.
    Backing,
    /// qcow2, all of it in an internal snapshot too.
    Snapshot,
    /// qcow2, all of it compressed with zlib.
    Compressed,
}

impl Image {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::Raw,
        Self::Qcow2,
        Self::Backing,
        Self::Snapshot,
        Self::Compressed,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Backing => "backing",
            Self::Snapshot => "snapshot",
            Self::Compressed => "compressed",
        }
    }

    /// Whether writes change what kind of image it is, so that each measurement needs a fresh one.
    pub fn is_used_up(self) -> bool {
        matches!(self, Self::Backing | Self::Snapshot | Self::Compressed)
    }
}

/// A directory of images; it goes when this does.
pub struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    /// In a new directory in `parent`, else among the temporary files.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(parent: Option<&Path>) -> Result<Self> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let dir = tempfile::Builder::new()
            .prefix("performance-metrics")
            .tempdir_in(&parent)
            .with_context(|| format!("a directory for disk images in {}", parent.display()))?;
        Ok(Self { dir })
    }

    fn path(&self, image: Image, owner: &str) -> PathBuf {
        self.dir.path().join(format!("{owner}-{}", image.name()))
    }

    /// The image of `owner`, made if it isn't there, and made anew if `fresh`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn ready(&self, image: Image, owner: &str, fresh: bool) -> Result<PathBuf> {
        let path = self.path(image, owner);
        if path.exists() && !fresh {
            return Ok(path);
        }
        self.make(image, &path)
            .with_context(|| format!("making a disk image ({})", image.name()))?;
        Ok(path)
    }

    fn make(&self, image: Image, path: &Path) -> Result<()> {
        let _ = fs::remove_file(path);
        match image {
            Image::Backing => {
                let base = self.ready(Image::Raw, "base", false)?;
                qcow::Image::create(path, &options().backing(base, "raw"))?.close()?;
            }
            // All are copies: how a file was written changes what a write of 4 KiB into its page cache costs, by a factor of two.
            Image::Raw | Image::Qcow2 | Image::Snapshot | Image::Compressed => {
                let template = self.path(image, "template");
                if !template.exists() {
                    fill(image, &template)?;
                }
                fs::copy(&template, path)?;
            }
        }
        // What a measurement finds dirty would be written back during it.
        File::open(path)?.sync_all()?;
        Ok(())
    }
}

fn options() -> CreateOptions {
    CreateOptions::new(SPAN).cluster_size(CLUSTER)
}

fn fill(image: Image, path: &Path) -> Result<()> {
    if image == Image::Raw {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        for cluster in 0..SPAN / CLUSTER {
            file.write_all(&content(cluster))?;
        }
        file.into_inner()?;
        return Ok(());
    }
    let disk = qcow::Image::create(path, &options())?;
    for cluster in 0..SPAN / CLUSTER {
        let bytes = content(cluster);
        if image == Image::Compressed {
            disk.write_compressed_at(&bytes, cluster * CLUSTER)?;
        } else {
            disk.write_at(&bytes, cluster * CLUSTER)?;
        }
    }
    if image == Image::Snapshot {
        disk.create_snapshot("before")?;
    }
    disk.close()?;
    Ok(())
}

/// What a cluster holds.
fn content(cluster: u64) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER as usize];
    let mut noise = mark(cluster);
    for (i, block) in bytes.chunks_exact_mut(BLOCK as usize).enumerate() {
        let words = block.len() / 8;
        for (n, word) in block.chunks_exact_mut(8).enumerate() {
            let value = match n {
                0 => mark(cluster * (CLUSTER / BLOCK) + i as u64),
                _ if n < words / 3 => {
                    noise ^= noise << 13;
                    noise ^= noise >> 7;
                    noise ^= noise << 17;
                    noise
                }
                _ => 0x2020_2020_6574_6968,
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow::OpenOptions;

    #[test]
    fn each_kind_holds_the_marks() {
        let images = Images::new(None).unwrap();
        for image in Image::ALL {
            let path = images.ready(image, "test", false).unwrap();
            let block = SPAN / BLOCK - 3;
            let mut first = [0; 8];
            if image == Image::Raw {
                std::os::unix::fs::FileExt::read_exact_at(
                    &File::open(&path).unwrap(),
                    &mut first,
                    block * BLOCK,
                )
                .unwrap();
            } else {
                let options = OpenOptions::new().follow_backing(true);
                let disk = qcow::Image::open(&path, &options).unwrap();
                disk.read_at(&mut first, block * BLOCK).unwrap();
            }
            assert_eq!(u64::from_le_bytes(first), mark(block), "{image:?}");
        }
        let size = |image| fs::metadata(images.path(image, "test")).unwrap().len();
        assert!(size(Image::Qcow2) > SPAN);
        assert!(size(Image::Backing) < SPAN / 10);
        assert!((SPAN / 10..SPAN * 2 / 3).contains(&size(Image::Compressed)));
    }

    #[test]
    fn a_fresh_image_forgets_writes() {
        let images = Images::new(None).unwrap();
        let path = images.ready(Image::Backing, "test", false).unwrap();
        let disk = qcow::Image::open(&path, &OpenOptions::new().write(true).follow_backing(true));
        let disk = disk.unwrap();
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.close().unwrap();
        let written = fs::metadata(&path).unwrap().len();
        images.ready(Image::Backing, "test", false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), written);
        images.ready(Image::Backing, "test", true).unwrap();
        assert!(fs::metadata(&path).unwrap().len() < written);
    }
}
