//! Benchmarks of a VMM: each measurement is made by turns with those that it is compared to — a plain host program, another
//! image format, another VMM's binary with the same command line — so that what disturbs the machine disturbs all of them.
//!
//! | where | what |
//! |---|---|
//! | `args` | the command line |
//! | `plan` | which benchmarks there are, and who takes part in each |
//! | `run` | the turns |
//! | `vmm` | a VMM with the bare-metal guest (`test-guest/src/bench/`), and what it says |
//! | `counters` | system calls, exits and processor time of that VMM |
//! | `block`, `net`, `vsock`, `entropy`, `life` | what is measured, in a guest and by a host program |
//! | `stats`, `report`, `progress` | numbers, tables, and how far it is |

mod args;
mod block;
mod clock;
mod counters;
mod entropy;
mod life;
mod net;
#[path = "../../test-guest/src/bench/order.rs"]
mod order;
mod plan;
mod progress;
mod report;
mod run;
mod stats;
mod vmm;
mod vsock;

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};

use args::{Args, Parsed};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let result = match args::parse(&words) {
        Parsed::Run(args) => run(&args),
        Parsed::Print(text) => print(&text),
        Parsed::Wrong(line) => Err(anyhow::anyhow!(line)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "performance-metrics: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{}", text.trim_end()).context("writing to standard output")
}

fn run(args: &Args) -> Result<()> {
    let benchmarks = plan::all(args)?;
    if args.list {
        return print(&plan::names(&benchmarks));
    }
    // Before an hour's work, not after it.
    let json = args.json.as_ref().map(|path| {
        let file = File::create(path).with_context(|| format!("creating {}", path.display()));
        file.map(|file| (path, file))
    });
    let json = json.transpose()?;
    let report = run::all(args, &benchmarks)?;
    if let Some((path, file)) = json {
        serde_json::to_writer_pretty(file, &report)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    print(&report.to_string())
}
