//! Interrupts and time: COM1 through the I/O APIC, LAPIC timer, HLT, TSC, kvmclock.

use super::{Outcome, ensure, same};
use crate::boot::peek;
use crate::clock::PM_TIMER;
use crate::cpu::apic::{self, Reg};
use crate::cpu::{
    cpuid, disable_interrupts, enable_interrupts, idt, inl, rdmsr, rdtsc, wait_for_interrupt, wrmsr,
};
use crate::{line, number, serial};

/// COM1's line at the I/O APIC.
const COM1: u32 = 4;
const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 1 << 18;
const MASKED: u32 = 1 << 16;

/// Polls with interrupts on until it holds; gives up after four seconds by the PM timer.
pub fn wait_until(holds: impl Fn() -> bool) -> bool {
    let start = inl(PM_TIMER);
    enable_interrupts();
    let mut good = holds();
    while !good && inl(PM_TIMER).wrapping_sub(start) & 0xff_ffff < 14_000_000 {
        good = holds();
    }
    disable_interrupts();
    good
}

/// I/O APIC: registers read back, and COM1's "transmitter empty" arrives.
pub fn ioapic() -> Outcome {
    let version = apic::ioapic_read(1);
    line!("VALUE ioapic_version {version:#x}");
    ensure("24 lines or more", version >> 16 & 0xff >= 23)?;
    apic::route(COM1, idt::SERIAL);
    same(
        "redirection entry",
        u64::from(apic::ioapic_read(0x18) & 0x100ff),
        u64::from(idt::SERIAL),
    )?;
    let before = serial::THRE_INTERRUPTS.load(core::sync::atomic::Ordering::Relaxed);
    serial::set_interrupts(2);
    let came = wait_until(|| {
        serial::THRE_INTERRUPTS.load(core::sync::atomic::Ordering::Relaxed) != before
    });
    serial::set_interrupts(0);
    apic::mask(COM1);
    ensure("transmitter-empty interrupt", came)
}

/// Lines sent to COM1 come back upper-cased, received by interrupt alone; `quit` ends it.
pub fn echo() -> Outcome {
    apic::route(COM1, idt::SERIAL);
    serial::set_interrupts(1);
    line!("READY");
    let mut text = [0u8; 200];
    let mut length = 0;
    loop {
        let Some(byte) = serial::received() else {
            // With interrupts off, a byte that comes now still ends the HLT.
            wait_for_interrupt();
            continue;
        };
        if byte != b'\n' && byte != b'\r' {
            if length < text.len() {
                text[length] = byte.to_ascii_uppercase();
                length += 1;
            }
            continue;
        }
        line!(
            "ECHO {}",
            core::str::from_utf8(&text[..length]).unwrap_or("?")
        );
        if &text[..length] == b"QUIT" {
            break;
        }
        length = 0;
    }
    serial::set_interrupts(0);
    apic::mask(COM1);
    let seen = serial::DATA_INTERRUPTS.load(core::sync::atomic::Ordering::Relaxed);
    line!("VALUE data_interrupts {seen}");
    ensure("data interrupts", seen > 0)
}

