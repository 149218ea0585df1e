//! How fast the formats are next to each other, without a guest. Not a test: run it by name, in an optimised build.
//!
//! `cargo test --profile ci -p vmm --lib disk::bench -- --ignored --nocapture`; `BENCH=qcow2` does one format alone, for strace,
//! and `BENCH_SYNC=1` does without io_uring.
#![allow(clippy::print_stdout, unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use block_util::{AlignedBuf, DiskFile, DiskIo, Engine, IoBuf, IoOptions, Operation, Request};

use super::open;
use crate::config::{DiskConfig, ImageType};

const SIZE: u64 = 256 << 20;

/// Requests of `block` bytes at random places, `depth` in flight; how many a second.
fn run(disk: &dyn DiskFile, write: bool, block: usize, depth: usize, count: usize) -> f64 {
    let options = IoOptions {
        depth: depth.max(2),
        engine: if std::env::var_os("BENCH_SYNC").is_some() {
            Engine::Sync
        } else {
            Engine::Auto
        },
    };
    let mut io = disk.open_io(&options).unwrap();
    let mut memory = AlignedBuf::new(block * depth, 4096).unwrap();
    let start = memory.as_mut_slice().as_mut_ptr();
    let buffers: Vec<IoBuf> = (0..depth)
        // SAFETY: within `memory`, which is only looked at by the kernel from here on, and outlives `io`.
        .map(|i| unsafe { IoBuf::new(start.add(i * block), block) })
        .collect();
    let mut random = 12345_u64;
    let mut submit = |io: &mut dyn DiskIo, slot: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % (SIZE / block as u64) * block as u64;
        let buffers = &buffers[slot..=slot];
        let operation = if write {
            Operation::Write {
                offset,
                buffers,
                durable: false,
            }
        } else {
            Operation::Read { offset, buffers }
        };
        io.submit(Request {
            operation,
            user_data: slot as u64,
        })
        .unwrap();
    };
    let begin = Instant::now();
    for slot in 0..depth {
        submit(&mut *io, slot);
    }
    let (mut left, mut running) = (count - depth, depth);
    while running > 0 {
        io.kick().unwrap();
        // As the device's worker does it.
        let mut fd = libc::pollfd {
            fd: io.completion_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which lives through the call.
        unsafe { libc::poll(&raw mut fd, 1, -1) };
        while let Some(done) = io.next_completion() {
            done.result.unwrap();
            if left > 0 {
                left -= 1;
                submit(&mut *io, done.user_data as usize);
            } else {
                running -= 1;
            }
        }
    }
    count as f64 / begin.elapsed().as_secs_f64()
}

fn disk(dir: &std::path::Path, kind: ImageType) -> Arc<dyn DiskFile> {
    let path = dir.join(format!("{kind:?}"));
    match kind {
        ImageType::Raw => std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap(),
        ImageType::Qcow2 => qcow::Image::create(&path, &qcow::CreateOptions::new(SIZE))
            .unwrap()
            .close()
            .unwrap(),
    }
    let config = DiskConfig {
        path,
        image_type: Some(kind),
        ..DiskConfig::default()
    };
    let spawn: vm_virtio::Spawn =
        Arc::new(|name, job| std::thread::Builder::new().name(name).spawn(job).map(drop));
    let disk = open(&config, "disk", &spawn).unwrap();
    let mut io = disk.open_io(&IoOptions::default()).unwrap();
    let mut memory = AlignedBuf::new(1 << 20, 4096).unwrap();
    memory.as_mut_slice().fill(1);
    for at in 0..SIZE >> 20 {
        // SAFETY: `memory` is left alone until the request has completed.
        let buffers = [unsafe { memory.io_buf() }];
        let offset = at << 20;
        io.run(Operation::Write {
            offset,
            buffers: &buffers,
            durable: false,
        })
        .unwrap();
    }
    io.run(Operation::Flush).unwrap();
    drop(io);
    // The same pages for all: such as reading makes, whoever wrote them.
    let file = std::fs::File::open(&config.path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: advice on an open file; it touches no memory.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    std::io::copy(&mut &file, &mut std::io::sink()).unwrap();
    disk
}

#[test]
#[ignore = "a benchmark"]
fn raw_and_qcow2() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let only = std::env::var("BENCH").unwrap_or_default();
    let kinds: Vec<_> = [ImageType::Raw, ImageType::Qcow2]
        .into_iter()
        .filter(|k| only.is_empty() || format!("{k:?}").eq_ignore_ascii_case(&only))
        .map(|k| (k, disk(dir.path(), k)))
        .collect();
    for (what, write, block, depth, count) in [
        ("random read 4 KiB QD 1", false, 4096, 1, 40_000),
        ("random read 4 KiB QD 32", false, 4096, 32, 200_000),
        ("random write 4 KiB QD 32", true, 4096, 32, 30_000),
        ("random read 4 KiB QD 128", false, 4096, 128, 200_000),
        ("random read 64 KiB QD 32", false, 65536, 32, 20_000),
    ] {
        // By turns, and the middle of each.
        let mut rates = vec![Vec::new(); kinds.len()];
        for _ in 0..5 {
            for (rate, (_, disk)) in rates.iter_mut().zip(&kinds) {
                rate.push(run(disk.as_ref(), write, block, depth, count));
            }
        }
        let middle: Vec<f64> = rates
            .iter_mut()
            .map(|r| {
                r.sort_by(f64::total_cmp);
                r[r.len() / 2]
            })
            .collect();
        let named: Vec<String> = kinds
            .iter()
            .zip(&middle)
            .map(|((k, _), r)| format!("{k:?} {r:.0}/s"))
            .collect();
        let ratio = match middle[..] {
            [raw, qcow2] => format!(", qcow2 at {:.1} % of raw", 100.0 * qcow2 / raw),
            _ => String::new(),
        };
        println!("{what}: {}{ratio}", named.join(", "));
    }
}
