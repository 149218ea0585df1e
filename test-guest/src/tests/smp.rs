//! All processors that the MADT tells come up with the ids it tells, and answer an IPI.

use super::irq::wait_until;
use super::{Outcome, Reason, ensure, same};
use crate::cpu::{apic, idt, rdtsc, smp};
use crate::{acpi, line, number};

/// Start-up one by one, then a ping to each.
pub fn processors() -> Outcome {
    smp::prepare();
    let me = apic::id();
    for id in acpi::processors().filter(|&id| id != me) {
        let before = smp::online();
        smp::start(id);
        if !wait_until(|| smp::online() > before) {
            return Err(Reason(
                "a processor didn't start",
                u64::from(id),
                u64::from(id),
            ));
        }
        ensure(
            "a processor came up with the id that the MADT tells",
            smp::has_id(id),
        )?;
    }
    for id in acpi::processors().filter(|&id| id != me) {
        let before = idt::count(idt::PONG);
        let start = rdtsc();
        apic::send(id, u32::from(idt::PING) | 0x4000);
        if !wait_until(|| idt::count(idt::PONG) != before) {
            return Err(Reason(
                "a processor didn't answer",
                u64::from(id),
                u64::from(id),
            ));
        }
        line!("VALUE ping_tsc {id} {}", rdtsc() - start);
    }
    let all = smp::online() as u64 + 1;
    line!("VALUE cpus {all}");
    number("cpus").map_or(Ok(()), |n| same("processors", all, n))
}
