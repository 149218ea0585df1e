//! Queues against a driver that keeps the rules, and against ones that do not.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::feature::{EVENT_IDX, INDIRECT_DESC, RING_FEATURES, VERSION_1};
use crate::testing::{
    Descriptor, DriverQueue, INDIRECT, MEMORY_SIZE, NEXT, SEAM, TestInterrupt, TestMemory, memory,
};

const BASE: u64 = 0x1000;
const SIZE: u16 = 8;
/// For buffers.
const DATA: u64 = 0x10_0000;

fn kick() -> Arc<EventFd> {
    Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
}

fn device_side(
    memory: &TestMemory,
    state: &QueueV1,
    features: u64,
) -> Result<DeviceQueue, QueueError> {
    DeviceQueue::new(3, 256, state, features, &**memory, kick())
}

fn both(features: u64) -> (TestMemory, DriverQueue, DeviceQueue) {
    let memory = memory();
    let driver = DriverQueue::new(&memory, BASE, SIZE, features & EVENT_IDX != 0);
    let device = device_side(&memory, &driver.state(), features).unwrap();
    (memory, driver, device)
}

fn one(n: u64) -> [Descriptor; 1] {
    [Descriptor::writable(DATA + 16 * n, 16)]
}

/// The fault that popping finds.
fn fault(driver: &mut DriverQueue, device: &mut DeviceQueue, memory: &TestMemory) -> Fault {
    driver.offer(0);
    let error = device.pop(&**memory, &mut Chain::new()).unwrap_err();
    assert_eq!(error.queue, 3);
    error.fault
}

#[test]
fn chains_come_in_order_and_indexes_wrap() {
    for features in [VERSION_1, RING_FEATURES] {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, BASE, SIZE, features & EVENT_IDX != 0);
        driver.start_at(65530);
        let state = QueueV1 {
            next_available: 65530,
            next_used: 65530,
            ..driver.state()
        };
        let mut device = device_side(&memory, &state, features).unwrap();
        let interrupt = TestInterrupt::default();
        for n in 0..20 {
            let heads = [driver.add(&one(n)).unwrap(), driver.add(&one(n)).unwrap()];
            let mut seen = Vec::new();
            let next = device.serve(&*memory, &interrupt, |chain| {
                seen.push(chain.head());
                Ok(Outcome::Used(5))
            });
            assert_eq!(next.unwrap(), Next::Wait);
            assert_eq!(seen, heads);
            for head in heads {
                let used = driver.take_used().unwrap();
                assert_eq!((used.head, used.len), (u32::from(head), 5));
            }
            assert_eq!(driver.take_used(), None);
            assert_eq!(interrupt.queue_count(3), n + 1, "one interrupt for two");
        }
        assert_eq!(device.state().next_available, 65530_u16.wrapping_add(40));
        assert_eq!(device.state().next_used, device.state().next_available);
    }
}

#[test]
fn the_driver_is_interrupted_only_if_it_wants() {
    let (memory, mut driver, mut device) = both(VERSION_1);
    let interrupt = TestInterrupt::default();
    let mut serve = |driver: &mut DriverQueue| {
        driver.add(&one(0)).unwrap();
        let next = device.serve(&*memory, &interrupt, |_| Ok(Outcome::Used(0)));
        assert_eq!(next.unwrap(), Next::Wait);
        interrupt.queue_count(3)
    };
    driver.set_interrupts(false);
    assert_eq!(serve(&mut driver), 0);
    driver.set_interrupts(true);
    assert_eq!(serve(&mut driver), 1);

    let (memory, mut driver, mut device) = both(RING_FEATURES);
    let interrupt = TestInterrupt::default();
    driver.set_used_event(2);
    let counts = [0, 1, 2, 3].map(|n| {
        driver.add(&one(n)).unwrap();
        let next = device.serve(&*memory, &interrupt, |_| Ok(Outcome::Used(0)));
        assert_eq!(next.unwrap(), Next::Wait);
        interrupt.queue_count(3)
    });
    assert_eq!(counts, [0, 0, 1, 1], "past index 2, and once");
}

