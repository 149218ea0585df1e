//! For who moves the data itself, asynchronously: where bytes of the disk are in the file, and a hold that keeps them there.
//!
//! ```
//! use std::os::unix::fs::FileExt;
//! use std::sync::Arc;
//! use qcow::{CreateOptions, Image, Place};
//!
//! let dir = tempfile::tempdir()?;
//! let image = Arc::new(Image::create(dir.path().join("disk"), &CreateOptions::new(1 << 20))?);
//! image.write_at(&[7; 4096], 0)?;
//! let mut pieces = Vec::new();
//! let hold = image.hold_read(0, 4096, &mut pieces)?;
//! let Place::File(at) = pieces[0].place else { panic!("it was just written") };
//! let mut buf = [0; 4096];
//! image.data_file().ok_or("it is a file")?.read_exact_at(&mut buf, at)?; // or io_uring
//! drop(hold);
//! assert_eq!(buf, [7; 4096]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fs::File;
use std::sync::Arc;

use crate::error::Result;
use crate::image::Image;
use crate::layout::Descriptor;
use crate::meta::Meta;
use crate::read::Source;
use crate::write::all_data;

/// Where a piece of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At this byte of [`Image::data_file`].
    File(u64),
    /// It reads as zeros.
    Zero,
    /// Compressed, or in a backing file: [`Image::read_at`] reads it.
    Elsewhere,
}

/// Neighbouring bytes of the disk in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of bytes.
    pub length: u64,
    /// Where they are.
    pub place: Place,
}

/// Keeps the pieces that it was given with where they are, until it is dropped. Snapshots, resizes, checks and closing wait for that.
#[derive(Debug)]
#[must_use = "the pieces may move once it is dropped"]
pub struct Hold {
    image: Arc<Image>,
    ticket: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.image.leave(self.ticket);
    }
}

impl Image {
    /// The file with the guest's data, if it is one.
    pub fn data_file(&self) -> Option<&File> {
        self.data_storage().as_file()
    }

    /// Finds where `length` bytes at `offset` are, for reading. `pieces` is emptied and filled, in order.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    pub fn hold_read(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<Hold> {
        pieces.clear();
        self.check_range(offset, length)?;
        let mut meta = self.enter();
        for s in meta.resolve(offset, length, usize::MAX)? {
            let place = match s.source {
                Source::Host(at) => Place::File(at),
                Source::Zero => Place::Zero,
                Source::Backing | Source::Compressed { .. } => Place::Elsewhere,
            };
            pieces.push(Piece {
                length: s.length,
                place,
            });
        }
        let ticket = meta.begin();
        Ok(Hold {
            image: Arc::clone(self),
            ticket,
        })
    }

    /// Finds where `length` bytes at `offset` are, for writing in place: all pieces are [`Place::File`] then. `None` where
    /// anything is in the way, such as clusters to allocate; [`Image::write_at`] deals with that.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn hold_write(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<Option<Hold>> {
        pieces.clear();
        self.check_range(offset, length)?;
        let mut meta = self.enter();
        meta.prepare_write()?;
        if !meta.places_to_write(offset, length, pieces)? {
            pieces.clear();
            return Ok(None);
        }
        let ticket = meta.begin();
        Ok(Some(Hold {
            image: Arc::clone(self),
            ticket,
        }))
    }
}

impl Meta {
    fn places_to_write(
        &mut self,
        offset: u64,
        length: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<bool> {
        let layout = self.layout;
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let first = layout.cluster_start(at);
            let to = end.min(first + layout.cluster_size());
            let entry = self.entry(at)?;
            let Descriptor::Standard {
                host: Some(host),
                copied: true,
            } = entry.descriptor(&layout)?
            else {
                return Ok(false);
            };
            if self.busy.contains(&first) || !all_data(self, &entry, at - first, to - first) {
                return Ok(false);
            }
            if !layout.external_data && self.is_metadata(host) {
                return Err(self.corrupt(format!(
                    "the L2 entry for guest byte {first:#x} points to metadata at {host:#x}"
                )));
            }
            let place = host + (at - first);
            match pieces.last_mut() {
                Some(Piece {
                    length,
                    place: Place::File(from),
                }) if *from + *length == place => *length += to - at,
                _ => pieces.push(Piece {
                    length: to - at,
                    place: Place::File(place),
                }),
            }
            at = to;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CreateOptions, FileStorage};
    use std::os::unix::fs::FileExt;

    fn image(cluster: u64) -> Arc<Image> {
        let storage = FileStorage::new(tempfile::tempfile().unwrap());
        let options = CreateOptions::new(1 << 20).cluster_size(cluster);
        Arc::new(Image::create_storage(Box::new(storage), &options).unwrap())
    }

    #[test]
    fn what_is_written_through_a_hold_is_read_back() {
        let image = image(4096);
        let mut pieces = Vec::new();
        assert!(
            image.hold_write(0, 4096, &mut pieces).unwrap().is_none(),
            "nothing is allocated yet"
        );
        image.write_at(&[1; 20_000], 0).unwrap();
        let hold = image
            .hold_write(1000, 15_000, &mut pieces)
            .unwrap()
            .unwrap();
        assert_eq!(pieces.len(), 1, "clusters follow each other");
        let Place::File(at) = pieces[0].place else {
            panic!("{pieces:?}")
        };
        image
            .data_file()
            .unwrap()
            .write_all_at(&[2; 15_000], at)
            .unwrap();
        drop(hold);
        let mut buf = [0; 20_000];
        image.read_at(&mut buf, 0).unwrap();
        assert!(
            buf[..1000].iter().all(|b| *b == 1)
                && buf[1000..16_000].iter().all(|b| *b == 2)
                && buf[16_000] == 1
        );
        let hold = image.hold_read(16_000, 10_000, &mut pieces).unwrap();
        assert_eq!(
            pieces[1],
            Piece {
                length: 26_000 - 20_480,
                place: Place::Zero
            }
        );
        drop(hold);
        image.create_snapshot("s").unwrap();
        assert!(
            image.hold_write(0, 512, &mut pieces).unwrap().is_none(),
            "the snapshot has it too"
        );
    }

    #[test]
    fn a_held_cluster_is_given_to_nobody_else() {
        let image = image(512);
        image.write_at(&[1; 512], 0).unwrap();
        let mut pieces = Vec::new();
        let hold = image.hold_read(0, 512, &mut pieces).unwrap();
        let Place::File(at) = pieces[0].place else {
            panic!("{pieces:?}")
        };
        image.discard(0, 512).unwrap();
        let file_byte = |at: u64| {
            let mut b = [0];
            image
                .data_file()
                .unwrap()
                .read_exact_at(&mut b, at)
                .unwrap();
            b[0]
        };
        for i in 1..200 {
            image.write_at(&[2; 512], i * 512).unwrap();
            image.flush().unwrap();
        }
        assert_eq!(file_byte(at), 1);
        drop(hold);
        image.flush().unwrap();
        image.write_at(&[3; 512], 0).unwrap();
        assert_eq!(file_byte(at), 3, "now it is");
        assert_eq!(image.check().unwrap().leaks, 0);
    }
}
