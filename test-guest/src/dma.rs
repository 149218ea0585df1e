//! Memory for devices: taken one after the other from the RAM past the guest's image (or from `dma=ADDRESS` on),
//! given back all at once.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::boot;
use crate::number;
use crate::outcome::{Outcome, Reason};

const MIB: u64 = 1 << 20;
/// Bytes in all.
const SIZE: u64 = 16 * MIB;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// First address and the one past the last: at most 16 MiB of one range of RAM, short of the initramfs.
pub fn pool() -> (u64, u64) {
    let start = number("dma").unwrap_or(boot::end_of_image());
    let start = start.next_multiple_of(MIB);
    let ram = (0..boot::range_count())
        .map(boot::range)
        .find(|r| r.kind == 1 && r.start <= start && start < r.start + r.size)
        .map_or(start, |r| r.start + r.size);
    let end = ram.min(start + SIZE);
    match boot::initramfs() {
        Some((at, size)) if at < end && start < at + size => (start, at.max(start)),
        _ => (start, end),
    }
}

/// Gives everything back; no device may use any of it any more.
pub fn reset() {
    NEXT.store(pool().0, Ordering::Relaxed);
}

/// Takes `size` zeroed bytes at a multiple of `align`, a power of two.
pub fn take(size: u64, align: u64) -> Outcome<u64> {
    let (start, end) = pool();
    let at = NEXT
        .load(Ordering::Relaxed)
        .max(start)
        .next_multiple_of(align);
    if size > end.saturating_sub(at) {
        return Err(Reason("memory for devices is used up", size, end));
    }
    NEXT.store(at + size, Ordering::Relaxed);
    fill(at, size, 0);
    Ok(at)
}

/// Sets `size` bytes that `take` gave.
pub fn fill(at: u64, size: u64, value: u8) {
    // SAFETY: the range is RAM that only the holder of this address uses.
    unsafe { core::ptr::write_bytes(at as *mut u8, value, size as usize) }
}

/// True when `size` bytes all have a value.
pub fn all(at: u64, size: u64, value: u8) -> bool {
    (at..at + size).all(|a| crate::map::read::<u8>(a) == value)
}