#[test]
fn an_interrupt_that_is_due_is_not_sent_twice() {
    let (memory, mut driver, mut device) = both(VERSION_1);
    let interrupt = TestInterrupt::default();
    device.signal(&*memory, &interrupt).unwrap();
    assert_eq!(interrupt.queue_count(3), 0, "nothing was used");
    let head = driver.add(&one(0)).unwrap();
    assert!(device.pop(&*memory, &mut Chain::new()).unwrap());
    device.add_used(&*memory, head, 0).unwrap();
    device.signal(&*memory, &interrupt).unwrap();
    device.signal(&*memory, &interrupt).unwrap();
    assert_eq!(interrupt.queue_count(3), 1);
}

#[test]
fn chains_given_back_together_are_seen_together() {
    for features in [VERSION_1, RING_FEATURES] {
        let (memory, mut driver, mut device) = both(features);
        let interrupt = TestInterrupt::default();
        // Eight entries: the third group goes past the end of the ring.
        for n in 0..20 {
            let heads = [0, 1, 2].map(|_| driver.add(&one(0)).unwrap());
            for _ in heads {
                assert!(device.pop(&*memory, &mut Chain::new()).unwrap());
            }
            let before = driver.used_index();
            // All of them are written before the index moves: the last cannot be.
            let error = device.add_used_together(&*memory, &[(heads[0], 1), (SIZE, 2)]);
            assert!(matches!(error.unwrap_err().fault, Fault::Index { .. }));
            assert_eq!(driver.used_index(), before);
            device.add_used_together(&*memory, &[]).unwrap();
            assert_eq!(driver.used_index(), before);

            // The driver waits for the second of them.
            if features & EVENT_IDX != 0 {
                driver.set_used_event(before.wrapping_add(1));
            }
            let used = [(heads[0], 7), (heads[1], 8), (heads[2], 9)];
            device.add_used_together(&*memory, &used).unwrap();
            device.signal(&*memory, &interrupt).unwrap();
            assert_eq!(interrupt.queue_count(3), n + 1);
            for (head, len) in used {
                let used = driver.take_used().unwrap();
                assert_eq!((used.head, used.len), (u32::from(head), len));
            }
            assert_eq!(device.in_flight(), 0);
        }
    }
}

/// The device that looks again before it sleeps: the driver notifies of none of what it sees, and of the next after it slept.
#[test]
fn chains_taken_in_rounds_need_no_notification() {
    for features in [VERSION_1, RING_FEATURES] {
        let (memory, mut driver, mut device) = both(features);
        let interrupt = TestInterrupt::default();
        let take = |device: &mut DeviceQueue, outcome| device.take(&*memory, |_| Ok(outcome));
        driver.add(&one(0)).unwrap();
        assert!(driver.wants_kick(1), "the device sleeps at first");
        for round in 0..5 {
            assert!(device.has_chains(&*memory).unwrap());
            let taken = take(&mut device, Outcome::Used(7));
            assert_eq!(taken.unwrap(), Taken::Some);
            assert_eq!(driver.take_used(), None, "until it is published");
            device.signal(&*memory, &interrupt).unwrap();
            assert_eq!(driver.take_used().map(|used| used.len), Some(7));
            assert_eq!(interrupt.queue_count(3), round + 1);
            assert!(!device.has_chains(&*memory).unwrap());
            driver.add(&one(0)).unwrap();
            assert!(!driver.wants_kick(1), "the device is awake");
        }
        let later = take(&mut device, Outcome::Later);
        assert_eq!((later.unwrap(), device.in_flight()), (Taken::Later, 0));
        // One came before the driver saw that it is to notify: the device is told, and finds it.
        assert!(device.enable_notification(&*memory).unwrap());
        let taken = take(&mut device, Outcome::InFlight);
        assert_eq!((taken.unwrap(), device.in_flight()), (Taken::Some, 1));
        assert!(!device.enable_notification(&*memory).unwrap());
        let taken = take(&mut device, Outcome::InFlight);
        assert_eq!(taken.unwrap(), Taken::Nothing);
        assert!(!device.enable_notification(&*memory).unwrap());
        driver.add(&one(0)).unwrap();
        assert!(driver.wants_kick(1), "the device sleeps");
    }
}

