//! Registers at entry, command line, memory map, initramfs.

use super::{Outcome, Reason, ensure, same};
use crate::boot::{self, Protocol};
use crate::cpu::cpl3;
use crate::{line, number};

/// State at entry (Xen `docs/misc/pvh`; Linux "x86 boot", 64-bit protocol).
pub fn boot() -> Outcome {
    let e = boot::entry();
    line!("VALUE cmdline {}", boot::command_line());
    same("interrupts enabled at entry", e.flags & 0x200, 0)?;
    same("protected mode at entry", e.cr0 & 1, 1)?;
    match e.protocol {
        Protocol::Pvh => {
            line!("VALUE protocol pvh");
            same("paging at entry", e.cr0 & 1 << 31, 0)?;
            same("CR4 at entry", e.cr4, 0)?;
            same(
                "start info magic",
                u64::from(boot::peek::<u32>(e.pointer)),
                0x336e_c578,
            )?;
            ensure(
                "start info has a memory map",
                boot::peek::<u32>(e.pointer + 4) >= 1,
            )?;
        }
        Protocol::Linux64 => {
            line!("VALUE protocol linux64");
            same("paging at entry", e.cr0 >> 31 & 1, 1)?;
            same("long mode active at entry", e.efer & 0x500, 0x500)?;
            same("PAE at entry", e.cr4 & 0x20, 0x20)?;
            same("CS at entry", e.cs, 0x10)?;
            same("DS at entry", e.ds, 0x18)?;
            same("SS at entry", e.ss, 0x18)?;
            same(
                "boot sector signature",
                u64::from(boot::peek::<u16>(e.pointer + 0x1fe)),
                0xaa55,
            )?;
        }
    }
    Ok(())
}

/// The map is sorted without overlap, adds up to `memory=`, and the first and last page of each range hold data.
pub fn memory() -> Outcome {
    extern "C" fn touch(at: u64) -> u64 {
        let cell = at as *mut u64;
        // SAFETY: a RAM page past the guest's image, which nobody else uses.
        unsafe {
            let old = cell.read_volatile();
            cell.write_volatile(at ^ 0x5a5a_5a5a);
            let good = cell.read_volatile() == at ^ 0x5a5a_5a5a;
            cell.write_volatile(old);
            u64::from(good)
        }
    }
    let (mut total, mut end) = (0, 0);
    ensure("the memory map has ranges", boot::range_count() > 0)?;
    for i in 0..boot::range_count() {
        let r = boot::range(i);
        line!("VALUE range {:#x} {:#x} {}", r.start, r.size, r.kind);
        if r.start < end {
            return Err(Reason("ranges overlap or are out of order", r.start, end));
        }
        end = r.start + r.size;
        if r.kind != 1 {
            continue;
        }
        total += r.size;
        // Low memory holds what the boot protocol handed over, and the image follows at 1 MiB.
        let first = r.start.max((boot::end_of_image() + 0xfff) & !0xfff);
        if first >= end {
            continue;
        }
        same("first page of a range", cpl3::run(touch, first), 1)?;
        same(
            "last page of a range",
            cpl3::run(touch, (end - 8) & !0xfff),
            1,
        )?;
    }
    line!("VALUE ram {total}");
    if let Some(wanted) = number("memory") {
        // Up to 1 MiB may go to the legacy hole and to firmware tables.
        if total > wanted || wanted - total > 1 << 20 {
            return Err(Reason("RAM in the map", total, wanted));
        }
    }
    Ok(())
}

/// Size and sum of the initramfs' bytes, added at CPL 3.
pub fn initramfs() -> Outcome {
    extern "C" fn sum(at: u64) -> u64 {
        // SAFETY: `at` points at the pair that the caller keeps on its stack; the range is the initramfs.
        let bytes = unsafe {
            let (start, size) = *(at as *const (u64, u64));
            core::slice::from_raw_parts(start as *const u8, size as usize)
        };
        bytes
            .iter()
            .fold(0u64, |s, &b| s.wrapping_mul(31).wrapping_add(u64::from(b)))
    }
    let Some(place) = boot::initramfs() else {
        return Err(Reason("no initramfs", 0, 1));
    };
    let got = cpl3::run(sum, &raw const place as u64);
    line!("VALUE initramfs {} {got:#x}", place.1);
    same("initramfs starts on a page", place.0 & 0xfff, 0)?;
    number("initramfs").map_or(Ok(()), |wanted| same("sum of the initramfs", got, wanted))
}
