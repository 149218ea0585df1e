//! Serving a request allocates nothing.
#![allow(clippy::unwrap_used)]

#[path = "../../block_util/tests/common/allocations.rs"]
mod allocations;

use std::sync::Arc;

use vm_virtio::feature::RING_FEATURES;
use vm_virtio::testing::{Descriptor, DriverQueue, TestInterrupt, memory};
use vm_virtio::{DeviceQueue, Next, Outcome, VirtioInterrupt};
use vmm_sys_util::eventfd::EventFd;

use allocations::ALLOCATIONS;

#[test]
fn serving_allocates_nothing() {
    let memory = memory();
    let mut driver = DriverQueue::new(&memory, 0x1000, 64, true);
    let kick = Arc::new(EventFd::new(0).unwrap());
    let mut device =
        DeviceQueue::new(0, 64, &driver.state(), RING_FEATURES, &*memory, kick).unwrap();
    let interrupt = TestInterrupt::default();
    interrupt.queue(0);
    let buffers = [
        Descriptor::readable(0x10_0000, 16),
        Descriptor::readable(0x10_1000, 4096),
        Descriptor::writable(0x10_2000, 4096),
        Descriptor::writable(0x10_3000, 1),
    ];
    let mut served = 0;
    let mut allocations = Vec::new();
    for round in 0..100 {
        for place in 0..8 {
            if (round + place) % 2 == 0 {
                driver.add(&buffers).unwrap();
            } else {
                driver
                    .add_indirect(0x20_0000 + 64 * place, &buffers)
                    .unwrap();
            }
        }
        let before = ALLOCATIONS.get();
        let next = device.serve(&*memory, &interrupt, |chain| {
            let mut reader = chain.reader(&*memory);
            let header: [u64; 2] = reader.read_obj()?;
            let mut bytes = 0;
            reader.slices(4096, |slice| {
                bytes += slice.len();
                Ok(())
            })?;
            let mut writer = chain.writer(&*memory);
            writer.slices(4096, |slice| {
                bytes += slice.len();
                Ok(())
            })?;
            writer.write_obj(0_u8)?;
            assert_eq!((header, bytes), ([0; 2], 8192));
            served += 1;
            Ok(Outcome::Used(4097))
        });
        allocations.push(ALLOCATIONS.get() - before);
        assert_eq!(next.unwrap(), Next::Wait);
        while driver.take_used().is_some() {}
    }
    assert_eq!(served, 800);
    // The list of buffers grows once.
    assert!(allocations[0] > 0, "nothing is counted");
    assert!(allocations[1..].iter().all(|count| *count == 0));
}