#[test]
fn chains_that_are_staged_are_shown_together() {
    let (memory, mut driver, mut device) = both(VERSION_1);
    let heads = [0, 1, 2].map(|n| driver.add(&one(n)).unwrap());
    let taken = device.take(&*memory, |_| Ok(Outcome::InFlight));
    assert_eq!(taken.unwrap(), Taken::Some);
    for head in heads {
        device.stage_used(&*memory, head, 1).unwrap();
        assert_eq!((driver.used_index(), device.in_flight()), (0, 3));
    }
    device.publish(&*memory).unwrap();
    assert_eq!((driver.used_index(), device.in_flight()), (3, 0));
    device.publish(&*memory).unwrap();
    assert_eq!(
        heads.map(|_| driver.take_used().unwrap().head),
        heads.map(u32::from)
    );
    let hostile = (0..=SIZE).map(|_| device.stage_used(&*memory, 0, 0));
    assert!(hostile.last().unwrap().is_err(), "no more than it has");
}

#[test]
fn no_notification_is_lost() {
    for features in [VERSION_1, RING_FEATURES] {
        let (memory, mut driver, mut device) = both(features);
        let interrupt = TestInterrupt::default();
        device.disable_notification(&*memory).unwrap();
        driver.add(&one(0)).unwrap();
        assert_eq!(
            driver.wants_kick(1),
            features == RING_FEATURES,
            "events are on at first"
        );
        // It was told that it need not notify, or will see so: the device has to look.
        assert!(device.enable_notification(&*memory).unwrap());

        // The driver adds one while the device is at the last one; it sees that the device does not want to know.
        let mut left = 5;
        let next = device.serve(&*memory, &interrupt, |_| {
            if left > 0 {
                left -= 1;
                driver.add(&one(1)).unwrap();
                if features == VERSION_1 {
                    assert!(!driver.wants_kick(1));
                }
            }
            Ok(Outcome::Used(0))
        });
        assert_eq!(next.unwrap(), Next::Wait);
        assert_eq!(driver.used_index(), 6);
        driver.take_used().unwrap();
        driver.add(&one(2)).unwrap();
        assert!(driver.wants_kick(1), "after it was served");
    }
}

/// Memory that does something just before the device reaches an address for the `countdown`th time.
struct Watched<'a> {
    memory: &'a TestMemory,
    address: u64,
    countdown: Cell<u32>,
    then: &'a dyn Fn(),
}

impl GuestMemory for Watched<'_> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&**self.memory, address, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, ()>>, GuestMemoryError> {
        if address.0 == self.address {
            let left = self.countdown.get();
            self.countdown.set(left.saturating_sub(1));
            if left == 1 {
                (self.then)();
            }
        }
        GuestMemory::get_slices(&**self.memory, address, count, access)
    }
}

#[test]
fn a_chain_that_comes_as_notifications_go_on_is_served() {
    for features in [VERSION_1, RING_FEATURES] {
        let (memory, driver, mut device) = both(features);
        // Without EVENT_IDX the flags are written to turn notifications off, and to turn them on.
        let (address, countdown) = if features == VERSION_1 {
            (driver.used_ring(), 2)
        } else {
            (driver.used_ring() + 4 + 8 * u64::from(SIZE), 1)
        };
        let driver = RefCell::new(driver);
        let late = || {
            driver.borrow_mut().add(&one(1)).unwrap();
            assert!(
                !driver.borrow().wants_kick(1),
                "the driver thinks that it need not"
            );
        };
        let watched = Watched {
            memory: &memory,
            address,
            countdown: Cell::new(countdown),
            then: &late,
        };
        driver.borrow_mut().add(&one(0)).unwrap();
        let mut requests = 0;
        let next = device.serve(&watched, &TestInterrupt::default(), |_| {
            requests += 1;
            Ok(Outcome::Used(0))
        });
        assert_eq!((next.unwrap(), requests), (Next::Wait, 2));
    }
}

