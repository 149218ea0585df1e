//! The tests, one file a topic. A test takes nothing and answers with a detail for its `OK` line or the reason it failed.

mod acpi;
mod boot;
mod insn;
mod irq;
mod pci;
mod ports;
mod smp;

use crate::line;

/// What a test ends with: nothing more to say, or why it failed.
pub type Outcome = Result<(), Reason>;

/// Why a test failed: a sentence and the numbers it is about (got, wanted).
pub struct Reason(pub &'static str, pub u64, pub u64);

/// Fails with the sentence unless `got == wanted`.
pub fn same(what: &'static str, got: u64, wanted: u64) -> Outcome {
    if got == wanted {
        Ok(())
    } else {
        Err(Reason(what, got, wanted))
    }
}

/// Fails with the sentence unless it holds.
pub fn ensure(what: &'static str, holds: bool) -> Outcome {
    same(what, u64::from(holds), 1)
}

/// A name and what it runs.
type Test = (&'static str, fn() -> Outcome);

const TESTS: &[Test] = &[
    ("boot", boot::boot),
    ("memory", boot::memory),
    ("initramfs", boot::initramfs),
    ("acpi", acpi::acpi),
    ("cpuid", acpi::cpuid_leaves),
    ("cmos", ports::cmos_registers),
    ("cmos_advances", ports::cmos_advances),
    ("ports", ports::ports),
    ("pm_timer", ports::pm_timer),
    ("ioapic", irq::ioapic),
    ("echo", irq::echo),
    ("timer", irq::timer),
    ("clock", irq::clock),
    ("latency", irq::latency),
    ("smp", smp::processors),
    ("instructions", insn::instructions),
    ("syscall", insn::syscall),
    ("pci", pci::pci),
];

/// Runs the tests named in a `,`-separated list; how many failed, unknown names included.
pub fn run(names: &str) -> u32 {
    let mut failed = 0;
    for name in names.split(',') {
        line!("BEGIN {name}");
        let outcome = match TESTS.iter().find(|t| t.0 == name) {
            Some((_, test)) => test(),
            None => Err(Reason("no such test", 0, 0)),
        };
        match outcome {
            Ok(()) => line!("OK {name}"),
            Err(Reason(why, got, wanted)) => {
                failed += 1;
                line!("FAIL {name} {why}: got {got:#x}, wanted {wanted:#x}");
            }
        }
    }
    failed
}
