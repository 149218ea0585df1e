//! Which benchmarks there are, and who takes part in each.

use std::fmt::Write;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::args::Args;
use crate::block::{self, Image, Kind};
use crate::net;
use crate::vsock;

/// Whose figure it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// A plain host program.
    Host,
    /// The VMM that is measured.
    Vmm,
    /// The one that it is compared to.
    Other,
}

impl Program {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Vmm => "vmm",
            Self::Other => "other",
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Requests of a disk.
    Block(block::Job),
    /// Packets.
    Net(net::Job),
    /// Bytes of a stream between guest and host.
    Vsock(vsock::Way),
    /// Bytes of entropy.
    Entropy,
    /// From the start of the process to the first byte that the guest says.
    FirstByte,
    /// Resident memory beside guest RAM.
    Resident,
    /// The binary's size.
    Size,
}

/// One who takes part.
#[derive(Clone, Copy, Debug)]
pub struct Entrant {
    /// What of, such as the image's format; empty where there is only one.
    pub variant: &'static str,
    /// Whose.
    pub program: Program,
    /// What it does.
    pub work: Work,
}

/// A benchmark: what takes turns.
#[derive(Clone, Debug)]
pub struct Benchmark {
    /// Its name, such as `block/rand-read-4k-qd32`.
    pub name: String,
    /// Of the figures.
    pub unit: &'static str,
    /// Whether more of them is better.
    pub more_is_better: bool,
    /// Who takes part.
    pub entrants: Vec<Entrant>,
}

impl Benchmark {
    /// The full name of one who takes part, whoever's it is.
    pub fn full_name(&self, entrant: &Entrant) -> String {
        if entrant.variant.is_empty() {
            self.name.clone()
        } else {
            format!("{}/{}", self.name, entrant.variant)
        }
    }

    fn add(&mut self, args: &Args, variant: &'static str, host: bool, work: Work) {
        let programs = [
            (Program::Host, host),
            (Program::Vmm, true),
            (Program::Other, args.other.is_some()),
        ];
        for (program, _) in programs.into_iter().filter(|p| p.1) {
            self.entrants.push(Entrant {
                variant,
                program,
                work,
            });
        }
    }

    /// Leaves out what no filter names. Where a variant stays, so does that which it is compared to.
    fn keep(&mut self, filters: &[String]) {
        if filters.is_empty() {
            return;
        }
        let wanted = |name: &str| filters.iter().any(|filter| name.contains(filter.as_str()));
        let any = self.entrants.iter().any(|e| wanted(&self.full_name(e)));
        let kept: Vec<Entrant> = self
            .entrants
            .iter()
            .filter(|e| wanted(&self.full_name(e)) || (any && e.variant == BASE))
            .copied()
            .collect();
        self.entrants = kept;
    }
}

/// The variant that others are compared to.
pub const BASE: &str = "raw";

fn benchmark(name: &str, unit: &'static str, more_is_better: bool) -> Benchmark {
    Benchmark {
        name: name.to_owned(),
        unit,
        more_is_better,
        entrants: Vec::new(),
    }
}