#[test]
fn a_driver_that_never_stops_has_its_turn_and_no_more() {
    let (memory, mut driver, mut device) = both(RING_FEATURES);
    let interrupt = TestInterrupt::default();
    driver.add(&one(0)).unwrap();
    let mut requests = 0;
    let next = device.serve(&*memory, &interrupt, |chain| {
        requests += 1;
        driver.offer(chain.head());
        Ok(Outcome::Used(0))
    });
    assert_eq!((next.unwrap(), requests), (Next::Again, SIZE));
}

/// Found by fuzzing: the device looped without an end.
#[test]
fn rings_on_top_of_each_other_do_not_hold_the_device() {
    let (memory, driver, _) = both(VERSION_1);
    // The flags that turn notifications off are where the available index is.
    let state = QueueV1 {
        available: BASE + 0x1002,
        used: BASE + 0x1004,
        next_available: 1,
        next_used: 1,
        ..driver.state()
    };
    let mut device = device_side(&memory, &state, VERSION_1).unwrap();
    let served = device.serve(&*memory, &TestInterrupt::default(), |_| {
        panic!("there is no chain")
    });
    assert!(matches!(served.unwrap_err().fault, Fault::Request(_)));
}

#[test]
fn what_cannot_be_taken_stays() {
    let (memory, mut driver, mut device) = both(RING_FEATURES);
    let interrupt = TestInterrupt::default();
    let heads = [0, 1, 2].map(|n| driver.add(&one(n)).unwrap());
    let mut taken = Vec::new();
    let next = device.serve(&*memory, &interrupt, |chain| {
        if taken.len() == 2 {
            return Ok(Outcome::Later);
        }
        taken.push(std::mem::take(chain));
        Ok(Outcome::InFlight)
    });
    assert_eq!(next.unwrap(), Next::Wait);
    assert_eq!(device.in_flight(), 2);
    // In the other order.
    for chain in taken.drain(..).rev() {
        device.add_used(&*memory, chain.head(), 1).unwrap();
    }
    device.signal(&*memory, &interrupt).unwrap();
    assert_eq!(
        driver.take_used().map(|used| used.head),
        Some(heads[1].into())
    );
    assert_eq!(
        driver.take_used().map(|used| used.head),
        Some(heads[0].into())
    );
    let mut chain = Chain::new();
    assert!(device.pop(&*memory, &mut chain).unwrap());
    assert_eq!(chain.head(), heads[2]);
    assert!(!device.pop(&*memory, &mut chain).unwrap());
}

#[test]
fn more_chains_in_flight_than_entries_are_refused() {
    let (memory, mut driver, mut device) = both(RING_FEATURES);
    let mut chain = Chain::new();
    let head = driver.add(&one(0)).unwrap();
    assert!(device.pop(&*memory, &mut chain).unwrap());
    for _ in 1..SIZE {
        driver.offer(head);
        assert!(device.pop(&*memory, &mut chain).unwrap());
    }
    let fault = fault(&mut driver, &mut device, &memory);
    assert!(matches!(fault, Fault::Offered { count: 9, size: 8 }));

    let state = QueueV1 {
        next_available: 9,
        ..driver.state()
    };
    let error = device_side(&memory, &state, RING_FEATURES).unwrap_err();
    assert!(matches!(error.fault, Fault::Offered { .. }));
}

