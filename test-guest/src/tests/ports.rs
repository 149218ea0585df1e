//! Devices behind ports: CMOS, i8042, debug port, PM timer.

use super::{Outcome, ensure, same};
use crate::clock::PM_TIMER;
use crate::cpu::{inb, inl, outb};
use crate::{line, number};

fn cmos(index: u8) -> u8 {
    outb(0x70, index);
    inb(0x71)
}

/// Time registers hold times, in BCD or binary as register B says; memory registers match `memory=`.
pub fn cmos_registers() -> Outcome {
    let binary = cmos(0xb) & 4 != 0;
    let value = |index| {
        let v = u64::from(cmos(index));
        if binary { v } else { (v >> 4) * 10 + (v & 15) }
    };
    let (year, month, day) = (value(9), value(8), value(7));
    line!(
        "VALUE cmos {year}-{month}-{day} {}:{}:{}",
        value(4),
        value(2),
        value(0)
    );
    ensure("second", value(0) < 60)?;
    ensure("minute", value(2) < 60)?;
    ensure("month", (1..13).contains(&month))?;
    ensure("day", (1..32).contains(&day))?;
    ensure("year 20xx is past this code's", year >= 25)?;
    let Some(memory) = number("memory") else {
        return Ok(());
    };
    let low = (u64::from(cmos(0x35)) << 24 | u64::from(cmos(0x34)) << 16) + (16 << 20);
    let high =
        u64::from(cmos(0x5d)) << 32 | u64::from(cmos(0x5c)) << 24 | u64::from(cmos(0x5b)) << 16;
    line!("VALUE cmos_memory {low} {high}");
    same("low and high memory in CMOS", low + high, memory)
}

/// The second hand moves, within a generous number of looks.
pub fn cmos_advances() -> Outcome {
    let first = cmos(0);
    let start = inl(PM_TIMER);
    let mut moved = false;
    while !moved && inl(PM_TIMER).wrapping_sub(start) & 0xff_ffff < 14_000_000 {
        moved = cmos(0) != first;
    }
    ensure("CMOS seconds changed within four seconds", moved)
}

/// Ports that answer without effect: debug port, i8042's status, system control.
pub fn ports() -> Outcome {
    outb(0x80, 0x42);
    same("i8042 output buffer full", u64::from(inb(0x64) & 1), 0)?;
    inb(0x61);
    same("nobody at port 0x5000", u64::from(inb(0x5000)), 0xff)
}

/// The PM timer only goes forward, and moves.
pub fn pm_timer() -> Outcome {
    let start = inl(PM_TIMER);
    let mut last = start;
    for _ in 0..1000 {
        let now = inl(PM_TIMER);
        ensure(
            "PM timer went forward",
            now.wrapping_sub(last) & 0xff_ffff < 0x80_0000,
        )?;
        last = now;
    }
    line!(
        "VALUE pm_timer_1000_reads {}",
        last.wrapping_sub(start) & 0xff_ffff
    );
    ensure("PM timer moves", last != start)
}
