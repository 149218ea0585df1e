//! Device memory above the identity map of 16 GiB: a window of 512 pages of 2 MiB at 1 TiB
//! (Intel SDM vol. 3, 4.5), and accesses to device memory of every width.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const PAGE: u64 = 2 << 20;
const IDENTITY_END: u64 = 16 << 30;
const WINDOW: u64 = 1 << 40;

/// Present, writable, open to CPL 3; for a page also: uncached, 2 MiB.
const TABLE_FLAGS: u64 = 7;
const PAGE_FLAGS: u64 = 0x97;

#[repr(align(4096))]
struct Table([AtomicU64; 512]);

unsafe extern "C" {
    static pml4: [AtomicU64; 512];
}

static POINTERS: Table = Table([const { AtomicU64::new(0) }; 512]);
static PAGES: Table = Table([const { AtomicU64::new(0) }; 512]);
static USED: AtomicUsize = AtomicUsize::new(0);

/// Where `size` bytes of device memory at a physical address can be reached; mapped on the first call, for good.
/// `None` when the window is full.
pub fn device(address: u64, size: u64) -> Option<u64> {
    let end = address.checked_add(size.max(1))?;
    if end <= IDENTITY_END {
        return Some(address);
    }
    let first = address / PAGE;
    let count = ((end - 1) / PAGE - first + 1) as usize;
    let used = USED.load(Ordering::Acquire);
    let holds = |slot: usize, i: usize| {
        PAGES.0[slot + i].load(Ordering::Relaxed) & !0xfff == (first + i as u64) * PAGE
    };
    let known = (0..used.saturating_sub(count - 1)).find(|&s| (0..count).all(|i| holds(s, i)));
    let slot = match known {
        Some(slot) => slot,
        None if count <= 512 - used => {
            for (i, entry) in PAGES.0[used..used + count].iter().enumerate() {
                entry.store(((first + i as u64) * PAGE) | PAGE_FLAGS, Ordering::Release);
            }
            USED.store(used + count, Ordering::Release);
            POINTERS.0[0].store(&raw const PAGES as u64 | TABLE_FLAGS, Ordering::Release);
            // SAFETY: the third entry of the page table that `boot.s` laid out is empty or already this value.
            unsafe { &pml4[2] }.store(&raw const POINTERS as u64 | TABLE_FLAGS, Ordering::Release);
            used
        }
        None => return None,
    };
    Some(WINDOW + slot as u64 * PAGE + address % PAGE)
}

/// Reads device memory, or memory that a device shares.
pub fn read<T: Copy>(at: u64) -> T {
    // SAFETY: callers give addresses from `device` or `dma`, and plain integers, aligned.
    unsafe { (at as *const T).read_volatile() }
}

/// Writes device memory, or memory that a device shares.
pub fn write<T: Copy>(at: u64, value: T) {
    // SAFETY: callers give addresses from `device` or `dma`, and plain integers, aligned.
    unsafe { (at as *mut T).write_volatile(value) }
}
