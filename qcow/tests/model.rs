//! Random operations against a flat array of bytes, by one thread and by several.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Random, assert_same};
use qcow::{CreateOptions, Image, MemStorage, OpenOptions, Shrink};

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.len() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Opens, operates, closes, checks; many times over.
fn random_life(options: &CreateOptions, seed: u64, snapshots: bool) {
    let memory = Arc::new(MemStorage::default());
    Image::create_storage(Box::new(Arc::clone(&memory)), options)
        .unwrap()
        .close()
        .unwrap();
    let mut random = Random::new(seed);
    let mut model = Vec::new();
    let mut saved: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut names = 0;
    for round in 0..4 {
        let open = OpenOptions::new()
            .write(true)
            .l2_cache(if round % 2 == 0 { 0 } else { 1 << 20 })
            .refcount_cache(0)
            .unpacked_cache(if round % 2 == 0 { 1 } else { 1 << 20 });
        let image = Image::open_storage(Box::new(Arc::clone(&memory)), &open).unwrap();
        model.resize(image.len() as usize, 0);
        for _ in 0..60 {
            let size = image.len();
            let (offset, length) = random.range(size, 60_000);
            let range = offset as usize..(offset + length) as usize;
            match random.below(20) {
                0..=2 => {
                    image.discard(offset, length).unwrap();
                    model[range].fill(0);
                }
                3 | 4 => {
                    image.write_zeroes(offset, length).unwrap();
                    model[range].fill(0);
                }
                5 | 6 => {
                    let c = image.cluster_size();
                    let (first, end) = (
                        offset / c * c,
                        ((offset + length).div_ceil(c) * c).min(size),
                    );
                    let bytes = random.bytes((end - first) as usize);
                    image.write_compressed_at(&bytes, first).unwrap();
                    model[first as usize..end as usize].copy_from_slice(&bytes);
                }
                7 => image.flush().unwrap(),
                8 if snapshots && saved.len() < 3 => {
                    names += 1;
                    let name = format!("n{names}");
                    image.create_snapshot(&name).unwrap();
                    saved.insert(name, model.clone());
                }
                9 if snapshots && !saved.is_empty() => {
                    let name = saved
                        .keys()
                        .nth(random.below(saved.len() as u64) as usize)
                        .unwrap()
                        .clone();
                    if random.below(2) == 0 {
                        image.apply_snapshot(&name).unwrap();
                        model.clone_from(&saved[&name]);
                    } else {
                        image.delete_snapshot(&name).unwrap();
                        saved.remove(&name);
                    }
                }
                10 => {
                    let size = 200_000 + random.below(400_000);
                    image.resize(size, Shrink::Discard).unwrap();
                    model.resize(size as usize, 0);
                }
                11 | 12 => {
                    let mut part = vec![0; length as usize];
                    image.read_at(&mut part, offset).unwrap();
                    assert_same(&part, &model[range], "a part");
                }
                _ => {
                    let bytes = random.bytes(length as usize);
                    image.write_at(&bytes, offset).unwrap();
                    model[range].copy_from_slice(&bytes);
                }
            }
        }
        let what = format!("seed {seed}, round {round}, {options:?}");
        assert_same(&read_all(&image), &model, &what);
        let report = image.check().unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{what}: {:?}",
            report.findings.first()
        );
        image.close().unwrap();
        for (name, content) in &saved {
            let view = OpenOptions::new().snapshot(name);
            let view = Image::open_storage(Box::new(Arc::clone(&memory)), &view).unwrap();
            assert_same(
                &read_all(&view),
                content,
                &format!("{what}, snapshot {name}"),
            );
        }
    }
}

#[test]
fn random_operations_match_a_flat_array() {
    let o = CreateOptions::new(500_000);
    let cases = [
        (o.clone(), true),
        (o.clone().cluster_size(512), true),
        (o.clone().cluster_size(512).version(2), true),
        (o.clone().cluster_size(4096).refcount_bits(4), true),
        (o.clone().cluster_size(1024).refcount_bits(1), false),
        (o.clone().cluster_size(16384).extended_l2(true), true),
        (
            o.clone()
                .cluster_size(32768)
                .extended_l2(true)
                .refcount_bits(64),
            true,
        ),
        (o.clone().cluster_size(2048).lazy_refcounts(true), true),
        (
            o.cluster_size(4096).compression(qcow::Compression::Zstd),
            true,
        ),
    ];
    for (i, (options, snapshots)) in cases.iter().enumerate() {
        for seed in 0..6 {
            random_life(options, seed * 64 + i as u64, *snapshots);
        }
    }
}

/// Threads own every `THREADS`th sector, so that they share clusters but no bytes.
const THREADS: u64 = 4;

