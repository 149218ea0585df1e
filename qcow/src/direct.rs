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
//! let hold = image.hold_read(0, 4096, &mut pieces)?.ok_or("not at once")?;
//! let Place::File(at) = pieces[0].place else { panic!("it was just written") };
//! let mut buf = [0; 4096];
//! image.data_file().ok_or("it is a file")?.read_exact_at(&mut buf, at)?; // or io_uring
//! drop(hold);
//! assert_eq!(buf, [7; 4096]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fs::File;
use std::sync::{Arc, MutexGuard};

use crate::error::Result;
use crate::image::Image;
use crate::layout::Descriptor;
use crate::meta::{Meta, read_entry};
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

impl From<Source> for Place {
    fn from(source: Source) -> Self {
        match source {
            Source::Host(at) => Place::File(at),
            Source::Zero => Place::Zero,
            Source::Backing | Source::Compressed { .. } => Place::Elsewhere,
        }
    }
}

/// Neighbouring bytes of the disk in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of bytes.
    pub length: u64,
    /// Where they are.
    pub place: Place,
}

/// Keeps the pieces that it was given with where they are, and those that were found through it later, until it is dropped. Snapshots,
/// resizes, checks and closing wait for that.
///
/// One hold for all requests of a batch costs less than one each.
#[derive(Debug)]
#[must_use = "the pieces may move once it is dropped"]
pub struct Hold {
    image: Arc<Image>,
    ticket: u64,
}

impl Hold {
    /// As [`Image::hold_read`], with the pieces held by this hold too. False where that has none.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    pub fn read(&self, offset: u64, length: u64, pieces: &mut Vec<Piece>) -> Result<bool> {
        // Clusters that are given up from now on wait for a ticket as old as this.
        Ok(self
            .image
            .find(Meta::find_to_read, offset, length, pieces)?
            .is_some())
    }

    /// As [`Image::hold_write`], with the pieces held by this hold too. False where that has none.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write(&self, offset: u64, length: u64, pieces: &mut Vec<Piece>) -> Result<bool> {
        Ok(self
            .image
            .find(Meta::find_to_write, offset, length, pieces)?
            .is_some())
    }
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

    /// What offsets and lengths of I/O on [`Image::data_file`] have to be multiples of: more than 1 with [`OpenOptions::direct`]. Pieces
    /// that are not are for [`Image::read_at`] and [`Image::write_at`].
    ///
    /// [`OpenOptions::direct`]: crate::OpenOptions::direct
    pub fn data_block(&self) -> u64 {
        self.data_storage().block()
    }

    /// Finds where `length` bytes at `offset` are, for reading. `pieces` is emptied and filled, in order.
    ///
    /// Never waits for I/O or for other operations, so that a thread with holds of its own can ask: `None` where that would be
    /// needed, or where there are many pieces. [`Image::read_at`] reads those, on a thread without holds.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    pub fn hold_read(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<Option<Hold>> {
        let found = self.find(Meta::find_to_read, offset, length, pieces)?;
        Ok(found.map(|meta| self.hold(meta)))
    }

    /// Finds where `length` bytes at `offset` are, for writing in place: all pieces are [`Place::File`] then.
    ///
    /// `None` as for [`Image::hold_read`], and where anything else is in the way, such as clusters to allocate;
    /// [`Image::write_at`] deals with that.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn hold_write(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<Option<Hold>> {
        let found = self.find(Meta::find_to_write, offset, length, pieces)?;
        Ok(found.map(|meta| self.hold(meta)))
    }

    /// The lock, if `find` has found all pieces under it.
    fn find(
        &self,
        find: impl FnOnce(&mut Meta, u64, u64, &mut Vec<Piece>) -> Result<bool>,
        offset: u64,
        length: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<Option<MutexGuard<'_, Meta>>> {
        pieces.clear();
        self.check_range(offset, length)?;
        if length > MOST_BYTES {
            return Ok(None);
        }
        let Some(mut meta) = self.try_enter() else {
            return Ok(None);
        };
        if !find(&mut meta, offset, length, pieces)? {
            pieces.clear();
            return Ok(None);
        }
        Ok(Some(meta))
    }

    fn hold(self: &Arc<Self>, mut meta: MutexGuard<'_, Meta>) -> Hold {
        let ticket = meta.begin();
        Hold {
            image: Arc::clone(self),
            ticket,
        }
    }

    /// Whether a flush has nothing to do but to make [`Image::data_file`] durable (`fdatasync`). Where that then fails,
    /// [`Image::flush_failed`] has to be told. Never waits; where it is not so, or not to be known at once, [`Image::flush`] flushes.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn only_data_to_flush(&self) -> Result<bool> {
        let Some(meta) = self.try_enter() else {
            return Ok(false);
        };
        match meta.stop_reason() {
            Some(reason) => Err(reason),
            None => Ok(self.data.is_none() && !(meta.writable && meta.is_dirty())),
        }
    }

    /// What was written since the last flush may be lost: no more is written.
    pub fn flush_failed(&self) {
        self.lock().stop();
    }
}

