//! The ways to end: ACPI sleep and reset ports, i8042, triple fault.

use core::arch::asm;

use crate::cpu::{halt_forever, outb};

/// ACPI S5 by the sleep control port: SLP_TYP 5, SLP_EN (ACPI 6.4 §4.8.3.7).
pub fn shutdown() -> ! {
    outb(0x3c0, 5 << 2 | 0x20);
    halt_forever()
}

/// Reset by the ACPI reset register.
pub fn reset() -> ! {
    outb(0x3c0, 1);
    halt_forever()
}

/// Reset by the keyboard controller.
pub fn reset_i8042() -> ! {
    outb(0x64, 0xfe);
    halt_forever()
}

/// Reset as hardware does it when the fault of a fault faults.
pub fn triple_fault() -> ! {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let none = Pointer(0, 0);
    // SAFETY: nothing is meant to survive this.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const none, options(noreturn)) }
}
