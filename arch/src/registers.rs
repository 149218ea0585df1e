//! Registers of the boot CPU at its first instruction, by boot protocol: PVH (Xen `docs/misc/pvh`, "x86/HVM direct
//! boot ABI") and the 64-bit Linux protocol ("The Linux/x86 Boot Protocol", 64-bit boot protocol).
//!
//! ```
//! use arch::boot::Protocol;
//! use arch::registers::{boot_general, set_boot_special};
//! use hypervisor::x86::SpecialRegisters;
//!
//! let mut special = SpecialRegisters::default();
//! set_boot_special(Protocol::Pvh, false, &mut special);
//! assert_eq!(special.cr0 & 1, 1);
//! assert_eq!(boot_general(Protocol::Pvh, 0x10_0000).rip, 0x10_0000);
//! ```

use hypervisor::x86::{DescriptorTable, Registers, SpecialRegisters};

use crate::boot::Protocol;
use crate::layout::{BOOT_STACK_POINTER, GDT_START, IDT_START, PVH_INFO_START, ZERO_PAGE_START};
use crate::{gdt, paging};

/// Protection enable.
const CR0_PE: u64 = 1;
/// Extension type, fixed to 1 on all processors of this century.
const CR0_ET: u64 = 1 << 4;
/// Paging.
const CR0_PG: u64 = 1 << 31;
/// Physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// 57-bit linear addresses.
const CR4_LA57: u64 = 1 << 12;
/// Long mode enable and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set; interrupts stay off.
const RFLAGS_FIXED: u64 = 2;

/// General registers for a start at `entry`: the boot structure's address in RBX (PVH) or RSI (Linux), the boot
/// stack, interrupts off, all else 0.
pub fn boot_general(protocol: Protocol, entry: u64) -> Registers {
    let common = Registers {
        rip: entry,
        rflags: RFLAGS_FIXED,
        rsp: BOOT_STACK_POINTER,
        ..Registers::default()
    };
    match protocol {
        Protocol::Pvh => Registers {
            rbx: PVH_INFO_START,
            ..common
        },
        Protocol::Linux64 => Registers {
            rsi: ZERO_PAGE_START,
            rbp: BOOT_STACK_POINTER,
            ..common
        },
    }
}

/// Sets segments, descriptor tables, control registers and EFER; the rest (APIC base, pending interrupts) stays as
/// it is. PVH: 32-bit protected mode without paging. Linux: long mode on the boot page tables, in 5 levels if
/// `five_level`, which needs LA57 in the vCPU's CPUID and a kernel built for it; a kernel entered in 4 levels goes to
/// 5 by itself. [`crate::boot::Loaded::write_boot_data`] puts what the registers point to into guest memory.
pub fn set_boot_special(protocol: Protocol, five_level: bool, special: &mut SpecialRegisters) {
    let data = gdt::data();
    special.cs = match protocol {
        Protocol::Pvh => gdt::code32(),
        Protocol::Linux64 => gdt::code64(),
    };
    special.ds = data;
    special.es = data;
    special.fs = data;
    special.gs = data;
    special.ss = data;
    special.tr = gdt::task_state();
    special.gdt = DescriptorTable {
        base: GDT_START,
        limit: gdt::GDT_SIZE as u16 - 1,
        ..DescriptorTable::default()
    };
    special.idt = DescriptorTable {
        base: IDT_START,
        limit: 7,
        ..DescriptorTable::default()
    };
    special.cr2 = 0;
    match protocol {
        Protocol::Pvh => {
            special.cr0 = CR0_PE | CR0_ET;
            special.cr3 = 0;
            special.cr4 = 0;
            special.efer = 0;
        }
        Protocol::Linux64 => {
            special.cr0 = CR0_PE | CR0_ET | CR0_PG;
            special.cr3 = paging::root(five_level);
            special.cr4 = CR4_PAE | if five_level { CR4_LA57 } else { 0 };
            special.efer = EFER_LME | EFER_LMA;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::x86::Segment;

    fn fresh() -> SpecialRegisters {
        SpecialRegisters {
            apic_base: 0xfee0_0900,
            cr8: 3,
            cr4: 0x40,
            efer: 0x800,
            ..SpecialRegisters::default()
        }
    }

    #[test]
    fn pvh_starts_in_flat_protected_mode() {
        let mut special = fresh();
        set_boot_special(Protocol::Pvh, true, &mut special);
        assert_eq!(special.cr0, 0x11);
        assert_eq!((special.cr3, special.cr4, special.efer), (0, 0, 0));
        assert_eq!((special.cs.db, special.cs.l, special.cs.type_), (1, 0, 0xb));
        assert_eq!(
            (special.tr.type_, special.tr.limit, special.tr.s),
            (0xb, 0x67, 0)
        );
        for segment in [special.ds, special.es, special.ss] {
            assert_eq!((segment.base, segment.limit, segment.g), (0, u32::MAX, 1));
        }
        let general = boot_general(Protocol::Pvh, 0x123_4560);
        let wanted = Registers {
            rip: 0x123_4560,
            rbx: 0x6000,
            rsp: 0x8ff0,
            rflags: 2,
            ..Registers::default()
        };
        assert_eq!(general, wanted);
    }

    #[test]
    fn linux_starts_in_long_mode() {
        for (five_level, cr3, cr4) in [(false, 0xa000, 0x20), (true, 0x9000, 0x1020)] {
            let mut special = fresh();
            set_boot_special(Protocol::Linux64, five_level, &mut special);
            assert_eq!(special.cr0, 0x8000_0011);
            assert_eq!((special.cr3, special.cr4, special.efer), (cr3, cr4, 0x500));
            assert_eq!(
                (special.cs.selector, special.cs.l, special.cs.db),
                (0x10, 1, 0)
            );
            for segment in [special.ds, special.es, special.fs, special.gs, special.ss] {
                assert_eq!(segment.selector, 0x18);
            }
            assert_eq!((special.gdt.base, special.gdt.limit), (0x500, 31));
            assert_eq!((special.idt.base, special.idt.limit), (0x520, 7));
        }
        let general = boot_general(Protocol::Linux64, 0x100_0200);
        assert_eq!(
            (general.rip, general.rsi, general.rflags),
            (0x100_0200, 0x7000, 2)
        );
        assert_eq!(general.rsp, 0x8ff0);
    }

    #[test]
    fn what_kvm_gave_besides_stays() {
        let mut special = fresh();
        set_boot_special(Protocol::Linux64, false, &mut special);
        assert_eq!((special.apic_base, special.cr8), (0xfee0_0900, 3));
        assert_eq!(special.ldt, Segment::default());
    }
}
