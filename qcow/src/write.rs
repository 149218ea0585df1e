//! Writing: planned under the lock, done without it, linked under it again.
//!
//! ```text
//! plan ──▶ in place ────────────────▶ done
//!   │
//!   ├────▶ new cluster ─▶ data ─▶ link (L2 entry) ─▶ done
//!   └────▶ wait, where another operation is between plan and link on the same guest cluster
//! ```
//!
//! A cluster is written in place only if its L2 entry, its L2 table and its refcount all say that nothing else has it.

use std::sync::MutexGuard;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{Descriptor, L2Entry, Unit, unit_mask};
use crate::meta::Meta;
use crate::read::{Segment, Source};

/// Longest run of bytes that gets new clusters in one step, if clusters are smaller.
const MAX_RUN: u64 = 2 << 20;

/// What to do for the first bytes of a write.
#[derive(Debug)]
enum Plan {
    Wait,
    InPlace { host: u64, length: u64 },
    Fill(Fill),
}

/// Guest clusters that get data where their entries do not point yet.
#[derive(Debug)]
struct Fill {
    /// First guest cluster, as a byte offset.
    first: u64,
    clusters: u64,
    /// Host offset of the first cluster; the others follow.
    host: u64,
    /// Whether the host clusters were allocated for this, rather than being there without data.
    allocated: bool,
    /// Guest bytes that are written, with the old content around those of the caller.
    written: (u64, u64),
    /// Guest bytes of the caller.
    wanted: (u64, u64),
    /// Where the old content around them comes from.
    head: Vec<Segment>,
    tail: Vec<Segment>,
    /// Host clusters read as zeros, so zeros around need not be written.
    fresh: bool,
}

/// Whether every unit of the range within one cluster holds data.
pub(crate) fn all_data(meta: &Meta, entry: &L2Entry, from: u64, to: u64) -> bool {
    let unit = meta.layout.unit_size();
    (from / unit..to.div_ceil(unit)).all(|u| entry.unit(&meta.layout, u) == Unit::Data)
}

impl Meta {
    fn plan(&mut self, offset: u64, length: u64) -> Result<Plan> {
        let layout = self.layout;
        let size = layout.cluster_size();
        // One L2 table at a time.
        let end = (offset + length).min((layout.l1_index(offset) + 1) * layout.l2_span());
        let first = layout.cluster_start(offset);
        if self.busy.contains(&first) {
            return Ok(Plan::Wait);
        }
        let entry = self.entry(offset)?;
        let descriptor = entry.descriptor(&layout)?;
        if let Descriptor::Standard {
            host: Some(host),
            copied: true,
        } = descriptor
        {
            if !layout.external_data && self.is_metadata(host) {
                return Err(self.corrupt(format!(
                    "the L2 entry for guest byte {first:#x} points to metadata at {host:#x}"
                )));
            }
            let in_first = end.min(first + size) - first;
            if all_data(self, &entry, offset - first, in_first) {
                let length = self.extend_in_place(first, host, offset, end)?;
                return Ok(Plan::InPlace {
                    host: host + (offset - first),
                    length,
                });
            }
            // There is a host cluster, but not all of the units to be written hold data.
            self.own_l2(first)?;
            return self
                .fill(offset, first + in_first, 1, host, false, false)
                .map(Plan::Fill);
        }
        self.own_l2(first)?;
        let wanted = self.count_unowned(first, end)?;
        let run = if layout.external_data {
            crate::alloc::Run {
                offset: first,
                count: wanted,
                fresh: false,
            }
        } else {
            self.alloc(wanted)?
        };
        let end = end.min(first + run.count * size);
        match self.fill(
            offset,
            end,
            run.count,
            run.offset,
            !layout.external_data,
            run.fresh,
        ) {
            Ok(fill) => Ok(Plan::Fill(fill)),
            Err(e) => {
                if !layout.external_data {
                    self.give_back_run(run.offset, run.count)?;
                }
                Err(e)
            }
        }
    }

