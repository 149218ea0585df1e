//! The results: as tables for a person, and as JSON.

use std::fmt;

use serde::Serialize;

use crate::args::Args;
use crate::plan::{BASE, Benchmark, Entrant, Program};
use crate::stats::{Summary, ratios};

/// What an operation cost, on average.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Costs {
    /// Notifications by the guest.
    pub kicks: Option<f64>,
    /// System calls of all of the VMM's threads; none where the host doesn't count them.
    pub syscalls: Option<f64>,
    /// Exits of the vCPU to the VMM, likewise.
    pub exits: Option<f64>,
    /// Microseconds of processor time of all threads but the vCPU, in the turns that nobody traced.
    pub cpu_us: Option<f64>,
}

/// Ratios to others, turn by turn.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Ratios {
    /// To the host program.
    pub host: Option<Summary>,
    /// To the same VMM's raw disk.
    pub raw: Option<Summary>,
    /// To the other VMM.
    pub other: Option<Summary>,
    /// Of the processor time of an operation to the other VMM's, which hardly depends on what else runs.
    pub other_cpu: Option<Summary>,
}

/// The results of one who takes part.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    variant: &'static str,
    program: Program,
    /// A figure a turn.
    samples: Vec<Option<f64>>,
    summary: Option<Summary>,
    ratios: Ratios,
    /// Where there are operations.
    pub costs: Option<Costs>,
    /// Why there are no figures.
    pub note: Option<String>,
    /// Microseconds of processor time an operation, a turn each.
    #[serde(skip)]
    pub cpu: Vec<f64>,
}

impl Row {
    /// Without figures yet.
    pub fn new(entrant: &Entrant) -> Self {
        Self {
            variant: entrant.variant,
            program: entrant.program,
            samples: Vec::new(),
            summary: None,
            ratios: Ratios::default(),
            costs: None,
            note: None,
            cpu: Vec::new(),
        }
    }

    /// The figure of a turn, and the processor time an operation.
    pub fn add(&mut self, value: f64, cpu: Option<f64>) {
        self.samples.push(Some(value));
        self.cpu.extend(cpu);
    }
}

/// A benchmark's results.
#[derive(Clone, Debug, Serialize)]
struct Table {
    name: String,
    unit: &'static str,
    more_is_better: bool,
    rows: Vec<Row>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    vmm: Option<String>,
    other: Option<String>,
    processors: usize,
    tsc_hz: f64,
    turns: u32,
    milliseconds: u32,
    direct: bool,
    benchmarks: Vec<Table>,
}

impl Report {
    /// Without results yet.
    pub fn new(args: &Args, tsc_hz: f64) -> Self {
        let name = |path: &Option<std::path::PathBuf>| {
            path.as_ref()
                .map(|path| path.to_string_lossy().into_owned())
        };
        Self {
            vmm: name(&args.vmm),
            other: name(&args.other),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            tsc_hz,
            turns: args.runs,
            milliseconds: args.time,
            direct: args.direct,
            benchmarks: Vec::new(),
        }
    }