fn several_threads(options: &CreateOptions, backing: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let size: u64 = 4 << 20;
    let mut base = vec![0u8; size as usize];
    let options = if backing {
        base = Random::new(4).bytes(size as usize);
        std::fs::write(dir.path().join("base"), &base).unwrap();
        options.clone().backing("base", "raw")
    } else {
        options.clone()
    };
    let image = Image::create(&path, &options).unwrap();
    // What the threads share begins as compressed clusters.
    let half = (size / 2) as usize;
    base[..half].copy_from_slice(&Random::new(5).bytes(half));
    image.write_compressed_at(&base[..half], 0).unwrap();
    image.close().unwrap();
    let open = OpenOptions::new()
        .write(true)
        .follow_backing(true)
        .unpacked_cache(1 << 20);
    let image = Image::open(&path, &open).unwrap();
    let cluster = image.cluster_size();
    let done = AtomicBool::new(false);
    let parts: Vec<BTreeMap<u64, u8>> = std::thread::scope(|scope| {
        let (image, base) = (&image, &base);
        let workers: Vec<_> = (0..THREADS)
            .map(|t| {
                scope.spawn(move || {
                    let mut random = Random::new(t + 100);
                    let mut mine = BTreeMap::new();
                    for _ in 0..400 {
                        // Threads crowd in the same clusters.
                        let sector = random.below(size / 512 / THREADS / 8) * THREADS + t;
                        let byte = random.below(4) as u8;
                        if byte == 0 {
                            image.write_zeroes(sector * 512, 512).unwrap();
                        } else {
                            image.write_at(&[byte; 512], sector * 512).unwrap();
                        }
                        mine.insert(sector, byte);
                        let mut back = [0xee; 512];
                        image.read_at(&mut back, sector * 512).unwrap();
                        assert_eq!(back, [byte; 512], "thread {t} reads what it wrote");
                        let sector = random.below(size / 512 / THREADS / 8) * THREADS + t;
                        if !mine.contains_key(&sector) {
                            let at = sector as usize * 512;
                            image.read_at(&mut back, sector * 512).unwrap();
                            assert_same(&back, &base[at..at + 512], "not written");
                        }
                    }
                    mine
                })
            })
            .collect();
        // Meanwhile: flushes, discards of a place of their own, and snapshots.
        let done = &done;
        let flusher = scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                image.flush().unwrap();
            }
        });
        let mut random = Random::new(6);
        let discarder = scope.spawn(move || {
            let half = size / 2;
            let noise: Vec<u8> = (0..32768).map(|_| random.next() as u8).collect();
            let mut i = 0u64;
            while !done.load(Ordering::Relaxed) {
                let at = half + (i * 65536) % half;
                image.write_at(&[0x5a; 4096], at).unwrap();
                image.discard(at / 65536 * 65536, 65536).unwrap();
                // Other data of the same length, which gets to where that of an earlier turn was.
                let byte = (i % 251 + 1) as u8;
                let mut data = vec![byte; cluster as usize];
                let (_, end) = data.split_at_mut(cluster as usize * 3 / 4);
                end.copy_from_slice(&noise[..end.len()]);
                image.write_compressed_at(&data, at).unwrap();
                for part in [0, 128, 256] {
                    let mut back = [0xee; 100];
                    image.read_at(&mut back, at + part).unwrap();
                    assert_eq!(back, [byte; 100], "compressed in turn {i}");
                }
                image.discard(at, cluster).unwrap();
                i += 1;
            }
        });
        let snapshots = scope.spawn(move || {
            for i in 0..5 {
                image.create_snapshot(&format!("s{i}")).unwrap();
                if i % 2 == 1 {
                    image.delete_snapshot(&format!("s{i}")).unwrap();
                }
            }
        });
        let parts = workers.into_iter().map(|w| w.join().unwrap()).collect();
        snapshots.join().unwrap();
        done.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
        discarder.join().unwrap();
        parts
    });
    let mut model = base;
    for (sector, byte) in parts.iter().flatten() {
        model[(sector * 512) as usize..(sector * 512 + 512) as usize].fill(*byte);
    }
    let half = model.len() / 2;
    let mut content = vec![0; size as usize];
    image.read_at(&mut content, 0).unwrap();
    assert_same(&content[..half], &model[..half], &format!("{options:?}"));
    let report = image.check().unwrap();
    assert_eq!(
        (report.corruptions, report.leaks),
        (0, 0),
        "{:?}",
        report.findings.first()
    );
    image.close().unwrap();
    assert_eq!(common::qemu_check(&path), common::Verdict::Clean);
    assert_same(
        &common::qemu_read(&path)[..half],
        &model[..half],
        "as QEMU reads it",
    );
}

#[test]
fn several_queues_allocate_at_once() {
    let o = CreateOptions::new(4 << 20);
    several_threads(&o, false);
    several_threads(&o.clone().cluster_size(4096), true);
    several_threads(&o.clone().extended_l2(true), true);
    several_threads(&o.cluster_size(512).refcount_bits(8), false);
}

#[test]
fn discard_races_with_flush() {
    let memory = Arc::new(MemStorage::default());
    let options = CreateOptions::new(4 << 20).cluster_size(4096);
    let image = Image::create_storage(Box::new(Arc::clone(&memory)), &options).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (image, done) = (&image, &done);
        // Each thread writes, discards and writes again in its own quarter; what is freed by one is taken by another.
        let workers: Vec<_> = (0..3u64)
            .map(|t| {
                scope.spawn(move || {
                    let mut random = Random::new(t);
                    let mut model = vec![0u8; 1 << 20];
                    for i in 0..600u64 {
                        let (offset, length) = random.range(1 << 20, 20_000);
                        let range = offset as usize..(offset + length) as usize;
                        if i % 3 == 0 {
                            image.discard((t << 20) + offset, length).unwrap();
                            model[range].fill(0);
                        } else {
                            let bytes = random.bytes(length as usize);
                            image.write_at(&bytes, (t << 20) + offset).unwrap();
                            model[range].copy_from_slice(&bytes);
                        }
                    }
                    model
                })
            })
            .collect();
        let flusher = scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                image.flush().unwrap();
            }
        });
        for (t, worker) in workers.into_iter().enumerate() {
            let model = worker.join().unwrap();
            let mut content = vec![0; 1 << 20];
            image.read_at(&mut content, (t as u64) << 20).unwrap();
            assert_same(&content, &model, &format!("quarter {t}"));
        }
        done.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
    });
    let report = image.check().unwrap();
    assert_eq!(
        (report.corruptions, report.leaks),
        (0, 0),
        "{:?}",
        report.findings.first()
    );
}