#[test]
fn an_index_that_jumps_is_refused_at_once() {
    for (index, count) in [(SIZE + 3, SIZE + 1), (1, u16::MAX), (0, u16::MAX - 1)] {
        let (memory, mut driver, mut device) = both(RING_FEATURES);
        let mut chain = Chain::new();
        for n in 0..2 {
            driver.add(&one(n)).unwrap();
            assert!(device.pop(&*memory, &mut chain).unwrap());
            device.add_used(&*memory, chain.head(), 0).unwrap();
        }
        driver.set_available_index(index);
        let error = device.pop(&*memory, &mut chain).unwrap_err();
        assert!(
            matches!(error.fault, Fault::Offered { count: c, size: SIZE } if c == count),
            "{index}: {}",
            error.fault
        );
    }
}

#[test]
fn a_request_that_fails_does_not_take_others_with_it() {
    let (memory, mut driver, mut device) = both(VERSION_1);
    let interrupt = TestInterrupt::default();
    for n in 0..3 {
        driver.add(&one(n)).unwrap();
    }
    let mut n = 0;
    let error = device
        .serve(&*memory, &interrupt, |_| {
            n += 1;
            if n == 3 {
                return Err(Fault::Request("no such request"));
            }
            Ok(Outcome::Used(0))
        })
        .unwrap_err();
    assert_eq!(error.to_string(), "virtqueue 3");
    assert_eq!(error.fault.to_string(), "no such request");
    assert_eq!((driver.used_index(), interrupt.queue_count(3)), (2, 1));
}

#[test]
fn a_queue_that_is_not_served_has_no_chains() {
    let memory = memory();
    let mut driver = DriverQueue::new(&memory, BASE, SIZE, false);
    driver.add(&one(0)).unwrap();
    let interrupt = TestInterrupt::default();
    let states = [
        QueueV1 {
            ready: false,
            ..driver.state()
        },
        QueueV1 {
            broken: true,
            ..driver.state()
        },
    ];
    for state in states {
        let mut device = device_side(&memory, &state, VERSION_1).unwrap();
        assert!(!device.is_served());
        let next = device.serve(&*memory, &interrupt, |_| Ok(Outcome::Used(0)));
        assert_eq!(next.unwrap(), Next::Wait);
        assert!(!device.enable_notification(&*memory).unwrap());
        assert_eq!(driver.used_index(), 0);
    }
    let mut nowhere = device_side(&memory, &states[0], VERSION_1).unwrap();
    assert!(nowhere.add_used(&*memory, 0, 0).is_err());
}

#[test]
fn rings_must_be_in_memory_and_aligned() {
    let memory = memory();
    let good = DriverQueue::new(&memory, BASE, SIZE, true).state();
    let refused = |state: QueueV1| {
        device_side(&memory, &state, RING_FEATURES)
            .unwrap_err()
            .fault
    };
    for (state, name) in [
        (
            QueueV1 {
                descriptors: 8,
                ..good
            },
            "descriptor table",
        ),
        (
            QueueV1 {
                descriptors: MEMORY_SIZE - 64,
                ..good
            },
            "descriptor table",
        ),
        (
            QueueV1 {
                descriptors: !15,
                ..good
            },
            "descriptor table",
        ),
        (
            QueueV1 {
                available: 1,
                ..good
            },
            "available ring",
        ),
        (
            QueueV1 {
                available: MEMORY_SIZE - 20,
                ..good
            },
            "available ring",
        ),
        (QueueV1 { used: 2, ..good }, "used ring"),
        (
            QueueV1 {
                used: MEMORY_SIZE - 68,
                ..good
            },
            "used ring",
        ),
    ] {
        let fault = refused(state);
        assert!(
            matches!(fault, Fault::Ring { ring, .. } if ring == name),
            "{fault}"
        );
    }
    // Without EVENT_IDX there are no fields after the rings.
    let exact = QueueV1 {
        used: MEMORY_SIZE - 68,
        ..good
    };
    device_side(&memory, &exact, VERSION_1).unwrap();
    for size in [0, 3, 512] {
        assert!(matches!(
            refused(QueueV1 { size, ..good }),
            Fault::Request(_)
        ));
    }
}

