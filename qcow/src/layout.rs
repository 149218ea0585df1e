//! Geometry of an image and the bits of its table entries (qcow2 "Cluster mapping", "Extended L2 Entries").

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;

use crate::error::{Error, Result};

/// Something for each of some offsets, found at once: a lookup is part of every request.
pub(crate) type OffsetMap<T> = HashMap<u64, T, RandomState>;
/// Offsets, found at once.
pub(crate) type OffsetSet = HashSet<u64, RandomState>;

/// The host cluster is referenced exactly once, so it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// The descriptor is that of a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// A standard cluster that reads as zeros (version 3, without subclusters).
pub(crate) const ZERO: u64 = 1;
/// Bits 9–55: the host offset in L1 and standard L2 entries.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Offsets in L1 and L2 entries end here: 2^56.
pub(crate) const MAX_OFFSET: u64 = 1 << 56;
/// Subclusters in a cluster of an image with extended L2 entries.
pub(crate) const SUBCLUSTERS: u64 = 32;

/// Numbers that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub extended_l2: bool,
    pub version: u32,
    /// Guest clusters live in another file, at their guest offset.
    pub external_data: bool,
}

/// An L2 entry; the bitmap is zero without extended L2 entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry {
    pub word: u64,
    pub bitmap: u64,
}

/// What an L2 entry says of a whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptor {
    /// Compressed data: any byte offset, whole sectors to the end.
    Compressed { offset: u64, length: u64 },
    /// A standard cluster, with its host cluster if it has one.
    Standard { host: Option<u64>, copied: bool },
}

/// What a unit (subcluster, or cluster without them) reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Unallocated,
    Zero,
    Data,
}

impl Layout {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes that can be allocated on their own.
    pub fn unit_size(&self) -> u64 {
        1 << self.unit_bits()
    }

    fn unit_bits(&self) -> u32 {
        if self.extended_l2 {
            self.cluster_bits - SUBCLUSTERS.ilog2()
        } else {
            self.cluster_bits
        }
    }

    /// Number of the unit of `offset` within its cluster.
    pub fn unit_index(&self, offset: u64) -> u64 {
        self.in_cluster(offset) >> self.unit_bits()
    }

    /// Where the unit of `offset` ends.
    pub fn unit_end(&self, offset: u64) -> u64 {
        ((offset >> self.unit_bits()) + 1) << self.unit_bits()
    }