/// LAPIC timer: one shot wakes HLT, periodic keeps coming, masked stays silent, TSC deadline fires.
pub fn timer() -> Outcome {
    let ticks = || idt::count(idt::TIMER);
    apic::write(Reg::Divide, 0xb);
    let before = ticks();
    apic::write(Reg::LvtTimer, u32::from(idt::TIMER));
    let start = rdtsc();
    apic::write(Reg::InitialCount, 1_000_000);
    while ticks() == before {
        wait_for_interrupt();
    }
    line!("VALUE one_shot_tsc {}", rdtsc() - start);
    same("one-shot ticks", u64::from(ticks() - before), 1)?;
    same(
        "one-shot count ran down",
        u64::from(apic::read(Reg::CurrentCount)),
        0,
    )?;
    let before = ticks();
    apic::write(Reg::LvtTimer, u32::from(idt::TIMER) | PERIODIC);
    apic::write(Reg::InitialCount, 5_000_000);
    while ticks() - before < 5 {
        wait_for_interrupt();
    }
    apic::write(Reg::LvtTimer, MASKED);
    apic::write(Reg::InitialCount, 0);
    ensure("five periodic ticks", ticks() - before >= 5)?;
    if cpuid(1, 0)[2] >> 24 & 1 == 1 {
        let before = ticks();
        apic::write(Reg::LvtTimer, u32::from(idt::TIMER) | DEADLINE);
        let deadline = rdtsc() + 1_000_000;
        wrmsr(0x6e0, deadline);
        while ticks() == before {
            wait_for_interrupt();
        }
        let late = rdtsc().wrapping_sub(deadline);
        line!("VALUE deadline_late_tsc {late}");
        ensure("deadline tick came after its deadline", late < 1 << 60)?;
        same("deadline MSR is disarmed", rdmsr(0x6e0), 0)?;
        apic::write(Reg::LvtTimer, MASKED);
    }
    Ok(())
}

/// The TSC goes forward, at a rate against the PM timer and kvmclock that a processor can have.
pub fn clock() -> Outcome {
    let (tsc, pm) = (rdtsc(), inl(PM_TIMER));
    let mut last = tsc;
    while inl(PM_TIMER).wrapping_sub(pm) & 0xff_ffff < 357_954 {
        let now = rdtsc();
        ensure("TSC went forward", now >= last)?;
        last = now;
    }
    let khz = (rdtsc() - tsc) / 100;
    line!("VALUE tsc_khz_by_pm_timer {khz}");
    ensure(
        "TSC between 0.2 and 20 GHz",
        (200_000..20_000_000).contains(&khz),
    )?;
    if cpuid(0x4000_0001, 0)[0] & 1 << 3 == 0 {
        line!("VALUE kvmclock absent");
        return Ok(());
    }
    #[repr(align(64))]
    struct Page(#[expect(dead_code, reason = "only its address is used")] [u32; 16]);
    static mut CLOCK: Page = Page([0; 16]);
    let page = &raw mut CLOCK as u64;
    wrmsr(0x4b56_4d01, page | 1);
    let (multiply, shift) = (u64::from(peek::<u32>(page + 24)), peek::<i8>(page + 28));
    wrmsr(0x4b56_4d01, 0);
    line!("VALUE kvmclock mul={multiply} shift={shift}");
    ensure("kvmclock is filled in", multiply != 0)?;
    // One TSC tick is mul * 2^(shift-32) ns.
    let base = (1_000_000u64 << 32) / multiply;
    let by_clock = if shift < 0 {
        base << shift.unsigned_abs().min(20)
    } else {
        base >> shift.min(20)
    };
    line!("VALUE tsc_khz_by_kvmclock {by_clock}");
    ensure(
        "kvmclock and PM timer agree within a half",
        by_clock > khz / 2 && by_clock < khz * 2,
    )
}

/// TSC ticks that things take, as `VALUE` lines: a port exit, a timer interrupt out of HLT.
pub fn latency() -> Outcome {
    let runs = number("runs").unwrap_or(20);
    let start = rdtsc();
    for _ in 0..runs {
        inl(PM_TIMER);
    }
    line!("VALUE port_read_tsc {}", (rdtsc() - start) / runs.max(1));
    apic::write(Reg::Divide, 0xb);
    apic::write(Reg::LvtTimer, u32::from(idt::TIMER));
    let start = rdtsc();
    for _ in 0..runs {
        let before = idt::count(idt::TIMER);
        apic::write(Reg::InitialCount, 1);
        while idt::count(idt::TIMER) == before {
            wait_for_interrupt();
        }
    }
    line!(
        "VALUE timer_from_hlt_tsc {}",
        (rdtsc() - start) / runs.max(1)
    );
    apic::write(Reg::LvtTimer, MASKED);
    Ok(())
}
