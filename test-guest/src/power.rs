//! The ways to end: ACPI sleep and reset ports, i8042, triple fault.

use core::arch::asm;

use crate::boot::peek;
use crate::cpu::{halt_forever, outb, outw};
use crate::{acpi, map};

/// ACPI S5 by the sleep control port: SLP_TYP 5, SLP_EN (ACPI 6.4 §4.8.3.7). Where a VMM has it elsewhere, as the FADT says.
pub fn shutdown() -> ! {
    outb(0x3c0, 5 << 2 | 0x20);
    by_fadt();
    halt_forever()
}

/// S5 by the registers that the FADT tells (ACPI 6.4 §5.2.9). Where the hardware is not reduced, SLP_TYP is the 0 of QEMU's
/// machines: `_S5` would say so.
fn by_fadt() {
    const REDUCED: u32 = 1 << 20;
    let Some(fadt) = acpi::rsdp().and_then(|at| acpi::tables(at).find(|t| &t.signature == b"FACP"))
    else {
        return;
    };
    if peek::<u32>(fadt.address + 112) & REDUCED == 0 {
        outw(peek::<u32>(fadt.address + 64) as u16, 1 << 13);
        return;
    }
    let (space, register): (u8, u64) = (peek(fadt.address + 244), peek(fadt.address + 248));
    let value: u8 = 5 << 2 | 0x20;
    match space {
        0 => {
            if let Some(at) = map::device(register, 1) {
                map::write(at, value);
            }
        }
        1 => outb(register as u16, value),
        _ => {}
    }
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