#[test]
fn each_broken_rule_is_named() {
    let at = Descriptor::readable(DATA, 16);
    let indirect = |address, len| Descriptor {
        address,
        len,
        flags: INDIRECT,
        next: 0,
    };
    let table = DATA + 0x1000;
    let found = |features, first: Descriptor, second: Descriptor, inner: Descriptor| {
        let (memory, mut driver, mut device) = both(features);
        driver.write_descriptor(0, first);
        driver.write_descriptor(1, second);
        driver.write_table(table, 0, inner);
        fault(&mut driver, &mut device, &memory).to_string()
    };
    let two = |first, second| found(RING_FEATURES, first, second, at);
    let nested = |first, inner| found(RING_FEATURES, first, at, inner);
    assert_eq!(
        two(at.with(NEXT, 1), at.with(NEXT, 0)),
        "descriptor chain 0 has more than 8 descriptors"
    );
    assert_eq!(
        two(at.with(NEXT, 8), at),
        "descriptor 8 is not in the table of 8"
    );
    assert_eq!(
        two(Descriptor { len: 0, ..at }, at),
        "descriptor chain 0 has an empty buffer"
    );
    assert_eq!(
        two(Descriptor::writable(DATA, 1).with(NEXT, 1), at),
        "in descriptor chain 0 a readable buffer follows a writable one"
    );
    let half = Descriptor::readable(0, MEMORY_SIZE as u32);
    let rest = Descriptor::writable(0, u32::MAX - MEMORY_SIZE as u32 + 1);
    assert_eq!(
        two(half.with(NEXT, 1), rest),
        "the buffers of descriptor chain 0 are 4 GiB or more"
    );
    assert_eq!(
        two(Descriptor::readable(MEMORY_SIZE - 1, 2), at),
        "a buffer of descriptor chain 0, 2 bytes at 0x3fffff, is not in memory"
    );
    assert_eq!(
        two(Descriptor::readable(u64::MAX, 1), at),
        "a buffer of descriptor chain 0, 1 bytes at 0xffffffffffffffff, is not in memory"
    );
    assert_eq!(
        nested(indirect(table, 16), indirect(table, 16)),
        "the indirect table of descriptor chain 0 refers to another one"
    );
    assert_eq!(
        nested(indirect(table, 16).with(NEXT, 1), at),
        "the indirect table of descriptor chain 0 is not the last descriptor"
    );
    for len in [0, 8, 17] {
        assert_eq!(
            nested(indirect(table, len), at),
            "the indirect table of descriptor chain 0 has a length that is no multiple of a descriptor's"
        );
    }
    assert_eq!(
        nested(indirect(!15, 32), at),
        "the indirect table of descriptor chain 0 goes past the end of the address space"
    );
    assert_eq!(
        nested(indirect(MEMORY_SIZE, 16), at),
        "accessing the descriptor table"
    );
    assert_eq!(
        nested(indirect(table, 16), at.with(NEXT, 0)),
        "descriptor chain 0 has more than 1024 descriptors"
    );
    assert_eq!(
        found(VERSION_1 | EVENT_IDX, indirect(table, 16), at, at),
        "the indirect table of descriptor chain 0 is there though the feature was not negotiated"
    );
}

#[test]
fn descriptors_may_come_before_an_indirect_table() {
    let (memory, driver, mut device) = both(VERSION_1 | INDIRECT_DESC);
    let (table, mut driver) = (DATA + 0x1000, driver);
    driver.write_descriptor(0, Descriptor::readable(DATA, 1).with(NEXT, 1));
    // The write flag of the table itself means nothing.
    driver.write_descriptor(1, Descriptor::writable(table, 32).with(INDIRECT, 0));
    driver.write_table(table, 0, Descriptor::readable(DATA + 1, 2).with(NEXT, 1));
    driver.write_table(table, 1, Descriptor::writable(DATA + 3, 4));
    driver.offer(0);
    let mut chain = Chain::new();
    assert!(device.pop(&*memory, &mut chain).unwrap());
    assert_eq!((chain.readable_len(), chain.writable_len()), (3, 4));
    assert_eq!((chain.readable().len(), chain.writable().len()), (2, 1));
}

