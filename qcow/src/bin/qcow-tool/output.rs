//! What is printed.

use std::io::{IsTerminal, Write};

use qcow::{CheckReport, Extent, ExtentKind, ImageInfo, Snapshot};
use serde_json::{Value, json};

use crate::args::{Bench, Output};
use crate::bench::Measured;

fn text(bytes: &Option<Vec<u8>>) -> Option<String> {
    bytes
        .as_ref()
        .map(|b| String::from_utf8_lossy(b).into_owned())
}

/// The snapshots as JSON.
pub fn snapshots(list: &[Snapshot]) -> Vec<Value> {
    list.iter()
        .map(|s| {
            json!({
                "id": s.id, "name": s.name, "taken-seconds": s.taken.as_secs(), "disk-size": s.disk_size,
                "vm-state-size": s.vm_state_size,
            })
        })
        .collect()
}

/// The snapshots as lines.
pub fn snapshot_lines(list: &[Snapshot]) {
    for s in list {
        // Names come from the image, and may hold anything.
        println!(
            "{}\t{}\t{} bytes\ttaken {} s after the Epoch",
            s.id.escape_debug(),
            s.name.escape_debug(),
            s.disk_size,
            s.taken.as_secs()
        );
    }
}

/// Describes an image.
pub fn info(info: &ImageInfo, output: Output) {
    let h = &info.header;
    let (backing, data) = (text(&h.backing_name), text(&h.data_name));
    if output == Output::Json {
        let bitmaps: Vec<Value> = info
            .bitmaps
            .iter()
            .map(|b| json!({ "name": b.name, "granularity": b.granularity, "auto": b.auto, "inconsistent": b.inconsistent }))
            .collect();
        println!(
            "{:#}",
            json!({
                "format": "qcow2", "version": h.version, "disk-size": h.size, "file-length": info.file_length,
                "cluster-size": info.cluster_size(), "refcount-bits": info.refcount_bits(),
                "compression": info.compression().to_string(), "extended-l2": h.extended_l2(),
                "lazy-refcounts": h.lazy_refcounts(), "dirty": h.dirty(), "corrupt": h.corrupt(),
                "backing-file": backing, "backing-format": h.backing_format, "data-file": data,
                "raw-data-file": h.raw_data_file(), "snapshots": snapshots(&info.snapshots), "bitmaps": bitmaps,
            })
        );
        return;
    }
    println!(
        "qcow2 version {}, a disk of {} bytes in a file of {}",
        h.version, h.size, info.file_length
    );
    println!(
        "clusters of {} bytes, refcounts of {} bits, {} compression",
        info.cluster_size(),
        info.refcount_bits(),
        info.compression()
    );
    let flags = [
        (h.extended_l2(), "extended L2 entries"),
        (h.lazy_refcounts(), "lazy refcounts"),
        (h.raw_data_file(), "raw data file"),
        (h.dirty(), "DIRTY"),
        (h.corrupt(), "CORRUPT"),
    ];
    for (_, name) in flags.iter().filter(|f| f.0) {
        println!("{name}");
    }
    if let Some(name) = backing {
        let format = h.backing_format.as_deref().unwrap_or("not told");
        println!(
            "backing file {}, format {}",
            name.escape_debug(),
            format.escape_debug()
        );
    }
    if let Some(name) = data {
        println!("data file {}", name.escape_debug());
    }
    snapshot_lines(&info.snapshots);
    for b in &info.bitmaps {
        let state = if b.inconsistent {
            "inconsistent"
        } else {
            "consistent"
        };
        println!(
            "bitmap {}, {} bytes a bit, {state}",
            b.name.escape_debug(),
            b.granularity
        );
    }
}

