//! Where bytes of the disk are: lookups in tables that are in memory, and allocation of clusters. Nothing here reaches a disk.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use qcow::{CreateOptions, FileStorage, Image, MemStorage};

const SIZE: u64 = 256 << 20;

/// An image all of whose clusters are there, in a file without a name.
fn full(cluster: u64, extended: bool) -> Arc<Image> {
    let storage = FileStorage::new(tempfile::tempfile().unwrap());
    let options = CreateOptions::new(SIZE)
        .cluster_size(cluster)
        .extended_l2(extended);
    let image = Image::create_storage(Box::new(storage), &options).unwrap();
    let data = vec![1; 1 << 20];
    for at in (0..SIZE).step_by(1 << 20) {
        image.write_at(&data, at).unwrap();
    }
    image.flush().unwrap();
    Arc::new(image)
}

/// Offsets of 4 KiB blocks without order.
struct Blocks(u64);

impl Blocks {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % (SIZE / 4096) * 4096
    }
}

fn lookups(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup of 4 KiB");
    for (name, cluster, extended) in [
        ("64 KiB clusters", 65536, false),
        ("64 KiB with subclusters", 65536, true),
        ("4 KiB clusters", 4096, false),
    ] {
        let image = full(cluster, extended);
        let mut pieces = Vec::new();
        let mut blocks = Blocks(88172645463325252);
        group.bench_function(format!("read, {name}"), |b| {
            b.iter(|| {
                let hold = image.hold_read(blocks.next(), 4096, &mut pieces).unwrap();
                black_box((&hold, &pieces));
            });
        });
        group.bench_function(format!("read through a hold, {name}"), |b| {
            let hold = image.hold_read(0, 4096, &mut pieces).unwrap().unwrap();
            b.iter(|| black_box(hold.read(blocks.next(), 4096, &mut pieces).unwrap()));
        });
        group.bench_function(format!("write, {name}"), |b| {
            b.iter(|| {
                let hold = image.hold_write(blocks.next(), 4096, &mut pieces).unwrap();
                black_box((&hold, &pieces));
            });
        });
    }
    group.finish();
}

fn allocation(c: &mut Criterion) {
    let mut group = c.benchmark_group("write of 512 bytes that allocates");
    for (name, cluster) in [("512 byte clusters", 512), ("64 KiB clusters", 65536)] {
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || {
                    let options = CreateOptions::new(64 * cluster).cluster_size(cluster);
                    Image::create_storage(Box::new(MemStorage::default()), &options).unwrap()
                },
                |image| {
                    for i in 0..64 {
                        image.write_at(&[1; 512], i * cluster).unwrap();
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, lookups, allocation);
criterion_main!(benches);
