//! The turns: in each, all who take part in a benchmark are measured one after the other.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::args::Args;
use crate::block::Images;
use crate::clock::{self, Agreement};
use crate::counters::Plain;
use crate::life;
use crate::net::{Isolated, isolate};
use crate::plan::{Benchmark, Entrant, Program, Work};
use crate::progress::Progress;
use crate::report::{Costs, Report, Row};
use crate::stats::Summary;
use crate::vmm::Measured;
use crate::{entropy, vsock};

/// A figure, and what it cost.
struct Sample {
    value: f64,
    costs: Option<Costs>,
    clocks: Agreement,
}

impl Sample {
    /// Of no operations.
    fn of(value: f64) -> Self {
        Self {
            value,
            costs: None,
            clocks: Agreement::default(),
        }
    }

    /// Of a host program.
    fn plain(plain: Plain) -> Self {
        let costs = Costs {
            cpu_us: Some(plain.cpu_us),
            ..Costs::default()
        };
        Self {
            costs: Some(costs),
            ..Self::of(plain.value)
        }
    }

    /// Of a guest that did `operations`, whatever they are.
    fn guest(value: f64, operations: u64, measured: &Measured) -> Self {
        let each = |count: u64| count as f64 / operations.max(1) as f64;
        let costs = Costs {
            kicks: Some(each(measured.kicks)),
            syscalls: measured.traced.syscalls.map(each),
            exits: measured.traced.exits.map(each),
            cpu_us: Some(each(measured.cpu) / 1e3),
        };
        Self {
            value,
            costs: Some(costs),
            clocks: measured.clocks,
        }
    }
}

/// Where everything is.
struct Runner<'a> {
    args: &'a Args,
    guest: PathBuf,
    images: Images,
    isolated: Option<Isolated>,
    time: Duration,
}

/// Runs them all. What another VMM cannot do is a note in its row.
///
/// # Errors
/// What the VMM that is measured, or a host program, cannot do.
pub fn all(args: &Args, benchmarks: &[Benchmark]) -> Result<Report> {
    let needs_network = |b: &Benchmark| b.entrants.iter().any(|e| matches!(e.work, Work::Net(_)));
    let network = benchmarks.iter().any(needs_network);
    let runner = Runner {
        args,
        guest: args.guest()?,
        images: Images::new(args.dir.as_deref())?,
        isolated: network.then(isolate).transpose()?,
        time: Duration::from_millis(u64::from(args.time)),
    };
    let frequency = clock::frequency();
    // One turn more than those that are timed counts what they cost.
    let steps = benchmarks.iter().map(|b| b.entrants.len()).sum::<usize>();
    let mut progress = Progress::new(steps * (args.runs as usize + 1));
    let mut report = Report::new(args, frequency);
    for benchmark in benchmarks {
        let rows = runner.benchmark(benchmark, &mut progress);
        report.add(benchmark, rows.with_context(|| benchmark.name.clone())?);
    }
    Ok(report)
}

impl Runner<'_> {
    fn benchmark(&self, benchmark: &Benchmark, progress: &mut Progress) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = benchmark.entrants.iter().map(Row::new).collect();
        let mut clocks = Agreement::default();
        // The first turn also warms everything up: images are made, files are in the page cache.
        for turn in 0..=self.args.runs {
            for (entrant, row) in benchmark.entrants.iter().zip(&mut rows) {
                progress.step(&format!(
                    "{} {} turn {turn}",
                    benchmark.full_name(entrant),
                    entrant.program.name()
                ));
                if row.note.is_some() {
                    continue;
                }
                let sample = self.measure(entrant, turn == 0);
                if let Ok(sample) = &sample {
                    clocks.add(sample.clocks);
                }
                match sample {
                    Ok(sample) if turn == 0 => row.costs = sample.costs,
                    Ok(sample) => row.add(sample.value, sample.costs.and_then(|c| c.cpu_us)),
                    Err(error) if entrant.program == Program::Other => {
                        row.note = Some(format!("{error:#}"));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        clocks.check()?;
        for row in &mut rows {
            if let Some(costs) = &mut row.costs {
                // Of the turns that nobody traced.
                costs.cpu_us = Summary::of(&row.cpu).map(|cpu| cpu.median);
            }
        }
        Ok(rows)
    }

    fn binary(&self, program: Program) -> Result<&Path> {
        let path = match program {
            Program::Host => None,
            Program::Vmm => self.args.vmm.as_deref(),
            Program::Other => self.args.other.as_deref(),
        };
        path.context("no binary for this")
    }

    fn measure(&self, entrant: &Entrant, tracing: bool) -> Result<Sample> {
        let (program, time) = (entrant.program, self.time);
        if program == Program::Host {
            return match entrant.work {
                Work::Block(job) => job.on_host(&self.images, time).map(Sample::plain),
                Work::Net(job) => {
                    let isolated = self.isolated.context("no network namespace")?;
                    job.on_host(isolated, time).map(Sample::plain)
                }
                Work::Vsock(way) => way.on_host(time).map(Sample::plain),
                Work::Entropy => entropy::on_host(time).map(Sample::plain),
                _ => anyhow::bail!("no host program does this"),
            };
        }
        let (binary, guest) = (self.binary(program)?, &*self.guest);
        match entrant.work {
            Work::Block(job) => {
                let owner = program.name();
                let got = job.in_guest(binary, guest, &self.images, owner, time, tracing)?;
                Ok(Sample::guest(got.rate(), got.operations, &got))
            }
            Work::Net(job) => {
                let isolated = self.isolated.context("no network namespace")?;
                let (value, got) = job.in_guest(isolated, binary, guest, time, tracing)?;
                Ok(Sample::guest(value, got.operations, &got))
            }
            // The guest counts bytes; what they cost is told by the request.
            Work::Vsock(way) => {
                let got = way.in_guest(binary, guest, time, tracing)?;
                let chunks = got.operations / vsock::CHUNK as u64;
                Ok(Sample::guest(got.rate(), chunks, &got))
            }
            Work::Entropy => {
                let got = entropy::in_guest(binary, guest, time, tracing)?;
                let requests = got.operations / entropy::REQUEST as u64;
                Ok(Sample::guest(got.rate(), requests, &got))
            }
            Work::FirstByte => life::first_byte(binary, guest).map(Sample::of),
            Work::Resident => life::resident(binary, guest).map(Sample::of),
            Work::Size => life::size(binary).map(Sample::of),
        }
    }
}