/// What a check found.
pub fn report(r: &CheckReport, output: Output) {
    if output == Output::Json {
        println!(
            "{:#}",
            json!({
                "corruptions": r.corruptions, "leaks": r.leaks, "corruptions-fixed": r.corruptions_fixed,
                "leaks-fixed": r.leaks_fixed, "allocated-clusters": r.allocated_clusters,
                "compressed-clusters": r.compressed_clusters, "total-clusters": r.total_clusters,
                "image-end": r.image_end, "dirty": r.dirty, "marked-corrupt": r.marked_corrupt, "findings": r.findings,
            })
        );
        return;
    }
    for finding in &r.findings {
        println!("{finding}");
    }
    println!(
        "{} of {} clusters in use, {} of them compressed",
        r.allocated_clusters, r.total_clusters, r.compressed_clusters
    );
    if r.corruptions_fixed + r.leaks_fixed > 0 {
        println!(
            "repaired: {} corruptions, {} leaks",
            r.corruptions_fixed, r.leaks_fixed
        );
    }
    match (r.corruptions, r.leaks) {
        (0, 0) => println!("no errors"),
        (c, l) => println!("{c} corruptions, {l} leaks"),
    }
}

/// What a benchmark measured.
pub fn bench(a: &Bench, m: &Measured) {
    let operation = if a.write { "write" } else { "read" };
    let pattern = if a.random { "random" } else { "sequential" };
    let rate = m.requests_a_second();
    let bytes = rate * m.block as f64;
    let [middle, most, worst] = [50, 99, 100].map(|p| m.latency(p).as_secs_f64() * 1e6);
    if a.output == Output::Json {
        println!(
            "{:#}",
            json!({
                "operation": operation, "pattern": pattern, "block-size": m.block, "depth": a.depth, "requests": m.requests,
                "seconds": m.elapsed.as_secs_f64(), "requests-per-second": rate, "bytes-per-second": bytes,
                "latency-us": { "median": middle, "99": most, "max": worst },
            })
        );
        return;
    }
    println!(
        "{} {pattern} {operation}s of {} bytes, {} in flight: {:.3} s",
        m.requests,
        m.block,
        a.depth,
        m.elapsed.as_secs_f64()
    );
    println!(
        "{rate:.0} a second, {:.1} MiB/s",
        bytes / f64::from(1 << 20)
    );
    println!("latency: median {middle:.1} us, 99 % {most:.1} us, longest {worst:.1} us");
}

/// Extents as they come.
pub struct Extents {
    output: Output,
    any: bool,
}

impl Extents {
    pub fn new(output: Output) -> Self {
        match output {
            Output::Json => print!("["),
            Output::Text => println!("{:>16} {:>16}  depth  what", "start", "length"),
        }
        Extents { output, any: false }
    }

    pub fn show(&mut self, e: &Extent) {
        let (kind, at) = match e.kind {
            ExtentKind::Data(at) => ("data", Some(at)),
            ExtentKind::Compressed => ("compressed", None),
            ExtentKind::Zero => ("zero", None),
            ExtentKind::Unallocated => ("unallocated", None),
        };
        match self.output {
            Output::Json => {
                let comma = if self.any { "," } else { "" };
                let line = json!({ "start": e.start, "length": e.length, "depth": e.depth, "kind": kind, "offset": at });
                print!("{comma}\n{line}");
            }
            Output::Text => {
                let at = at.map(|a| format!(" at {a:#x}")).unwrap_or_default();
                println!(
                    "{:>#16x} {:>#16x}  {:>5}  {kind}{at}",
                    e.start, e.length, e.depth
                );
            }
        }
        self.any = true;
    }

    pub fn finish(self) {
        if self.output == Output::Json {
            println!("\n]");
        }
    }
}

/// How far it is, on a terminal only.
pub struct Bar {
    terminal: bool,
    last: Option<u64>,
}

/// Characters of a full bar.
const WIDTH: u64 = 40;

impl Bar {
    pub fn new() -> Self {
        Bar {
            terminal: std::io::stderr().is_terminal(),
            last: None,
        }
    }

    /// Whether there is someone to see it.
    pub fn is_shown(&self) -> bool {
        self.terminal
    }

    pub fn show(&mut self, done: u64, all: u64) {
        let percent = (u128::from(done) * 100)
            .checked_div(u128::from(all))
            .unwrap_or(100) as u64;
        if !self.terminal || self.last == Some(percent) {
            return;
        }
        self.last = Some(percent);
        let full = (percent * WIDTH / 100) as usize;
        eprint!(
            "\r[{}{}] {percent:>3} %",
            "#".repeat(full),
            " ".repeat(WIDTH as usize - full)
        );
        if percent == 100 {
            eprintln!();
        }
        let _ = std::io::stderr().flush();
    }
}