/// Longest range that is looked up at once, so that the lock is held for short.
const MOST_BYTES: u64 = 4 << 20;
/// Most pieces of a range.
const MOST_PIECES: usize = 64;

impl Meta {
    /// False where there are too many pieces, or an L2 table is not in memory.
    fn find_to_read(&mut self, offset: u64, length: u64, pieces: &mut Vec<Piece>) -> Result<bool> {
        let layout = self.layout;
        let (mut at, end) = (offset, offset + length);
        while at < end {
            if pieces.len() > MOST_PIECES {
                return Ok(false);
            }
            let index = layout.l1_index(at);
            let Some((table, _)) = self.l2_offset(index)? else {
                let next = end.min((index + 1) * layout.l2_span());
                push(pieces, next - at, self.elsewhere().into());
                at = next;
                continue;
            };
            let Some(table) = self.l2.peek(table) else {
                return Ok(false);
            };
            let entry = read_entry(table, &layout, layout.l2_index(at));
            let next = end.min(layout.cluster_start(at) + layout.cluster_size());
            self.each_source(entry, at, next, |length, source| {
                push(pieces, length, source.into());
            })?;
            at = next;
        }
        Ok(true)
    }

    /// False where something has to be done before the range can be written in place.
    fn find_to_write(&mut self, offset: u64, length: u64, pieces: &mut Vec<Piece>) -> Result<bool> {
        if !self.is_prepared()? {
            return Ok(false);
        }
        let layout = self.layout;
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let first = layout.cluster_start(at);
            let to = end.min(first + layout.cluster_size());
            let Some((table, true)) = self.l2_offset(layout.l1_index(at))? else {
                return Ok(false);
            };
            // Looked at against the refcounts, with the data's file being that which they count.
            let verified =
                self.l2.is_verified(table) || (layout.external_data && self.l2.contains(table));
            if !verified || pieces.len() > MOST_PIECES {
                return Ok(false);
            }
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
            push(pieces, to - at, Place::File(host + (at - first)));
            at = to;
        }
        Ok(true)
    }
}

