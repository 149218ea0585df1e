//! What the driver tells of the guest's memory (virtio 1.2 §5.5.6.3).

use vm_memory::GuestMemory;
use vm_virtio::{Chain, Fault};

/// Bytes of an entry: le16 tag, le64 value.
const ENTRY: usize = 10;
/// More entries than there are tags.
const MOST_ENTRIES: usize = 64;

/// The guest's memory as its driver sees it; what it did not tell is absent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BalloonStatistics {
    /// Bytes read from swap so far.
    pub swap_in: Option<u64>,
    /// Bytes written to swap so far.
    pub swap_out: Option<u64>,
    /// Page faults so far that needed the disk.
    pub major_faults: Option<u64>,
    /// Page faults so far that did not.
    pub minor_faults: Option<u64>,
    /// Bytes not used at all.
    pub free: Option<u64>,
    /// Bytes in all.
    pub total: Option<u64>,
    /// Bytes that a new program could have without swapping.
    pub available: Option<u64>,
    /// Bytes of the disk's cache, which can be had back quickly.
    pub disk_caches: Option<u64>,
    /// Huge pages given out so far.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be given out.
    pub hugetlb_failures: Option<u64>,
}

impl BalloonStatistics {
    /// Of the driver's buffer. Tags that are not known are passed over, and so is what comes after many entries.
    pub(super) fn read<M: GuestMemory>(memory: &M, chain: &Chain) -> Result<Self, Fault> {
        let mut this = Self::default();
        let mut reader = chain.reader(memory);
        for _ in 0..MOST_ENTRIES {
            if reader.left() < ENTRY {
                break;
            }
            let tag = u16::from_le(reader.read_obj()?);
            let value = u64::from_le(reader.read_obj()?);
            if let Some(field) = this.field(tag) {
                *field = Some(value);
            }
        }
        Ok(this)
    }

    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            _ => return None,
        })
    }
}