#[test]
fn data_go_along_the_buffers() {
    let (memory, mut driver, mut device) = both(RING_FEATURES);
    // Across the seam, where one buffer is two slices.
    let buffers = [
        Descriptor::readable(DATA, 3),
        Descriptor::readable(SEAM - 4, 8),
        Descriptor::writable(DATA + 16, 5),
        Descriptor::writable(SEAM - 2, 6),
    ];
    memory.write_slice(b"abc", GuestAddress(DATA)).unwrap();
    memory
        .write_slice(b"defghijk", GuestAddress(SEAM - 4))
        .unwrap();
    driver.add(&buffers).unwrap();
    let mut chain = Chain::new();
    assert!(device.pop(&*memory, &mut chain).unwrap());

    let mut reader = chain.reader(&*memory);
    let again = reader.clone();
    let mut two = [0; 2];
    reader.read(&mut two).unwrap();
    assert_eq!(&two, b"ab");
    assert_eq!(
        reader.read_obj::<u32>().unwrap(),
        u32::from_le_bytes(*b"cdef")
    );
    reader.skip(1).unwrap();
    assert_eq!((reader.done(), reader.left()), (7, 4));
    let error = reader.read(&mut [0; 5]).unwrap_err();
    assert!(matches!(error, Fault::Short { wanted: 5, left: 4 }));
    assert!(reader.skip(5).is_err());
    let mut four = [0; 4];
    reader.read(&mut four).unwrap();
    assert_eq!(&four, b"hijk");
    assert!(reader.read_obj::<u8>().is_err());

    let mut lengths = Vec::new();
    let mut reader = again;
    reader
        .slices(10, |slice| {
            lengths.push(slice.len());
            Ok(())
        })
        .unwrap();
    assert_eq!((lengths, reader.left()), (vec![3, 4, 3], 1));

    let mut writer = chain.writer(&*memory);
    writer.skip(1).unwrap();
    writer.write(b"123456").unwrap();
    writer.write_obj(0x3938_u16).unwrap();
    assert_eq!((writer.done(), writer.left()), (9, 2));
    assert!(writer.write(b"abc").is_err());
    let mut lengths = Vec::new();
    writer
        .slices(2, |slice| {
            lengths.push(slice.len());
            Ok(())
        })
        .unwrap();
    assert_eq!((lengths, writer.left()), (vec![2], 0));
    let mut written = [0; 5];
    memory
        .read_slice(&mut written, GuestAddress(DATA + 16))
        .unwrap();
    assert_eq!(&written, b"\x001234");
    let mut written = [0; 6];
    memory
        .read_slice(&mut written, GuestAddress(SEAM - 2))
        .unwrap();
    // The first two bytes are those that were read as "fg", at the start of this buffer.
    assert_eq!(&written, b"5689jk");
}

