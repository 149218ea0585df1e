//! Benchmarks: they keep a device busy from CPL 3, where code is native, without interrupts, as a fast driver would.
//! `performance-metrics` starts them and turns their counts into rates.
//!
//! Words on the command line: `ticks=N` ends a measurement after so many ticks of the TSC, `count=N` after so many operations,
//! whichever is first; `settle=N` is how many ticks of rest come before and after it. Others are told in each file.
//! Lines: `VALUE bench_begin TSC`, `VALUE bench_end TSC`, `VALUE bench operations=N ticks=N kicks=N`.

pub mod blk;
pub mod net;
mod order;
pub mod rng;
pub mod vsock;

use core::hint::spin_loop;

use crate::cpu::rdtsc;
use crate::outcome::{Outcome, ensure};
use crate::{line, number};

/// What a measurement counted.
pub struct Count {
    /// Operations that ended in it.
    pub operations: u64,
    /// Ticks of the TSC from its begin to the end of the last of them.
    pub ticks: u64,
    /// How often the device was notified.
    pub kicks: u64,
}

/// When a measurement ends.
#[derive(Clone, Copy)]
pub struct Limit {
    /// Operations.
    pub count: u64,
    /// Ticks of the TSC.
    pub ticks: u64,
}

impl Limit {
    /// As the command line says.
    pub fn here() -> Self {
        Self {
            count: number("count").unwrap_or(u64::MAX),
            ticks: number("ticks").unwrap_or(u64::MAX),
        }
    }

    /// True when a measurement that has so much behind it is to end: not before its first operation.
    pub fn reached(&self, operations: u64, ticks: u64) -> bool {
        operations >= self.count || (operations > 0 && ticks >= self.ticks)
    }
}

fn settle() {
    let (start, wait) = (rdtsc(), number("settle").unwrap_or(0));
    while rdtsc().wrapping_sub(start) < wait {
        spin_loop();
    }
}

/// Runs a measurement between its lines, with a rest on both sides: what the lines cost is not part of it.
pub fn measure(body: impl FnOnce(Limit) -> Outcome<Count>) -> Outcome {
    line!("VALUE bench_begin {}", rdtsc());
    settle();
    let count = body(Limit::here())?;
    settle();
    line!("VALUE bench_end {}", rdtsc());
    ensure("something was measured", count.operations > 0)?;
    line!(
        "VALUE bench operations={} ticks={} kicks={}",
        count.operations,
        count.ticks,
        count.kicks
    );
    Ok(())
}
