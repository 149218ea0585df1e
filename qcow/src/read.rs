//! Reading: guest ranges become segments under the lock, and are read without it.

use crate::compress;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{Descriptor, L2Entry, Unit};
use crate::meta::Meta;

/// Where the bytes of a guest range come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Zero,
    /// Not in this image.
    Backing,
    /// At this byte of the file with guest data.
    Host(u64),
    /// Compressed, of which the first `skip` bytes are not wanted.
    Compressed {
        offset: u64,
        length: u64,
        skip: u64,
    },
}

/// Guest bytes that come from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub guest: u64,
    pub length: u64,
    pub source: Source,
}

impl Meta {
    /// Finds where `length` guest bytes at `offset` come from, up to `most` segments; neighbours are merged.
    pub fn resolve(&mut self, offset: u64, length: u64, most: usize) -> Result<Vec<Segment>> {
        let layout = self.layout;
        let mut out = Vec::new();
        let (mut at, end) = (offset, offset + length);
        while at < end && out.len() < most {
            if self.l2_offset(layout.l1_index(at))?.is_none() {
                let next = ((at / layout.l2_span() + 1) * layout.l2_span()).min(end);
                push(&mut out, at, next - at, self.elsewhere());
                at = next;
                continue;
            }
            let entry = self.entry_to_read(at)?;
            let cluster_end = (layout.cluster_start(at) + layout.cluster_size()).min(end);
            self.each_source(entry, at, cluster_end, |length, source| {
                push(&mut out, at, length, source);
                at += length;
            })?;
        }
        Ok(out)
    }

    /// Where bytes come from that have no entry, or whose entry names no place.
    pub fn elsewhere(&self) -> Source {
        if self.backed {
            Source::Backing
        } else {
            Source::Zero
        }
    }

    /// Calls `each` with the lengths and sources of the guest bytes from `at` to `end`, which are of one cluster, whose entry is `entry`.
    pub fn each_source(
        &self,
        entry: L2Entry,
        mut at: u64,
        end: u64,
        mut each: impl FnMut(u64, Source),
    ) -> Result<()> {
        let layout = &self.layout;
        match entry.descriptor(layout)? {
            Descriptor::Compressed { offset, length } => {
                let skip = layout.in_cluster(at);
                each(
                    end - at,
                    Source::Compressed {
                        offset,
                        length,
                        skip,
                    },
                );
            }
            Descriptor::Standard { host, .. } => {
                while at < end {
                    let next = layout.unit_end(at).min(end);
                    let source = match (entry.unit(layout, layout.unit_index(at)), host) {
                        (Unit::Data, Some(host)) => Source::Host(host + layout.in_cluster(at)),
                        (Unit::Zero, _) => Source::Zero,
                        _ => self.elsewhere(),
                    };
                    each(next - at, source);
                    at = next;
                }
            }
        }
        Ok(())
    }
}

/// Adds a segment, or makes the last one longer.
fn push(out: &mut Vec<Segment>, guest: u64, length: u64, source: Source) {
    if let Some(last) = out.last_mut() {
        let continues = match (last.source, source) {
            (Source::Zero, Source::Zero) | (Source::Backing, Source::Backing) => true,
            (Source::Host(a), Source::Host(b)) => a + last.length == b,
            _ => false,
        };
        if continues && last.guest + last.length == guest {
            last.length += length;
            return;
        }
    }
    out.push(Segment {
        guest,
        length,
        source,
    });
}

/// Segments that are looked up at once.
const BATCH: usize = 64;

impl Image {
    /// Fills `buf` from byte `offset` of the disk on.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Io`], [`Error::Malformed`] for tables that break the format's rules.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            self.bring_l2(at)?;
            let (ticket, segments) = {
                let mut meta = self.enter();
                let segments = meta.resolve(at, (buf.len() - done) as u64, BATCH)?;
                (meta.begin(), segments)
            };
            let length: u64 = segments.iter().map(|s| s.length).sum();
            let part = &mut buf[done..done + length as usize];
            let result = self.read_segments(&segments, part);
            self.leave(ticket);
            result?;
            done += length as usize;
        }
        Ok(())
    }

    /// Reads the L2 table for `guest` if it is not in memory, without the lock. Where that does not work out, whoever needs the
    /// table reads it.
    pub(crate) fn bring_l2(&self, guest: u64) -> Result<()> {
        let (ticket, offset, arrivals) = {
            let mut meta = self.enter();
            match meta.l2_offset(self.layout.l1_index(guest))? {
                Some((offset, _)) if !meta.l2.contains(offset) => {
                    (meta.begin(), offset, meta.l2.arrivals())
                }
                _ => return Ok(()),
            }
        };
        let mut bytes = vec![0; self.layout.cluster_size() as usize];
        let read = self.storage.read_at(&mut bytes, offset);
        {
            let mut meta = self.lock();
            // A table changes only while it is in the cache, and this one has not been there.
            if read.is_ok() && meta.l2.arrivals() == arrivals {
                meta.l2.put(offset, bytes);
            }
        }
        self.leave(ticket);
        Ok(())
    }

    /// Fills several buffers from consecutive bytes of the disk.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    pub fn read_vectored_at(
        &self,
        bufs: &mut [std::io::IoSliceMut<'_>],
        mut offset: u64,
    ) -> Result<()> {
        for buf in bufs {
            self.read_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    /// Reads what segments of consecutive guest bytes describe. The caller holds a ticket.
    pub(crate) fn read_segments(&self, segments: &[Segment], mut buf: &mut [u8]) -> Result<()> {
        for s in segments {
            let (part, rest) = buf.split_at_mut(s.length as usize);
            buf = rest;
            match s.source {
                Source::Zero => part.fill(0),
                Source::Backing => match &self.backing {
                    Some(backing) => backing.read_at(part, s.guest)?,
                    None => part.fill(0),
                },
                Source::Host(at) => {
                    self.data_storage().read_at(part, at).map_err(Error::io(
                        "reading",
                        self.data_file_name(),
                        at,
                    ))?;
                }
                Source::Compressed {
                    offset,
                    length,
                    skip,
                } => {
                    let size = self.layout.cluster_size() as usize;
                    let place = (offset, length);
                    self.unpacked
                        .read(place, size, skip as usize, part, |cluster| {
                            self.unpack(offset, length, cluster)
                        })?;
                }
            }
        }
        Ok(())
    }

    /// Fills a whole cluster, out of its compressed form.
    fn unpack(&self, offset: u64, length: u64, cluster: &mut [u8]) -> Result<()> {
        let mut packed = vec![0; length as usize];
        self.storage
            .read_at(&mut packed, offset)
            .map_err(Error::io("reading", "image file", offset))?;
        compress::unpack(self.compression, &packed, cluster)
            .map_err(|why| Error::malformed("compressed cluster", format!("at {offset:#x}: {why}")))
    }
}
