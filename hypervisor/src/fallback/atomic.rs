//! Compare and exchange of 16 bytes, which the standard library does not have.
#![allow(unsafe_code)]

use std::arch::asm;

/// If the 16 bytes at `at` are `current`, replaces them by `new`, in one step for all processors
/// (CMPXCHG16B). Gives whether it did; `None` if `at` is not a multiple of 16 or the host lacks the
/// instruction.
///
/// # Safety
///
/// The 16 bytes must be mapped for reading and writing, and be no Rust object: the guest may change
/// them at any time.
pub(crate) unsafe fn compare_exchange_16(at: *mut u8, current: u128, new: u128) -> Option<bool> {
    if !at.addr().is_multiple_of(16) || !is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    let done: u8;
    // SAFETY: aligned, and mapped by the caller's promise. RBX, which inline assembly may not name,
    // is put back before the block ends.
    unsafe {
        asm!(
            "xchg rbx, {low}",
            "lock cmpxchg16b [{at}]",
            "sete {done}",
            "mov rbx, {low}",
            at = in(reg) at,
            low = inout(reg) new as u64 => _,
            done = out(reg_byte) done,
            in("rcx") (new >> 64) as u64,
            inout("rax") current as u64 => _,
            inout("rdx") (current >> 64) as u64 => _,
            options(nostack),
        );
    }
    Some(done != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(16))]
    struct Bytes([u8; 32]);

    #[test]
    fn exchanges_what_matches() {
        let mut bytes = Bytes([1; 32]);
        let (old, new) = (u128::from_le_bytes([1; 16]), 0x0102_0304 << 90 | 7);
        let at = bytes.0.as_mut_ptr();
        // SAFETY: an array of this function's, which nothing else uses.
        unsafe {
            assert_eq!(compare_exchange_16(at, old + 1, new), Some(false));
            assert_eq!(at.cast::<u128>().read(), old);
            assert_eq!(compare_exchange_16(at, old, new), Some(true));
            assert_eq!(at.cast::<u128>().read(), new);
            assert_eq!(compare_exchange_16(at.add(8), new, old), None);
        }
        assert_eq!(bytes.0[16..], [1; 16]);
    }

    #[test]
    fn threads_lose_no_increment() {
        let mut bytes = Bytes([0; 32]);
        let at = bytes.0.as_mut_ptr() as usize;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let mut seen = 0;
                        // SAFETY: the array outlives the scope, and is used by this call only.
                        while unsafe { compare_exchange_16(at as *mut u8, seen, seen + 1) }
                            == Some(false)
                        {
                            seen += 1;
                        }
                    }
                });
            }
        });
        assert_eq!(
            u64::from_le_bytes(bytes.0[..8].try_into().unwrap_or_default()),
            20_000
        );
    }
}