/// Adds a piece, or makes the last one longer.
fn push(pieces: &mut Vec<Piece>, length: u64, place: Place) {
    if let Some(last) = pieces.last_mut() {
        let continues = match (last.place, place) {
            (Place::File(from), Place::File(to)) => from.checked_add(last.length) == Some(to),
            (last, new) => last == new,
        };
        if continues {
            last.length += length;
            return;
        }
    }
    pieces.push(Piece { length, place });
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

    /// Where the first of `pieces` is.
    fn file_offset(pieces: &[Piece]) -> u64 {
        let Place::File(at) = pieces[0].place else {
            panic!("{pieces:?}")
        };
        at
    }

    fn file_byte(image: &Image, at: u64) -> u8 {
        let mut byte = [0];
        let file = image.data_file().unwrap();
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0]
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
        let at = file_offset(&pieces);
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
        let hold = image
            .hold_read(16_000, 10_000, &mut pieces)
            .unwrap()
            .unwrap();
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
        let hold = image.hold_read(0, 512, &mut pieces).unwrap().unwrap();
        let at = file_offset(&pieces);
        image.discard(0, 512).unwrap();
        for i in 1..200 {
            image.write_at(&[2; 512], i * 512).unwrap();
            image.flush().unwrap();
        }
        assert_eq!(file_byte(&image, at), 1);
        drop(hold);
        image.flush().unwrap();
        image.write_at(&[3; 512], 0).unwrap();
        assert_eq!(file_byte(&image, at), 3, "now it is");
        assert_eq!(image.check().unwrap().leaks, 0);
    }

    #[test]
    fn what_is_found_through_a_hold_is_held_like_its_first_pieces() {
        let image = image(512);
        image.write_at(&[1; 2048], 0).unwrap();
        let mut pieces = Vec::new();
        let hold = image.hold_read(0, 512, &mut pieces).unwrap().unwrap();
        // Operations that come and go meanwhile change nothing.
        image.write_at(&[1; 512], 4096).unwrap();
        assert!(hold.read(512, 512, &mut pieces).unwrap());
        assert_eq!(pieces.len(), 1);
        let at = file_offset(&pieces);
        assert!(hold.write(1024, 512, &mut pieces).unwrap());
        assert!(
            !hold.write(100 << 10, 512, &mut pieces).unwrap() && pieces.is_empty(),
            "to be allocated"
        );
        assert!(hold.read(u64::MAX, 2, &mut pieces).is_err());
        image.discard(512, 512).unwrap();
        let reused = |image: &Image, from: u64| {
            for i in 0..200 {
                image.write_at(&[2; 512], (from + i) * 512).unwrap();
                image.flush().unwrap();
            }
            file_byte(image, at) == 2
        };
        assert!(!reused(&image, 200));
        drop(hold);
        image.flush().unwrap();
        assert!(reused(&image, 400), "now it is");
        assert_eq!(image.check().unwrap().leaks, 0);
    }

    #[test]
    fn tables_that_are_not_in_memory_are_no_work_for_a_hold() {
        let storage = Arc::new(FileStorage::new(tempfile::tempfile().unwrap()));
        let options = CreateOptions::new(64 << 20).cluster_size(512);
        let image = Image::create_storage(Box::new(Arc::clone(&storage)), &options).unwrap();
        image.write_at(&[1; 512], 0).unwrap();
        image.close().unwrap();
        let open = crate::OpenOptions::new().write(true);
        let image = Arc::new(Image::open_storage(Box::new(storage), &open).unwrap());
        let mut pieces = Vec::new();
        assert!(image.hold_read(0, 512, &mut pieces).unwrap().is_none());
        image.read_at(&mut [0; 512], 0).unwrap();
        assert!(image.hold_read(0, 512, &mut pieces).unwrap().is_some());
        assert!(
            image.hold_write(0, 512, &mut pieces).unwrap().is_none(),
            "its flags were not looked at"
        );
        image.write_at(&[1; 512], 0).unwrap();
        assert!(image.hold_write(0, 512, &mut pieces).unwrap().is_some());
        let far = MOST_BYTES + 512;
        assert!(image.hold_read(0, far, &mut pieces).unwrap().is_none());
    }

    #[test]
    fn who_waits_to_be_alone_gets_no_more_holds_in_the_way() {
        let image = image(4096);
        image.write_at(&[1; 8192], 0).unwrap();
        let mut pieces = Vec::new();
        let hold = image.hold_read(0, 512, &mut pieces).unwrap().unwrap();
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| image.create_snapshot("s"));
            while let Some(another) = image.hold_read(0, 512, &mut pieces).unwrap() {
                drop(another);
                std::thread::yield_now();
            }
            drop(hold);
            taken.join().unwrap().unwrap();
        });
        assert_eq!(image.snapshots().len(), 1);
    }

    #[test]
    fn a_flush_is_of_data_alone_where_no_table_changed() {
        let image = image(4096);
        image.write_at(&[1; 8192], 0).unwrap();
        assert!(!image.only_data_to_flush().unwrap());
        image.flush().unwrap();
        assert!(image.only_data_to_flush().unwrap());
        image.write_at(&[2; 8192], 0).unwrap();
        assert!(image.only_data_to_flush().unwrap(), "written in place");
        image.flush_failed();
        assert!(image.only_data_to_flush().is_err() && image.write_at(&[0], 0).is_err());
    }
}
