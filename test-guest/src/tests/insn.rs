//! Instructions at CPL 0 that a software KVM may hand to the VMM: the results are what hardware gives. And SYSCALL.

use core::arch::asm;

use super::{Outcome, ensure, same};
use crate::cpu::{cpl3, cpuid, idt};

/// POPCNT, CMPXCHG16B, x87, XSAVE, CLAC and STAC, INT3, UD2.
pub fn instructions() -> Outcome {
    let features = cpuid(1, 0)[2];
    if features & 1 << 23 != 0 {
        let count: u64;
        // SAFETY: registers only.
        unsafe {
            asm!("popcnt {}, {}", out(reg) count, in(reg) 0xf0f0_0000_0000_0001u64, options(nomem, nostack))
        }
        same("popcnt", count, 9)?;
    }
    if features & 1 << 13 != 0 {
        cmpxchg16b()?;
    }
    x87()?;
    if features & 1 << 26 != 0 {
        xsave()?;
    }
    if cpuid(7, 0)[1] & 1 << 20 != 0 {
        let (set, clear): (u64, u64);
        // SAFETY: SMAP is off, so AC changes nothing else.
        unsafe {
            asm!("stac", "pushfq", "pop {}", "clac", "pushfq", "pop {}", out(reg) set, out(reg) clear)
        }
        same("AC after stac", set >> 18 & 1, 1)?;
        same("AC after clac", clear >> 18 & 1, 0)?;
    }
    let before = idt::count(3);
    // SAFETY: the handler counts the breakpoint and comes back.
    idt::expecting(0, || unsafe { asm!("int3") });
    same("breakpoints taken", u64::from(idt::count(3) - before), 1)?;
    let before = idt::count(6);
    // SAFETY: the handler steps over the two bytes.
    idt::expecting(2, || unsafe { asm!("ud2") });
    same(
        "undefined instructions taken",
        u64::from(idt::count(6) - before),
        1,
    )
}

fn cmpxchg16b() -> Outcome {
    #[repr(align(16))]
    struct Pair([u64; 2]);
    let mut pair = Pair([1, 2]);
    let swap = |pair: &mut Pair, low: u64, high: u64| -> (u64, u64, u64) {
        let (mut a, mut d, done): (u64, u64, u8) = (low, high, 0);
        let zf: u8;
        // SAFETY: 16 aligned bytes; RBX, which the compiler keeps for itself, is restored.
        unsafe {
            asm!("xchg rbx, {new}", "lock cmpxchg16b [{at}]", "sete {zf}", "mov rbx, {new}",
                new = inout(reg) 3u64 => _, at = in(reg) pair.0.as_mut_ptr(), zf = out(reg_byte) zf,
                inout("rax") a, inout("rdx") d, in("rcx") 4u64, options(nostack));
        }
        (a, d, u64::from(zf | done))
    };
    let (_, _, done) = swap(&mut pair, 1, 2);
    same("cmpxchg16b that matches", done, 1)?;
    same("its low half", pair.0[0], 3)?;
    same("its high half", pair.0[1], 4)?;
    let (a, d, done) = swap(&mut pair, 9, 9);
    same("cmpxchg16b that doesn't match", done, 0)?;
    same("the low half it found", a, 3)?;
    same("the high half it found", d, 4)
}

fn x87() -> Outcome {
    let (a, b, mut sum): (i32, i32, i64) = (20, 22, 0);
    let mut control: u16 = 0;
    // SAFETY: loads two integers, adds, stores the sum and the control word.
    unsafe {
        asm!("fninit", "fild dword ptr [{a}]", "fild dword ptr [{b}]", "faddp st(1), st", "fistp qword ptr [{s}]",
            "fnstcw [{c}]", "fwait",
            a = in(reg) &raw const a, b = in(reg) &raw const b, s = in(reg) &raw mut sum, c = in(reg) &raw mut control,
            options(nostack));
    }
    same("20 + 22 on the x87", sum as u64, 42)?;
    same("control word after fninit", u64::from(control), 0x37f)
}

fn xsave() -> Outcome {
    #[repr(align(64))]
    struct Area(#[expect(dead_code, reason = "only its address is used")] [u8; 4096]);
    static mut AREA: Area = Area([0; 4096]);
    let mut value: [u64; 2] = [0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff00];
    let wanted = value;
    // SAFETY: the area is big enough for x87 and SSE, the only states asked for; XMM7 is told to the compiler.
    unsafe {
        let mut cr4: u64;
        asm!("mov {}, cr4", out(reg) cr4, options(nostack));
        cr4 |= 1 << 18;
        asm!("mov cr4, {}", in(reg) cr4, options(nostack));
        asm!("xsetbv", in("ecx") 0, in("eax") 3, in("edx") 0, options(nostack));
        asm!("movdqu xmm7, [{v}]", "xsave [{area}]", "mov qword ptr [{v}], 0", "mov qword ptr [{v} + 8], 0",
            "movdqu xmm7, [{v}]", "xrstor [{area}]", "movdqu [{v}], xmm7",
            v = in(reg) value.as_mut_ptr(), area = in(reg) &raw mut AREA,
            in("eax") 3, in("edx") 0, out("xmm7") _, options(nostack));
    }
    same(
        "low half of XMM7 after xsave and xrstor",
        value[0],
        wanted[0],
    )?;
    same(
        "high half of XMM7 after xsave and xrstor",
        value[1],
        wanted[1],
    )?;
    // SAFETY: the header follows the 512 legacy bytes.
    let header = unsafe { (&raw const AREA).cast::<u64>().add(64).read() };
    ensure("XSTATE_BV has SSE", header & 2 != 0)
}

/// SYSCALL from CPL 3 arrives at CPL 0 and SYSRET comes back.
pub fn syscall() -> Outcome {
    for i in 0..10 {
        let answer = cpl3::syscall(i);
        same("SYSCALL's answer", answer & 0xffff_ffff, i + 1)?;
        same("CS in the SYSCALL handler", answer >> 32, 0x08)?;
    }
    Ok(())
}
