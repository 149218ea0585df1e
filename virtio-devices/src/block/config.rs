//! The configuration space of a block device (virtio 1.2 §5.2.4), which says what the disk is and no more.

use block_util::Geometry;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_virtio::feature::RING_FEATURES;

use super::request::SECTOR;

/// The driver can have written data made stable.
pub(super) const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// The driver chooses between write-back and write-through.
const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
const SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
const RO: u64 = 1 << VIRTIO_BLK_F_RO;
const BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
const TOPOLOGY: u64 = 1 << VIRTIO_BLK_F_TOPOLOGY;
const MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Bytes, up to the fields of secure erase, which is not offered.
pub(super) const SIZE: usize = 60;

const CAPACITY: usize = 0;
const SEGMENTS: usize = 12;
const BLOCK_SIZE: usize = 20;
const PHYSICAL_BLOCK_EXPONENT: usize = 24;
const MIN_IO_SIZE: usize = 26;
const OPT_IO_SIZE: usize = 28;
/// 1 for write-back, 0 for write-through.
pub(super) const WRITEBACK: usize = 32;
const NUM_QUEUES: usize = 34;
const MAX_DISCARD_SECTORS: usize = 36;
const MAX_DISCARD_SEGMENTS: usize = 40;
const DISCARD_ALIGNMENT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS: usize = 48;
const MAX_WRITE_ZEROES_SEGMENTS: usize = 52;
const WRITE_ZEROES_MAY_UNMAP: usize = 56;

/// The most sectors of a discard or of writing zeroes: 1 GiB, so that no request takes very long.
pub(super) const MAX_RANGE: u32 = 1 << 21;

/// The most buffers of a transfer: what one system call takes, less one, for guest memory may be cut where two of its regions meet.
const MAX_SEGMENTS: u16 = 1023;

/// What does not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub geometry: Geometry,
    pub read_only: bool,
    pub queues: u16,
    pub queue_size: u16,
}

impl Facts {
    /// The disk can discard, and the driver may.
    pub fn discards(&self) -> bool {
        !self.read_only && self.geometry.discard_granularity > 0
    }

    pub fn features(&self) -> u64 {
        let mut features = RING_FEATURES | FLUSH | CONFIG_WCE | SEG_MAX | BLK_SIZE | TOPOLOGY;
        if self.read_only {
            features |= RO;
        } else {
            features |= WRITE_ZEROES;
        }
        if self.discards() {
            features |= DISCARD;
        }
        if self.queues > 1 {
            features |= MQ;
        }
        features
    }

    /// The whole space, for a disk of `capacity` bytes.
    pub fn bytes(&self, capacity: u64, writeback: bool) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let geometry = &self.geometry;
        let block = geometry.logical_block_size.max(SECTOR as u32);
        put(CAPACITY, &(capacity / SECTOR).to_le_bytes());
        // Header and status take a descriptor each where there is no indirect table.
        let segments = self.queue_size.saturating_sub(2).clamp(1, MAX_SEGMENTS);
        put(SEGMENTS, &u32::from(segments).to_le_bytes());
        put(BLOCK_SIZE, &block.to_le_bytes());
        let exponent = (geometry.physical_block_size / block).checked_ilog2();
        put(PHYSICAL_BLOCK_EXPONENT, &[exponent.unwrap_or(0) as u8]);
        let minimum = u16::try_from(geometry.minimum_io_size / block).unwrap_or(u16::MAX);
        put(MIN_IO_SIZE, &minimum.to_le_bytes());
        put(
            OPT_IO_SIZE,
            &(geometry.optimal_io_size / block).to_le_bytes(),
        );
        put(WRITEBACK, &[u8::from(writeback)]);
        put(NUM_QUEUES, &self.queues.to_le_bytes());
        if self.discards() {
            put(MAX_DISCARD_SECTORS, &MAX_RANGE.to_le_bytes());
            put(MAX_DISCARD_SEGMENTS, &1_u32.to_le_bytes());
            let alignment = geometry.discard_granularity.max(block) / SECTOR as u32;
            put(DISCARD_ALIGNMENT, &alignment.to_le_bytes());
        }
        if !self.read_only {
            put(MAX_WRITE_ZEROES_SECTORS, &MAX_RANGE.to_le_bytes());
            put(MAX_WRITE_ZEROES_SEGMENTS, &1_u32.to_le_bytes());
            put(WRITE_ZEROES_MAY_UNMAP, &[u8::from(self.discards())]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        geometry: Geometry {
            logical_block_size: 512,
            physical_block_size: 4096,
            minimum_io_size: 4096,
            optimal_io_size: 1 << 20,
            discard_granularity: 65536,
        },
        read_only: false,
        queues: 3,
        queue_size: 128,
    };

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn every_field_is_told() {
        let bytes = FACTS.bytes(12_345 * 512 + 511, true);
        assert_eq!(bytes[..8], 12_345_u64.to_le_bytes());
        // No largest segment, no cylinders.
        assert_eq!((u32_at(&bytes, 8), u32_at(&bytes, 16)), (0, 0));
        assert_eq!(u32_at(&bytes, 12), 126);
        assert_eq!(u32_at(&bytes, 20), 512);
        assert_eq!(bytes[24..32], [3, 0, 8, 0, 0, 8, 0, 0]);
        assert_eq!(bytes[32..36], [1, 0, 3, 0]);
        assert_eq!([36, 40, 44].map(|at| u32_at(&bytes, at)), [1 << 21, 1, 128]);
        assert_eq!([48, 52].map(|at| u32_at(&bytes, at)), [1 << 21, 1]);
        assert_eq!(bytes[56..], [1, 0, 0, 0]);
        assert_eq!(FACTS.bytes(0, false)[32], 0);
        let bits = [2, 6, 9, 10, 11, 12, 13, 14].map(|bit| 1_u64 << bit);
        assert_eq!(FACTS.features(), RING_FEATURES | bits.iter().sum::<u64>());
    }

    #[test]
    fn a_read_only_disk_offers_no_changes() {
        let facts = Facts {
            read_only: true,
            queues: 1,
            ..FACTS
        };
        let bits = [2, 5, 6, 9, 10, 11].map(|bit| 1_u64 << bit);
        assert_eq!(facts.features(), RING_FEATURES | bits.iter().sum::<u64>());
        assert_eq!(facts.bytes(512, true)[36..], [0; 24]);
    }

    #[test]
    fn a_disk_that_cannot_discard_does_not_offer_it() {
        let mut facts = FACTS;
        facts.geometry.discard_granularity = 0;
        assert_eq!(facts.features() & DISCARD, 0);
        let bytes = facts.bytes(512, true);
        assert_eq!(bytes[36..48], [0; 12]);
        assert_eq!((u32_at(&bytes, 52), bytes[56]), (1, 0));
    }

    #[test]
    fn sizes_that_are_odd_do_no_harm() {
        let mut facts = FACTS;
        facts.queue_size = 32768;
        facts.geometry = Geometry {
            logical_block_size: 4096,
            physical_block_size: 512,
            minimum_io_size: u32::MAX,
            optimal_io_size: 100,
            discard_granularity: 1,
        };
        let bytes = facts.bytes(u64::MAX, true);
        assert_eq!(u32_at(&bytes, 12), 1023);
        assert_eq!(u32_at(&bytes, 20), 4096);
        assert_eq!(bytes[24..32], [0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(u32_at(&bytes, 44), 8);
        facts.geometry.logical_block_size = 0;
        facts.queue_size = 4;
        let bytes = facts.bytes(0, true);
        assert_eq!((u32_at(&bytes, 12), u32_at(&bytes, 20)), (2, 512));
    }
}