    /// Length of the write that goes in place, over clusters that follow each other in the host too.
    fn extend_in_place(&mut self, first: u64, host: u64, offset: u64, end: u64) -> Result<u64> {
        let layout = self.layout;
        let size = layout.cluster_size();
        let mut next = first + size;
        while next < end && !self.busy.contains(&next) {
            let entry = self.entry(next)?;
            let expected = host + (next - first);
            let here = Descriptor::Standard {
                host: Some(expected),
                copied: true,
            };
            if entry.descriptor(&layout)? != here
                || !all_data(self, &entry, 0, size.min(end - next))
                || (!layout.external_data && self.is_metadata(expected))
            {
                break;
            }
            next += size;
        }
        Ok(next.min(end) - offset)
    }

    /// Clusters from `first` on that all need a new host cluster, up to `end` and a bound.
    fn count_unowned(&mut self, first: u64, end: u64) -> Result<u64> {
        let layout = self.layout;
        let size = layout.cluster_size();
        let end = end.min(first + MAX_RUN.max(size));
        let mut next = first + size;
        while next < end && !self.busy.contains(&next) {
            if matches!(
                self.entry(next)?.descriptor(&layout)?,
                Descriptor::Standard {
                    host: Some(_),
                    copied: true
                }
            ) {
                break;
            }
            next += size;
        }
        Ok((next - first) / size)
    }

    /// Whether the cluster's old data has to move to the new host cluster as a whole.
    fn must_move(&mut self, guest: u64) -> Result<bool> {
        let entry = self.entry(guest)?;
        Ok(match entry.descriptor(&self.layout)? {
            Descriptor::Compressed { .. } => true,
            Descriptor::Standard { host: None, .. } => false,
            Descriptor::Standard { copied: true, .. } => false,
            Descriptor::Standard {
                host: Some(_),
                copied: false,
            } => (0..self.layout.units()).any(|u| entry.unit(&self.layout, u) == Unit::Data),
        })
    }

    fn fill(
        &mut self,
        from: u64,
        to: u64,
        clusters: u64,
        host: u64,
        allocated: bool,
        fresh: bool,
    ) -> Result<Fill> {
        let layout = self.layout;
        let (size, unit) = (layout.cluster_size(), layout.unit_size());
        let first = layout.cluster_start(from);
        let last = first + (clusters - 1) * size;
        let start = if self.must_move(first)? {
            first
        } else {
            from / unit * unit
        };
        let end = if self.must_move(last)? {
            last + size
        } else {
            to.div_ceil(unit) * unit
        };
        let head = self.resolve(start, from - start, usize::MAX)?;
        let tail = self.resolve(to, end - to, usize::MAX)?;
        self.busy.extend((0..clusters).map(|i| first + i * size));
        Ok(Fill {
            first,
            clusters,
            host,
            allocated,
            written: (start, end),
            wanted: (from, to),
            head,
            tail,
            fresh,
        })
    }

    /// Points the entries at the data that is now there.
    fn link(&mut self, fill: &Fill) -> Result<()> {
        let layout = self.layout;
        let (size, unit) = (layout.cluster_size(), layout.unit_size());
        for i in 0..fill.clusters {
            let guest = fill.first + i * size;
            let old = self.entry(guest)?;
            let from = fill.written.0.max(guest) - guest;
            let to = fill.written.1.min(guest + size) - guest;
            let mask = unit_mask(from / unit, to / unit);
            let compressed = matches!(old.descriptor(&layout)?, Descriptor::Compressed { .. });
            let before = if compressed { 0 } else { old.bitmap };
            let bitmap = before & !(mask << 32) | mask;
            self.set_entry(guest, L2Entry::owned(&layout, fill.host + i * size, bitmap))?;
            if fill.allocated {
                self.release_entry(old)?;
            }
        }
        Ok(())
    }

    fn unlock_clusters(&mut self, fill: &Fill) {
        for i in 0..fill.clusters {
            self.busy
                .remove(&(fill.first + i * self.layout.cluster_size()));
        }
    }

