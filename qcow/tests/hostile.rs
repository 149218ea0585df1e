//! Images that were made to do harm: whatever their bytes say, there is no panic, no endless loop and no memory without bound.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::Random;
use qcow::{CreateOptions, Image, MemStorage, OpenOptions, Repair, Shrink, Storage, check_storage};

/// Memory that refuses to become large, and counts what is read.
#[derive(Debug)]
struct Bounded {
    memory: MemStorage,
    read: AtomicU64,
}

const LIMIT: u64 = 16 << 20;

impl Storage for Bounded {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let all = self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        assert!(
            all < 4 << 30,
            "an image of some 100 KiB makes us read gigabytes"
        );
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset.saturating_add(buf.len() as u64) > LIMIT {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.memory.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > LIMIT {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.memory.set_len(len)
    }
}

fn bounded(bytes: &[u8]) -> Arc<Bounded> {
    Arc::new(Bounded {
        memory: MemStorage::new(bytes.to_vec()),
        read: AtomicU64::new(0),
    })
}

/// Does everything that can be done to an image; errors are fine.
fn exercise(bytes: &[u8]) {
    let _ = check_storage(Box::new(bounded(bytes)), Repair::Nothing);
    let _ = check_storage(Box::new(bounded(bytes)), Repair::Leaks);
    let _ = check_storage(Box::new(bounded(bytes)), Repair::All);
    if let Ok(image) = Image::open_storage(Box::new(bounded(bytes)), &OpenOptions::new()) {
        look(&image);
    }
    if let Ok(image) =
        Image::open_storage(Box::new(bounded(bytes)), &OpenOptions::new().snapshot("s"))
    {
        look(&image);
    }
    if let Ok(image) =
        Image::open_storage(Box::new(bounded(bytes)), &OpenOptions::new().write(true))
    {
        let size = image.len();
        for at in [0, 5000, size / 2, size.saturating_sub(600)] {
            let _ = image.write_at(&[1; 600], at);
            let _ = image.discard(at, 70_000.min(size.saturating_sub(at)));
            let _ = image.write_zeroes(at, 300);
            let _ = image.flush();
        }
        let _ = image.write_compressed_at(&vec![3; image.cluster_size() as usize], 0);
        let _ = image.create_snapshot("t");
        let _ = image.apply_snapshot("s");
        let _ = image.delete_snapshot("s");
        let _ = image.resize(size.saturating_add(100_000), Shrink::IfFree);
        let _ = image.resize(1000, Shrink::Discard);
        look(&image);
        let _ = image.close();
    }
}

fn look(image: &Image) {
    let size = image.len();
    let mut buf = vec![0; 100_000];
    for at in [0, size / 3, size.saturating_sub(100_000)] {
        let n = (size.saturating_sub(at)).min(buf.len() as u64) as usize;
        let _ = image.read_at(&mut buf[..n], at);
    }
    let mut extents = 0u64;
    let _ = image.map(0, size.min(64 << 20), |_| {
        extents += 1;
        Ok(())
    });
    let _ = image.info();
    let _ = image.check();
}

/// Where tables start, and how long they are.
type Places = Vec<(usize, usize)>;

/// Images with a bit of everything, small, with the places of their tables.
fn seeds() -> Vec<(Vec<u8>, Places)> {
    let o = CreateOptions::new(300_000);
    let all = [
        o.clone().cluster_size(512),
        o.clone().cluster_size(4096),
        o.clone().cluster_size(1024).version(2),
        o.clone().cluster_size(16384).extended_l2(true),
        o.clone()
            .cluster_size(512)
            .refcount_bits(64)
            .lazy_refcounts(true),
        o.cluster_size(4096)
            .refcount_bits(4)
            .compression(qcow::Compression::Zstd),
    ];
    let mut seeds = Vec::new();
    for options in all {
        let memory = Arc::new(MemStorage::default());
        let image = Image::create_storage(Box::new(Arc::clone(&memory)), &options).unwrap();
        let mut random = Random::new(5);
        image.write_at(&random.bytes(40_000), 1000).unwrap();
        let size = image.cluster_size();
        image
            .write_compressed_at(&random.bytes(size as usize * 2), 131_072)
            .unwrap();
        image.write_zeroes(200_000, 40_000).unwrap();
        image.create_snapshot("s").unwrap();
        image.write_at(&random.bytes(10_000), 20_000).unwrap();
        let h = image.header();
        image.close().unwrap();
        let bytes = memory.to_vec();
        let word = |at: usize| {
            u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
        };
        let cluster = 1usize << h.cluster_bits;
        let mut places = vec![(0, 112), (0, 112)];
        places.push((h.l1_offset as usize, h.l1_size as usize * 8));
        places.push((h.snapshots_offset as usize, 80));
        places.push((h.refcount_table_offset as usize, 32));
        places.push((
            word(h.refcount_table_offset as usize) as usize,
            cluster.min(512),
        ));
        for i in 0..h.l1_size as usize {
            let l2 = word(h.l1_offset as usize + i * 8) as usize;
            if l2 != 0 {
                places.push((l2, cluster.min(1024)));
            }
        }
        seeds.push((bytes, places));
    }
    seeds
}

#[test]
fn mutated_tables_and_headers() {
    let mut tried = 0;
    for (k, (bytes, places)) in seeds().into_iter().enumerate() {
        exercise(&bytes);
        let mut random = Random::new(k as u64 + 900);
        for _ in 0..250 {
            let mut hostile = bytes.clone();
            for _ in 0..=random.below(3) {
                let (start, length) = places[random.below(places.len() as u64) as usize];
                let at = start + random.below(length as u64) as usize;
                let cluster = random.below(bytes.len() as u64) / 512 * 512;
                let value: u64 = match random.below(7) {
                    0 => random.next(),
                    1 => u64::MAX,
                    2 => cluster,
                    3 => cluster | 1 << 63,
                    4 => 1 << 62 | random.next() >> 2,
                    5 => 1 << random.below(64),
                    _ => 0,
                };
                let width = [1, 2, 4, 8][random.below(4) as usize];
                let at = at / width * width;
                let end = (at + width).min(hostile.len());
                hostile[at..end].copy_from_slice(&value.to_be_bytes()[8 - (end - at)..]);
            }
            exercise(&hostile);
            tried += 1;
        }
        for cut in 0..20 {
            exercise(&bytes[..bytes.len() * cut / 20]);
        }
    }
    assert!(tried >= 1500);
}

#[test]
fn a_huge_disk_of_nothing_costs_nothing() {
    let memory = Arc::new(MemStorage::default());
    let options = CreateOptions::new(1 << 50).cluster_size(2 << 20);
    let image = Image::create_storage(Box::new(Arc::clone(&memory)), &options).unwrap();
    image.discard(0, 1 << 50).unwrap();
    image.write_zeroes(12345, (1 << 50) - 12345).unwrap();
    let mut extents = 0;
    image
        .map(0, 1 << 50, |_| {
            extents += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(extents, 1);
    image.write_at(b"far", (1 << 50) - 3).unwrap();
    assert!(image.check().unwrap().corruptions == 0);
    assert!(memory.len().unwrap() < 64 << 20);
}

#[test]
fn one_table_that_all_l1_entries_share_is_walked_once() {
    let memory = Arc::new(MemStorage::default());
    let options = CreateOptions::new(64 << 30).cluster_size(65536);
    let image = Image::create_storage(Box::new(Arc::clone(&memory)), &options).unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    let h = image.header();
    image.close().unwrap();
    let mut bytes = memory.to_vec();
    let at = h.l1_offset as usize;
    let entry = bytes[at..at + 8].to_vec();
    for i in 0..h.l1_size as usize {
        bytes[at + i * 8..at + i * 8 + 8].copy_from_slice(&entry);
    }
    let storage = bounded(&bytes);
    let report = check_storage(Box::new(Arc::clone(&storage)), Repair::Nothing).unwrap();
    assert!(report.corruptions > 0);
    assert!(storage.read.load(Ordering::Relaxed) < 32 << 20);
}
