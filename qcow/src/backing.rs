//! Other files that an image names: the backing file, and where relative names are taken from.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::header::{Header, is_qcow2};
use crate::image::Image;
use crate::options::OpenOptions;
use crate::storage::{FileStorage, Storage};
use crate::unpacked::Unpacked;

/// Longest chain of backing files.
const MAX_CHAIN: usize = 64;

/// What the images of a chain have in common.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// Files already in it, by device and inode, so that a chain that bites its tail is an error and no loop.
    files: Vec<(u64, u64)>,
    unpacked: Unpacked,
}

impl Chain {
    pub fn new(options: &OpenOptions) -> Self {
        Chain {
            files: Vec::new(),
            unpacked: Unpacked::new(options.unpacked_cache),
        }
    }

    /// For the image that comes last so far.
    pub fn unpacked(&self) -> Unpacked {
        self.unpacked.of_image(self.files.len())
    }
}

/// What lies below an image.
#[derive(Debug)]
pub(crate) enum Backing {
    Raw { storage: FileStorage, length: u64 },
    Qcow2(Box<Image>),
}

impl Backing {
    /// Opens the backing file that `header` names, if it names one and the options allow it.
    pub fn open(
        header: &Header,
        options: &OpenOptions,
        dir: Option<&Path>,
        chain: &Chain,
    ) -> Result<Option<Backing>> {
        let Some(name) = &header.backing_name else {
            return Ok(None);
        };
        if options.ignore_backing {
            return Ok(None);
        }
        let shown = String::from_utf8_lossy(name).into_owned();
        if !options.follow_backing {
            return Err(Error::NotAllowed {
                kind: "backing file",
                name: shown,
            });
        }
        open_named(name, header.backing_format.as_deref(), options, dir, chain)
            .map(Some)
            .map_err(|e| Error::Chain {
                kind: "backing file",
                name: shown,
                source: Box::new(e),
            })
    }

    /// Bytes that it covers; beyond them it reads as zeros.
    pub fn len(&self) -> u64 {
        match self {
            Backing::Raw { length, .. } => *length,
            Backing::Qcow2(image) => image.len(),
        }
    }

    /// Fills `buf`, with zeros past its end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let n = self.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, outside) = buf.split_at_mut(n);
        outside.fill(0);
        match self {
            _ if n == 0 => Ok(()),
            Backing::Raw { storage, .. } => storage.read_at(inside, offset).map_err(Error::io(
                "reading",
                "backing file",
                offset,
            )),
            Backing::Qcow2(image) => image.read_at(inside, offset),
        }
    }
}

fn open_named(
    name: &[u8],
    format: Option<&str>,
    options: &OpenOptions,
    dir: Option<&Path>,
    chain: &Chain,
) -> Result<Backing> {
    let path = resolve(name, dir)?;
    let storage = FileStorage::open(&path, false, options)?;
    let mut chain = chain.clone();
    enter(&mut chain, storage.file(), &path)?;
    let format = match format {
        Some(format) => format.to_owned(),
        None => {
            let mut magic = [0; 4];
            storage
                .read_at(&mut magic, 0)
                .map_err(Error::io("reading", "backing file", 0))?;
            match (is_qcow2(&magic), options.probe_backing) {
                (false, _) => "raw".to_owned(),
                (true, true) => "qcow2".to_owned(),
                (true, false) => {
                    return Err(Error::Unsupported(
                        "the image does not say which format its backing file has, and it looks like qcow2".into(),
                    ));
                }
            }
        }
    };
    match format.as_str() {
        "raw" => {
            let length = storage
                .len()
                .map_err(Error::io("measuring", "backing file", 0))?;
            Ok(Backing::Raw { storage, length })
        }
        "qcow2" => {
            let options = OpenOptions {
                snapshot: None,
                ..options.clone().write(false)
            };
            let dir = path.parent().map(Path::to_owned);
            Ok(Backing::Qcow2(Box::new(Image::open_chain(
                Box::new(storage),
                &options,
                dir.as_deref(),
                &chain,
            )?)))
        }
        other => Err(Error::Unsupported(format!("backing format {other:?}"))),
    }
}

/// Notes that `file` is part of the chain.
pub(crate) fn enter(chain: &mut Chain, file: &File, path: &Path) -> Result<()> {
    let metadata = file.metadata().map_err(|source| Error::Open {
        path: path.to_owned(),
        source,
    })?;
    let id = (metadata.dev(), metadata.ino());
    if chain.files.contains(&id) {
        return Err(Error::Invalid(format!(
            "{} is in its own chain of backing files",
            path.display()
        )));
    }
    if chain.files.len() >= MAX_CHAIN {
        return Err(Error::Limit(format!(
            "a chain of {MAX_CHAIN} backing files"
        )));
    }
    chain.files.push(id);
    Ok(())
}

/// The path for a name in an image: relative ones count from the image's own directory.
pub(crate) fn resolve(name: &[u8], dir: Option<&Path>) -> Result<PathBuf> {
    let name = name.strip_prefix(b"file:").unwrap_or(name);
    let before_slash = name.split(|b| *b == b'/').next().unwrap_or_default();
    if before_slash.contains(&b':') || name.contains(&0) || name.is_empty() {
        return Err(Error::Unsupported(format!(
            "{:?} is not the name of a file",
            String::from_utf8_lossy(name)
        )));
    }
    let path = Path::new(OsStr::from_bytes(name));
    match dir {
        _ if path.is_absolute() => Ok(path.to_owned()),
        Some(dir) => Ok(dir.join(path)),
        None => Err(Error::Invalid(format!(
            "{} is relative, and the image's directory is not known",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let dir = Some(Path::new("/images"));
        assert_eq!(
            resolve(b"base.img", dir).unwrap(),
            Path::new("/images/base.img")
        );
        assert_eq!(
            resolve(b"file:base.img", dir).unwrap(),
            Path::new("/images/base.img")
        );
        assert_eq!(resolve(b"/a/b:c", dir).unwrap(), Path::new("/a/b:c"));
        assert_eq!(resolve(b"./a:b", dir).unwrap(), Path::new("/images/./a:b"));
        for bad in [&b"nbd://host/x"[..], b"json:{}", b"", b"a\0b"] {
            assert!(resolve(bad, dir).is_err());
        }
        assert!(resolve(b"base.img", None).is_err());
    }
}
