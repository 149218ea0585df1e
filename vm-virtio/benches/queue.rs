//! The device's side of a split queue: chains of a block request, taken, looked at and used, a batch at a time.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::testing::{Descriptor, DriverQueue, TestInterrupt, memory};
use vm_virtio::{DeviceQueue, Next, Outcome, VirtioInterrupt};
use vmm_sys_util::eventfd::EventFd;

/// Chains of a batch: with four descriptors each, what a queue of 128 holds.
const BATCH: u64 = 32;

fn serve(c: &mut Criterion) {
    let mut group = c.benchmark_group("serve 32 chains of 4 descriptors");
    group.throughput(Throughput::Elements(BATCH));
    for indirect in [false, true] {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1000, 128, true);
        let kick = Arc::new(EventFd::new(0).unwrap());
        let mut device =
            DeviceQueue::new(0, 128, &driver.state(), RING_FEATURES, &*memory, kick).unwrap();
        let interrupt = TestInterrupt::default();
        interrupt.queue(0);
        let buffers = [
            Descriptor::readable(0x10_0000, 16),
            Descriptor::readable(0x10_1000, 4096),
            Descriptor::writable(0x10_2000, 4096),
            Descriptor::writable(0x10_3000, 1),
        ];
        let name = if indirect { "indirect" } else { "direct" };
        group.bench_function(name, |b| {
            b.iter_batched(
                || {
                    while driver.take_used().is_some() {}
                    for place in 0..BATCH {
                        if indirect {
                            let table = 0x20_0000 + 64 * place;
                            driver.add_indirect(table, &buffers).unwrap();
                        } else {
                            driver.add(&buffers).unwrap();
                        }
                    }
                },
                |()| {
                    let next = device.serve(&*memory, &interrupt, |chain| {
                        let mut reader = chain.reader(&*memory);
                        let header: [u64; 2] = reader.read_obj()?;
                        let mut add = 0;
                        chain.writer(&*memory).slices(4096, |slice| {
                            add += slice.len();
                            Ok(())
                        })?;
                        black_box((header, add));
                        Ok(Outcome::Used(4097))
                    });
                    assert_eq!(next.unwrap(), Next::Wait);
                },
                // One batch is in the ring at a time.
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, serve);
criterion_main!(benches);
