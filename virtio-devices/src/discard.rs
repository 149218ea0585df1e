//! Giving pages of guest RAM back to the host, for devices by which the guest says that it does not need them.
#![allow(unsafe_code)]

use std::io;

use libc::{MADV_DONTNEED, MADV_REMOVE, MAP_SHARED};
use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

/// Why pages stay.
#[derive(Debug, Error)]
pub enum DiscardError {
    /// The range is not all RAM; nothing was done.
    #[error("{len:#x} bytes at {start:#x} are not all RAM")]
    NotRam {
        /// First guest-physical address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// The host does not take them.
    #[error("giving {len:#x} bytes at {start:#x} back to the host")]
    Host {
        /// First guest-physical address.
        start: u64,
        /// Bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Guest RAM whose pages the host can have back.
pub trait DiscardRam: Send + Sync {
    /// Gives back the whole pages (of the host's memory: 4 KiB, or 2 MiB of huge-page memory) among the `len` bytes at `start`. They
    /// are zeros when they are next touched.
    ///
    /// # Errors
    /// [`DiscardError`]. With [`NotRam`](DiscardError::NotRam) nothing was done.
    fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError>;
}

/// All of it is RAM: anonymous memory, or a memfd.
impl<B: Bitmap + Send + Sync> DiscardRam for GuestMemoryMmap<B> {
    fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError> {
        let not_ram = || DiscardError::NotRam {
            start: start.0,
            len,
        };
        let count = usize::try_from(len).map_err(|_| not_ram())?;
        if !self.check_range(start, count) {
            return Err(not_ram());
        }
        // It does not wrap: all of it is in memory.
        let (mut at, end) = (start.0, start.0 + len);
        while at < end {
            let region = self.find_region(GuestAddress(at)).ok_or_else(not_ram)?;
            let first = at - region.start_addr().0;
            let last = (end - region.start_addr().0).min(region.len());
            discard_in(region, first, last).map_err(|source| DiscardError::Host {
                start: at,
                len: last - first,
                source,
            })?;
            at = region.start_addr().0 + last;
        }
        Ok(())
    }
}

/// Gives back the whole pages from offset `first` to `last`, which are within `region`.
fn discard_in<B: Bitmap>(region: &GuestRegionMmap<B>, first: u64, last: u64) -> io::Result<()> {
    let page = match region.is_hugetlbfs() {
        Some(true) => HUGE_PAGE,
        _ => PAGE,
    };
    let first = first.next_multiple_of(page);
    let last = last - last % page;
    if first >= last {
        return Ok(());
    }
    // Of a file the pages go, and not only our view of them.
    let advice = if region.flags() & MAP_SHARED != 0 {
        MADV_REMOVE
    } else {
        MADV_DONTNEED
    };
    // Both are offsets in a mapping, so they are numbers of the host.
    let (offset, len) = (first as usize, (last - first) as usize);
    // SAFETY: offset and length lie within the mapping of `region`, which stays. It is guest RAM, of which nobody holds
    // references, and whose content may change at any time.
    let result = unsafe { libc::madvise(region.as_ptr().add(offset).cast(), len, advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, FileOffset, MmapRegion};

    use super::*;

    /// 8 pages at 0, 8 more that touch them, and 4 far off, all full of ones.
    fn memory() -> GuestMemoryMmap {
        let ranges = [(0, 0x8000), (0x8000, 0x8000), (0x10_0000, 0x4000)];
        let memory =
            GuestMemoryMmap::from_ranges(&ranges.map(|(at, len)| (GuestAddress(at), len))).unwrap();
        for (at, len) in ranges {
            memory.write_slice(&vec![1; len], GuestAddress(at)).unwrap();
        }
        memory
    }

    /// The pages that are zeros.
    fn gone(memory: &GuestMemoryMmap) -> Vec<u64> {
        let pages = (0..16).chain(0x100..0x104);
        pages
            .filter(|page| {
                let mut bytes = [0; 4096];
                memory
                    .read_slice(&mut bytes, GuestAddress(page * PAGE))
                    .unwrap();
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                bytes[0] == 0
            })
            .collect()
    }

    #[test]
    fn whole_pages_go_and_no_others() {
        for (start, len, pages) in [
            (0x1000, 0x1000, vec![1]),
            (0x1001, 0x1fff, vec![2]),
            (0x1001, 0x1ffe, vec![]),
            (0x1000, 0, vec![]),
            (0x7000, 0x2000, vec![7, 8]),
            (0x6fff, 0x4000, vec![7, 8, 9]),
            (0x10_3000, 0x1000, vec![0x103]),
        ] {
            let memory = memory();
            memory.discard(GuestAddress(start), len).unwrap();
            assert_eq!(gone(&memory), pages, "{len:#x} at {start:#x}");
        }
    }

    #[test]
    fn what_is_not_all_ram_is_left_alone() {
        let memory = memory();
        for (start, len) in [
            (0xf000, 0x2000),
            (0x10_4000, 0x1000),
            (0x10_0000, u64::MAX),
            (u64::MAX - 0xfff, 0x1000),
            (u64::MAX, 2),
            (0, 0x10_4000),
        ] {
            let discarded = memory.discard(GuestAddress(start), len);
            assert!(matches!(discarded, Err(DiscardError::NotRam { .. })));
        }
        assert!(gone(&memory).is_empty());
    }

    #[test]
    fn shared_memory_is_given_back_too() {
        // SAFETY: the name is a C string; the descriptor is new and has no other owner.
        let file = unsafe {
            let fd = libc::memfd_create(c"".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(0x1_0000).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let mapping = MmapRegion::from_file(offset, 0x1_0000).unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::<()>::from_regions(vec![region]).unwrap();
        memory.write_slice(&[1; 0x1_0000], GuestAddress(0)).unwrap();
        let blocks = || file.metadata().unwrap().blocks();
        let before = blocks();
        memory.discard(GuestAddress(0x4000), 0x8000).unwrap();
        assert_eq!(before - blocks(), 0x8000 / 512);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x4000)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0xc000)).unwrap(), 1);
    }
}