    /// Gives back clusters that were allocated and never linked.
    pub fn give_back_run(&mut self, offset: u64, count: u64) -> Result<()> {
        for i in 0..count {
            self.give_back((offset >> self.layout.cluster_bits) + i)?;
        }
        Ok(())
    }
}

impl Image {
    /// Writes all of `buf` at byte `offset` of the disk.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::ReadOnly`], [`Error::Io`], and what a corrupt image causes.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.write_unchecked(buf, offset)
    }

    pub(crate) fn write_unchecked(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            done += self.write_some(&buf[done..], offset + done as u64)?;
        }
        Ok(())
    }

    /// Writes several buffers to consecutive bytes of the disk.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write_vectored_at(&self, bufs: &[std::io::IoSlice<'_>], mut offset: u64) -> Result<()> {
        for buf in bufs {
            self.write_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    /// Writes the first bytes of `buf`; how many.
    fn write_some(&self, buf: &[u8], offset: u64) -> Result<usize> {
        self.bring_l2(offset)?;
        let mut meta = self.enter();
        let plan = loop {
            meta.prepare_write()?;
            match meta.plan(offset, buf.len() as u64)? {
                Plan::Wait => meta = self.wait_entered(meta),
                plan => break plan,
            }
        };
        let ticket = meta.begin();
        drop(meta);
        match plan {
            Plan::Fill(fill) => {
                let part = &buf[..(fill.wanted.1 - fill.wanted.0) as usize];
                let written = self.write_fill(&fill, part);
                let mut meta = self.lock();
                let result = match written {
                    Ok(()) => meta.link(&fill),
                    Err(e) if fill.allocated => {
                        meta.give_back_run(fill.host, fill.clusters).and(Err(e))
                    }
                    Err(e) => Err(e),
                };
                meta.unlock_clusters(&fill);
                meta.end(ticket);
                self.wake(meta);
                result.map(|()| part.len())
            }
            Plan::InPlace { host, length } => {
                let part = &buf[..length as usize];
                let result = self.data_storage().write_at(part, host);
                self.leave(ticket);
                result.map_err(Error::io("writing", self.data_file_name(), host))?;
                Ok(part.len())
            }
            Plan::Wait => Ok(0),
        }
    }

    /// Waits for some operation to end, and for those that want to be alone.
    pub(crate) fn wait_entered<'a>(&'a self, meta: MutexGuard<'a, Meta>) -> MutexGuard<'a, Meta> {
        let mut meta = self.wait(meta);
        while meta.exclusive_waiters > 0 {
            meta = self.wait(meta);
        }
        meta
    }

    /// Writes data to where no entry points yet, with old content around it.
    fn write_fill(&self, fill: &Fill, data: &[u8]) -> Result<()> {
        let at = |guest: u64| fill.host + (guest - fill.first);
        let write = |bytes: &[u8], guest: u64| {
            self.data_storage()
                .write_at(bytes, at(guest))
                .map_err(Error::io("writing", self.data_file_name(), at(guest)))
        };
        let needed =
            |around: &[Segment]| !(fill.fresh && around.iter().all(|s| s.source == Source::Zero));
        let head = if needed(&fill.head) {
            (fill.wanted.0 - fill.written.0) as usize
        } else {
            0
        };
        let tail = if needed(&fill.tail) {
            (fill.written.1 - fill.wanted.1) as usize
        } else {
            0
        };
        if head == 0 && tail == 0 {
            return write(data, fill.wanted.0);
        }
        // One write where little is copied, so that a cluster is one request.
        let mut whole = vec![0; head + data.len() + tail];
        if head > 0 {
            self.read_segments(&fill.head, &mut whole[..head])?;
        }
        whole[head..head + data.len()].copy_from_slice(data);
        if tail > 0 {
            self.read_segments(&fill.tail, &mut whole[head + data.len()..])?;
        }
        write(&whole, fill.wanted.0 - head as u64)
    }
}