#[test]
fn state_comes_back_as_it_was_saved() {
    let (memory, mut driver, mut device) = both(RING_FEATURES);
    let interrupt = TestInterrupt::default();
    driver.add(&one(0)).unwrap();
    let next = device.serve(&*memory, &interrupt, |_| Ok(Outcome::Used(0)));
    assert_eq!(next.unwrap(), Next::Wait);
    driver.take_used().unwrap();
    device.set_broken();
    let state = device.state();
    assert_eq!(
        state,
        QueueV1 {
            next_available: 1,
            next_used: 1,
            broken: true,
            ..driver.state()
        }
    );
    let again = device_side(&memory, &state, RING_FEATURES).unwrap();
    assert_eq!(again.state(), state);
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        0..0x2000_u64,
        SEAM - 16..SEAM + 16,
        MEMORY_SIZE - 16..MEMORY_SIZE + 16,
        any::<u64>(),
    ];
    let len = prop_oneof![0..64_u32, Just(16_u32), any::<u32>()];
    let next = prop_oneof![0..SIZE + 1, any::<u16>()];
    (address, len, 0..8_u16, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

proptest! {
    /// Whatever is in the rings, serving ends, and every buffer that comes out of them is in memory.
    #[test]
    fn hostile_rings_do_no_harm(
        features in prop_oneof![Just(VERSION_1), Just(RING_FEATURES), Just(VERSION_1 | INDIRECT_DESC)],
        // Descriptors at 0x0, in the queue and in tables that indirect ones are likely to refer to.
        descriptors in vec(any_descriptor(), 1..24),
        tables in vec((0..0x200_u64, any_descriptor()), 0..16),
        heads in vec(prop_oneof![0..SIZE, any::<u16>()], 1..20),
        index in prop_oneof![Just(None), any::<u16>().prop_map(Some)],
        event in any::<u16>(),
    ) {
        let (memory, mut driver, mut device) = both(features);
        for (place, descriptor) in &tables {
            driver.write_table(16 * place, 0, *descriptor);
        }
        for (place, descriptor) in (0..SIZE).zip(&descriptors) {
            driver.write_descriptor(place, *descriptor);
        }
        for head in heads {
            driver.offer(head);
        }
        if let Some(index) = index {
            driver.set_available_index(index);
        }
        driver.set_used_event(event);
        let interrupt = TestInterrupt::default();
        for _ in 0..4 {
            let mut requests = 0;
            let served = device.serve(&*memory, &interrupt, |chain| {
                requests += 1;
                let sum = |buffers: &[Buffer]| buffers.iter().map(|b| u64::from(b.len)).sum::<u64>();
                assert!(chain.readable().len() + chain.writable().len() <= usize::from(MAX_INDIRECT));
                assert_eq!(sum(chain.readable()), u64::from(chain.readable_len()));
                assert_eq!(sum(chain.writable()), u64::from(chain.writable_len()));
                for buffer in chain.readable().iter().chain(chain.writable()) {
                    assert!(buffer.len > 0);
                    assert!(buffer.address.0 + u64::from(buffer.len) <= MEMORY_SIZE);
                }
                let mut reader = chain.reader(&*memory);
                reader.skip(reader.left() / 2)?;
                reader.slices(reader.left(), |_| Ok(()))?;
                let mut writer = chain.writer(&*memory);
                writer.skip(writer.left())?;
                // Written where the driver says, which may be the rings themselves.
                let mut writer = chain.writer(&*memory);
                writer.write(&vec![0xff; writer.left().min(32)])?;
                Ok(Outcome::Used(u32::try_from(writer.done()).unwrap()))
            });
            assert!(requests <= SIZE);
            if served.is_err() {
                device.set_broken();
            }
        }
    }

    /// What the driver puts in comes out, in one table or the other.
    #[test]
    fn chains_come_out_as_they_went_in(
        readable in vec((0..MEMORY_SIZE - 4096, 1..4096_u32), 0..40),
        writable in vec((0..MEMORY_SIZE - 4096, 1..4096_u32), 1..40),
        indirect in any::<bool>(),
    ) {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, BASE, 128, true);
        let mut device = device_side(&memory, &driver.state(), RING_FEATURES).unwrap();
        let mut buffers: Vec<_> =
            readable.iter().map(|(address, len)| Descriptor::readable(*address, *len)).collect();
        buffers.extend(writable.iter().map(|(address, len)| Descriptor::writable(*address, *len)));
        let head = if indirect {
            driver.add_indirect(DATA, &buffers)
        } else {
            driver.add(&buffers)
        };
        let mut chain = Chain::new();
        prop_assert!(device.pop(&*memory, &mut chain).unwrap());
        prop_assert_eq!(Some(chain.head()), head);
        let plain = |buffers: &[Buffer]| -> Vec<_> {
            buffers.iter().map(|b| (b.address.0, b.len)).collect()
        };
        prop_assert_eq!(plain(chain.readable()), readable);
        prop_assert_eq!(plain(chain.writable()), writable);
    }
}
