//! Discarding and writing zeros: mostly a matter of L2 entries.

use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{COPIED, Descriptor, L2Entry, Unit, ZERO, unit_mask};
use crate::meta::Meta;

/// What is to become of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Host clusters are given back; the range reads as zeros.
    Discard,
    /// The range reads as zeros; host clusters are kept for later writes.
    Zero,
}

/// What was done with the beginning of a range.
enum Step {
    /// So many bytes are done.
    Done(u64),
    /// So many bytes have to be written as zeros.
    Write(u64),
    Wait,
}

/// Zeros that are written at a time.
static ZEROS: [u8; 65536] = [0; 65536];

impl Meta {
    /// Handles the beginning of `offset..end`: up to the end of its L2 table.
    fn zero_step(&mut self, offset: u64, end: u64, kind: Kind) -> Result<Step> {
        let layout = self.layout;
        let (size, unit) = (layout.cluster_size(), layout.unit_size());
        let table_end = end.min((layout.l1_index(offset) + 1) * layout.l2_span());
        if self.l2_offset(layout.l1_index(offset))?.is_none() && !self.backed {
            return Ok(Step::Done(table_end - offset));
        }
        let mut at = offset;
        while at < table_end {
            let first = layout.cluster_start(at);
            if self.busy.contains(&first) {
                return Ok(if at > offset {
                    Step::Done(at - offset)
                } else {
                    Step::Wait
                });
            }
            let to = table_end.min(first + size);
            let entry = self.entry(at)?;
            // Parts of units are written; so are clusters that this version cannot mark.
            let (from_unit, to_unit) = ((at - first).div_ceil(unit), (to - first) / unit);
            let whole = from_unit == 0 && to_unit == layout.units();
            let new = if !at.is_multiple_of(unit) {
                None
            } else if whole {
                self.zero_cluster(&entry, kind)?
            } else if layout.extended_l2 && to_unit > from_unit {
                self.zero_units(&entry, from_unit, to_unit, kind)?
            } else {
                None
            };
            let Some(new) = new else {
                if at > offset {
                    return Ok(Step::Done(at - offset));
                }
                if self.reads_zero(&entry, at - first, to - first)? {
                    at = to;
                    continue;
                }
                let stop = if whole {
                    to
                } else {
                    ((at / unit + 1) * unit).min(to)
                };
                return Ok(Step::Write(stop - at));
            };
            if new != entry {
                let host = |e: &L2Entry| crate::meta::referenced(e, &layout);
                let gone = host(&new)? != host(&entry)?;
                // Entries that are shared with a snapshot come with their COPIED flag off; the table is made ours first.
                self.set_entry(at, new)?;
                if gone {
                    self.release_entry(entry)?;
                }
            }
            at = if whole { to } else { first + to_unit * unit };
            if self.l2.dirty() >= self.l2.limit() / 2 || self.pending.len() >= 4096 {
                break;
            }
        }
        Ok(Step::Done(at - offset))
    }

    fn reads_zero(&self, entry: &L2Entry, from: u64, to: u64) -> Result<bool> {
        let unit = self.layout.unit_size();
        if matches!(
            entry.descriptor(&self.layout)?,
            Descriptor::Compressed { .. }
        ) {
            return Ok(false);
        }
        Ok(
            (from / unit..to.div_ceil(unit)).all(|u| match entry.unit(&self.layout, u) {
                Unit::Zero => true,
                Unit::Unallocated => !self.backed,
                Unit::Data => false,
            }),
        )
    }

    /// The entry for a cluster that is zero as a whole; `None` where the format has none.
    fn zero_cluster(&self, entry: &L2Entry, kind: Kind) -> Result<Option<L2Entry>> {
        let layout = &self.layout;
        let descriptor = entry.descriptor(layout)?;
        let empty = if !self.backed {
            Some(L2Entry::default())
        } else if layout.version >= 3 {
            Some(L2Entry::zero(layout))
        } else {
            None
        };
        Ok(match (descriptor, kind) {
            (
                Descriptor::Standard {
                    host: Some(host),
                    copied: true,
                },
                Kind::Zero,
            ) if layout.version >= 3 => Some(if layout.extended_l2 {
                L2Entry {
                    word: host | COPIED,
                    bitmap: !0 << 32,
                }
            } else {
                L2Entry {
                    word: host | COPIED | ZERO,
                    bitmap: 0,
                }
            }),
            // Already zero, and without a host cluster: nothing to change.
            (Descriptor::Standard { host: None, .. }, _)
                if self.reads_zero(entry, 0, layout.cluster_size())? =>
            {
                Some(*entry)
            }
            _ => empty,
        })
    }

    /// The entry with some subclusters zero.
    fn zero_units(
        &self,
        entry: &L2Entry,
        from: u64,
        to: u64,
        kind: Kind,
    ) -> Result<Option<L2Entry>> {
        let Descriptor::Standard { host, .. } = entry.descriptor(&self.layout)? else {
            return Ok(None);
        };
        let mask = unit_mask(from, to);
        let mut new = L2Entry {
            word: entry.word,
            bitmap: entry.bitmap & !mask | mask << 32,
        };
        if new.bitmap as u32 == 0 && host.is_some() && kind == Kind::Discard {
            new.word = 0;
        }
        Ok(Some(new))
    }
}

impl Image {
    /// Says that `length` bytes at `offset` are not needed any more. They read as zeros from now on, and their host clusters are given
    /// back once that is durable.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.zero_range(offset, length, Kind::Discard)
    }

    /// Makes `length` bytes at `offset` read as zeros; host clusters are kept for later writes.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.zero_range(offset, length, Kind::Zero)
    }

    fn zero_range(&self, offset: u64, length: u64, kind: Kind) -> Result<()> {
        self.check_range(offset, length)?;
        let size = self.len();
        // The last cluster may reach past the end of the disk, and belongs to it.
        let disk_end = offset + length;
        let end = if disk_end == size {
            size.next_multiple_of(self.cluster_size())
        } else {
            disk_end
        };
        self.zero_steps(offset, end, disk_end, kind)
    }

    /// Makes bytes read as zeros that may be past the end of the disk, though not of its L1 table.
    pub(crate) fn zero_unchecked(&self, offset: u64, end: u64) -> Result<()> {
        self.zero_steps(offset, end, end, Kind::Zero)
    }

    /// Up to `end` with entries, up to `disk_end` with zeros as data.
    fn zero_steps(&self, offset: u64, end: u64, disk_end: u64, kind: Kind) -> Result<()> {
        let mut at = offset;
        while at < end {
            let step = {
                let mut meta = self.enter();
                meta.prepare_write()?;
                if self.raw_data {
                    Step::Write(disk_end.saturating_sub(at))
                } else {
                    match meta.zero_step(at, end, kind)? {
                        Step::Wait => {
                            drop(self.wait(meta));
                            continue;
                        }
                        step => step,
                    }
                }
            };
            match step {
                Step::Done(n) => at += n,
                Step::Write(n) => {
                    let stop = (at + n).min(disk_end);
                    let mut from = at;
                    while from < stop {
                        let part = (stop - from).min(ZEROS.len() as u64) as usize;
                        self.write_unchecked(&ZEROS[..part], from)?;
                        from += part as u64;
                    }
                    at = if stop == disk_end { end } else { stop };
                }
                Step::Wait => return Err(Error::Corrupt("waiting without a lock".into())),
            }
        }
        Ok(())
    }
}