    pub fn units(&self) -> u64 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    pub fn entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_size().ilog2()
    }

    /// Guest bytes that an L2 table describes.
    pub fn l2_span(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    pub fn l1_index(&self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    pub fn l2_index(&self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    pub fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    pub fn aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    pub fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub fn block_entries(&self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.refcount_bits())
    }

    pub fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Bits of a compressed descriptor that hold the host offset.
    pub fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Most bytes that a compressed descriptor can name.
    pub fn max_compressed(&self) -> u64 {
        512 << (self.cluster_bits - 8)
    }

    /// Entry of compressed data of `length` bytes at `offset`.
    pub fn compressed_entry(&self, offset: u64, length: u64) -> L2Entry {
        let sectors = ((offset + length - 1) >> 9) - (offset >> 9);
        L2Entry {
            word: COMPRESSED | offset | (sectors << self.compressed_offset_bits()),
            bitmap: 0,
        }
    }
}

impl L2Entry {
    /// An entry for a host cluster that only this entry references. Without extended entries `bitmap` is ignored.
    pub fn owned(layout: &Layout, host: u64, bitmap: u64) -> Self {
        L2Entry {
            word: host | COPIED,
            bitmap: if layout.extended_l2 { bitmap } else { 0 },
        }
    }

    /// An entry without host cluster that reads as zeros. Version 2 has none.
    pub fn zero(layout: &Layout) -> Self {
        if layout.extended_l2 {
            L2Entry {
                word: 0,
                bitmap: !0 << 32,
            }
        } else {
            L2Entry {
                word: ZERO,
                bitmap: 0,
            }
        }
    }

    pub fn descriptor(&self, layout: &Layout) -> Result<Descriptor> {
        if self.word & COMPRESSED != 0 {
            if layout.external_data {
                return Err(Error::malformed(
                    "L2 entry",
                    "compressed cluster in an image with a data file",
                ));
            }
            let bits = layout.compressed_offset_bits();
            let descriptor = self.word & (COMPRESSED - 1);
            let offset = descriptor & ((1 << bits) - 1);
            if offset >= MAX_OFFSET {
                return Err(Error::malformed(
                    "L2 entry",
                    format!("compressed data at {offset:#x}"),
                ));
            }
            let length = ((descriptor >> bits) + 1) * 512 - (offset & 511);
            return Ok(Descriptor::Compressed { offset, length });
        }
        let copied = self.word & COPIED != 0;
        let offset = self.word & OFFSET;
        if !layout.aligned(offset) {
            return Err(Error::malformed(
                "L2 entry",
                format!("host cluster at {offset:#x} is not aligned"),
            ));
        }
        let host = (offset != 0 || (copied && layout.external_data)).then_some(offset);
        if layout.extended_l2 {
            let allocated = self.bitmap as u32;
            let zeros = (self.bitmap >> 32) as u32;
            if allocated & zeros != 0 {
                return Err(Error::malformed(
                    "L2 entry",
                    "a subcluster is both allocated and zero",
                ));
            }
            if allocated != 0 && host.is_none() {
                return Err(Error::malformed(
                    "L2 entry",
                    "an allocated subcluster has no host cluster",
                ));
            }
        } else if self.word & ZERO != 0 && layout.version < 3 {
            return Err(Error::malformed(
                "L2 entry",
                "zero cluster in a version 2 image",
            ));
        }
        Ok(Descriptor::Standard { host, copied })
    }

    /// State of unit `index` of a standard cluster.
    pub fn unit(&self, layout: &Layout, index: u64) -> Unit {
        if layout.extended_l2 {
            if self.bitmap >> (32 + index) & 1 != 0 {
                Unit::Zero
            } else if self.bitmap >> index & 1 != 0 {
                Unit::Data
            } else {
                Unit::Unallocated
            }
        } else if self.word & ZERO != 0 {
            Unit::Zero
        } else if self.word & OFFSET != 0 || (layout.external_data && self.word & COPIED != 0) {
            Unit::Data
        } else {
            Unit::Unallocated
        }
    }
}

/// Bitmap with the units `first..end` set in its lower half.
pub(crate) fn unit_mask(first: u64, end: u64) -> u64 {
    let below = |n: u64| {
        if n >= 32 {
            0xffff_ffff
        } else {
            (1u64 << n) - 1
        }
    };
    below(end) & !below(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(cluster_bits: u32, extended_l2: bool) -> Layout {
        Layout {
            cluster_bits,
            refcount_order: 4,
            extended_l2,
            version: 3,
            external_data: false,
        }
    }

    #[test]
    fn compressed_descriptors_survive_the_round_trip() {
        for bits in [9, 12, 16, 21] {
            let l = layout(bits, false);
            for (offset, length) in [
                (0u64, 1u64),
                (511, 2),
                (0x1_2345, 700),
                (0x7fff_ff01, 1 << bits),
            ] {
                let length = length.min(l.cluster_size());
                let Descriptor::Compressed {
                    offset: o,
                    length: n,
                } = l.compressed_entry(offset, length).descriptor(&l).unwrap()
                else {
                    panic!("a compressed entry reads as standard");
                };
                assert_eq!(o, offset);
                assert!(n >= length && n < length + 512, "{length} became {n}");
                assert_eq!((o + n) % 512, 0);
            }
        }
    }

    #[test]
    fn subcluster_states() {
        let l = layout(16, true);
        let e = L2Entry {
            word: 0x10000 | COPIED,
            bitmap: 0b1 | (0b10 << 32),
        };
        assert_eq!(e.unit(&l, 0), Unit::Data);
        assert_eq!(e.unit(&l, 1), Unit::Zero);
        assert_eq!(e.unit(&l, 2), Unit::Unallocated);
        assert!(
            L2Entry {
                word: 0x10000,
                bitmap: 1 | (1 << 32)
            }
            .descriptor(&l)
            .is_err()
        );
        assert!(L2Entry { word: 0, bitmap: 1 }.descriptor(&l).is_err());
        assert_eq!(unit_mask(0, 32), 0xffff_ffff);
        assert_eq!(unit_mask(3, 5), 0b11000);
    }

    #[test]
    fn version_2_has_no_zero_clusters() {
        let mut l = layout(16, false);
        assert!(L2Entry::zero(&l).descriptor(&l).is_ok());
        l.version = 2;
        assert!(L2Entry::zero(&l).descriptor(&l).is_err());
    }

    #[test]
    fn geometry() {
        let l = layout(16, false);
        assert_eq!(l.l2_span(), 512 << 20);
        assert_eq!(l.l1_entries((512 << 20) + 1), 2);
        assert_eq!(l.block_entries(), 32768);
        assert_eq!(layout(16, true).l2_span(), 256 << 20);
        assert_eq!(layout(16, true).unit_size(), 2048);
    }
}