    /// Adds a benchmark's rows.
    pub fn add(&mut self, benchmark: &Benchmark, mut rows: Vec<Row>) {
        let all = rows.clone();
        let find = |variant: &str, program: Program| {
            all.iter()
                .find(|row| row.variant == variant && row.program == program)
        };
        for row in &mut rows {
            let values: Vec<f64> = row.samples.iter().flatten().copied().collect();
            row.summary = Summary::of(&values);
            let to = |base: Option<&Row>| ratios(&row.samples, &base?.samples);
            let other = find(row.variant, Program::Other).filter(|_| row.program == Program::Vmm);
            let times = |row: &Row| row.cpu.iter().copied().map(Some).collect::<Vec<_>>();
            row.ratios = Ratios {
                host: to(find(row.variant, Program::Host).filter(|_| row.program != Program::Host)),
                raw: to(find(BASE, row.program).filter(|_| row.variant != BASE)),
                other: to(other),
                other_cpu: other.and_then(|other| ratios(&times(row), &times(other))),
            };
        }
        self.benchmarks.push(Table {
            name: benchmark.name.clone(),
            unit: benchmark.unit,
            more_is_better: benchmark.more_is_better,
            rows,
        });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} turns of {} ms on {} processors{}. Ratios are of the same turn, in the middle. An operation costs system calls,\nexits to the VMM, microseconds of processor time (all threads but the vCPU; beside it, its ratio to the other VMM), and kicks by the guest.",
            self.turns,
            self.milliseconds,
            self.processors,
            if self.direct { ", O_DIRECT" } else { "" }
        )?;
        for table in &self.benchmarks {
            write!(f, "\n{table}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let better = if self.more_is_better { "more" } else { "less" };
        writeln!(f, "{} ({}, {better} is better)", self.name, self.unit)?;
        writeln!(
            f,
            "  {:<10} {:<5} {:>9} {:>9} {:>7} {:>6} {:>6} {:>6} {:>8} {:>6} {:>8} {:>6} {:>6}",
            "",
            "",
            "least",
            "median",
            "spread",
            "/host",
            "/raw",
            "/other",
            "syscalls",
            "exits",
            "cpu us",
            "/other",
            "kicks"
        )?;
        for row in &self.rows {
            write!(f, "  {:<10} {:<5}", row.variant, row.program.name())?;
            if let Some(note) = &row.note {
                writeln!(f, " {note}")?;
                continue;
            }
            if let Some(summary) = row.summary {
                write!(
                    f,
                    " {:>9} {:>9} {:>6.0}%",
                    figure(summary.least),
                    figure(summary.median),
                    summary.spread() * 100.0
                )?;
            }
            let Ratios {
                host,
                raw,
                other,
                other_cpu,
            } = row.ratios;
            for (ratio, width) in [(host, 6), (raw, 6), (other, 6)] {
                write!(f, " {:>width$}", cell(ratio.map(|r| r.median)))?;
            }
            let costs = row.costs.as_ref();
            for (cost, width) in [
                (costs.and_then(|c| c.syscalls), 8),
                (costs.and_then(|c| c.exits), 6),
                (costs.and_then(|c| c.cpu_us), 8),
                (other_cpu.map(|r| r.median), 6),
                (costs.and_then(|c| c.kicks), 6),
            ] {
                write!(f, " {:>width$}", cell(cost))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

fn cell(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

/// Four digits or so, and k, M or G.
fn figure(value: f64) -> String {
    let (value, letter) = match value {
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e4 => (v / 1e3, "k"),
        v => (v, ""),
    };
    let digits = if value >= 1000.0 {
        0
    } else if value >= 100.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$}{letter}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Parsed, parse};
    use crate::plan;

    fn report() -> Report {
        let words = [
            "--list",
            "--other",
            "/proc/self/exe",
            "--filter",
            "qd32/qcow2",
        ];
        let words = words.map(str::to_owned);
        let Parsed::Run(args) = parse(&words) else {
            panic!("refused");
        };
        let mut benchmarks = plan::all(&args).unwrap();
        benchmarks.truncate(1);
        let mut report = Report::new(&args, 1e9);
        let mut rows: Vec<Row> = benchmarks[0].entrants.iter().map(Row::new).collect();
        for (row, value) in rows.iter_mut().zip([10_000.0, 9000.0, 4500.0, 8100.0]) {
            row.add(value, Some(value / 1e3));
            row.add(value * 2.0, Some(value / 1e3));
        }
        if let Some(row) = rows.last_mut() {
            row.note = Some("--disk: no such key".to_owned());
        }
        report.add(&benchmarks[0], rows);
        report
    }

    #[test]
    fn ratios_go_to_those_that_they_name() {
        let report = report();
        let rows = &report.benchmarks[0].rows;
        let median = |ratio: Option<Summary>| ratio.map(|r| (r.median * 100.0).round());
        let all = |i: usize| {
            let r = rows[i].ratios;
            (median(r.host), median(r.raw), median(r.other))
        };
        // raw: host, vmm, other; qcow2: vmm, other.
        assert_eq!(all(0), (None, None, None));
        assert_eq!(all(1), (Some(90.0), None, Some(200.0)));
        assert_eq!(all(3), (None, Some(90.0), None));
        let cpu = |i: usize| median(rows[i].ratios.other_cpu);
        assert_eq!((cpu(0), cpu(1), cpu(2)), (None, Some(200.0), None));
    }

    #[test]
    fn tables_and_json_hold_it_all() {
        let report = report();
        let text = report.to_string();
        assert!(
            text.contains("block/rand-read-4k-qd32 (requests/s, more is better)"),
            "{text}"
        );
        assert!(text.contains("--disk: no such key"), "{text}");
        let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("  raw ")).collect();
        assert_eq!(lines.len(), 3, "{text}");
        let json = serde_json::to_value(&report).unwrap();
        let row = &json["benchmarks"][0]["rows"][1];
        assert_eq!(row["program"], "vmm");
        assert_eq!(row["samples"][1], 18_000.0);
        assert_eq!(row["ratios"]["host"]["median"], 0.9);
    }

    #[test]
    fn figures_are_short() {
        for (value, text) in [
            (0.5, "0.50"),
            (123.4, "123.4"),
            (9999.0, "9999"),
            (12_345.0, "12.35k"),
            (1.5e6, "1.50M"),
            (2.25e9, "2.25G"),
        ] {
            assert_eq!(figure(value), text);
        }
    }
}