/// All that the command line asks for.
///
/// # Errors
/// When that is nothing.
pub fn all(args: &Args) -> Result<Vec<Benchmark>> {
    let mut all = block(args);
    for (name, size) in [("60", 60), ("1514", 1514), ("tso-64k", 64_000)] {
        let mut b = benchmark(&format!("net/tx-{name}"), "packets/s", true);
        b.add(args, "", true, Work::Net(net::Job::Transmit(size)));
        all.push(b);
    }
    for (name, size) in [("60", 60), ("1514", 1514), ("tso-64k", 64_000)] {
        let mut b = benchmark(&format!("net/rx-{name}"), "packets/s", true);
        b.add(args, "", true, Work::Net(net::Job::Receive(size)));
        all.push(b);
    }
    let mut b = benchmark("net/round-trip", "us", false);
    b.add(args, "", true, Work::Net(net::Job::RoundTrip));
    all.push(b);
    for (name, work) in [
        ("vsock/tx", Work::Vsock(vsock::Way::Transmit)),
        ("vsock/rx", Work::Vsock(vsock::Way::Receive)),
        ("rng/read", Work::Entropy),
    ] {
        let mut b = benchmark(name, "bytes/s", true);
        b.add(args, "", true, work);
        all.push(b);
    }
    for (name, unit, more, work) in [
        ("start/first-byte", "ms", false, Work::FirstByte),
        ("memory/resident", "KiB", false, Work::Resident),
        ("size/binary", "KiB", false, Work::Size),
    ] {
        let mut b = benchmark(name, unit, more);
        b.add(args, "", false, work);
        all.push(b);
    }
    for benchmark in &mut all {
        benchmark.keep(&args.filter);
    }
    all.retain(|benchmark| !benchmark.entrants.is_empty());
    if all.is_empty() {
        bail!("--filter: no benchmark is called that (--list tells their names)");
    }
    Ok(all)
}

fn block(args: &Args) -> Vec<Benchmark> {
    let mut all = Vec::new();
    for (name, pattern) in block::PATTERNS {
        let mut b = benchmark(&format!("block/{name}"), "requests/s", true);
        for image in Image::ALL {
            let measured = match (image, pattern.kind) {
                (Image::Raw | Image::Qcow2, _) => true,
                // It is read as a plain image is.
                (Image::Snapshot, kind) => kind == Kind::Write,
                (Image::Compressed, kind) => kind == Kind::Read,
                (Image::Backing, kind) => kind != Kind::Flush,
            };
            if measured {
                let work = Work::Block(block::Job {
                    pattern: *pattern,
                    image,
                    direct: args.direct,
                });
                b.add(args, image.name(), image == Image::Raw, work);
            }
        }
        all.push(b);
    }
    all
}

/// A line for each.
pub fn names(benchmarks: &[Benchmark]) -> String {
    let mut out = String::new();
    for benchmark in benchmarks {
        let vmms = benchmark.entrants.iter();
        for entrant in vmms.filter(|e| e.program == Program::Vmm) {
            let name = benchmark.full_name(entrant);
            // A String takes everything.
            let _ = writeln!(out, "{name:<36} {}", benchmark.unit);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Parsed, parse};

    fn plan(line: &str) -> Result<Vec<Benchmark>> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        match parse(&words) {
            Parsed::Run(args) => all(&args),
            _ => panic!("{line} is refused"),
        }
    }

    #[test]
    fn names_differ_and_every_one_can_be_filtered() {
        let all = plan("--list").unwrap();
        let list = names(&all);
        let names: Vec<&str> = list.lines().filter_map(|l| l.split(' ').next()).collect();
        assert!(names.len() > 40);
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} twice");
            let found = plan(&format!("--list --filter {name}")).unwrap();
            assert!(!found.is_empty(), "{name}");
        }
    }

    #[test]
    fn what_is_compared_to_stays() {
        let found = plan("--list --filter block/rand-read-4k-qd32/qcow2").unwrap();
        let [benchmark] = found.as_slice() else {
            panic!("{} benchmarks", found.len());
        };
        let who: Vec<_> = benchmark
            .entrants
            .iter()
            .map(|e| (e.variant, e.program))
            .collect();
        assert_eq!(
            who,
            [
                ("raw", Program::Host),
                ("raw", Program::Vmm),
                ("qcow2", Program::Vmm)
            ]
        );
    }

    #[test]
    fn another_vmm_does_all_that_ours_does() {
        let found = plan("--list --other /proc/self/exe --filter rng").unwrap();
        let who: Vec<_> = found[0].entrants.iter().map(|e| e.program).collect();
        assert_eq!(who, [Program::Host, Program::Vmm, Program::Other]);
    }

    #[test]
    fn no_such_benchmark() {
        assert!(plan("--list --filter nonsense").is_err());
    }
}
