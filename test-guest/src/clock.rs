//! Waiting with an end, by the ACPI PM timer (3.579545 MHz, 24 bits; ACPI 6.4 §4.8.3.3), at any CPL.

use core::hint::spin_loop;

use crate::cpu::inl;

/// Port of the PM timer.
pub const PM_TIMER: u16 = 0x608;

/// Looks between two reads of the timer, which cost an exit each.
const LOOKS: u32 = 2000;

/// Polls until it holds, for `milliseconds` at most; whether it came to hold. Interrupts stay as they are.
pub fn within(milliseconds: u64, holds: impl Fn() -> bool) -> bool {
    let limit = milliseconds * 3580;
    let mut last = inl(PM_TIMER);
    let mut passed = 0;
    loop {
        for _ in 0..LOOKS {
            if holds() {
                return true;
            }
            spin_loop();
        }
        if passed >= limit {
            return false;
        }
        let now = inl(PM_TIMER);
        passed += u64::from(now.wrapping_sub(last) & 0xff_ffff);
        last = now;
    }
}
