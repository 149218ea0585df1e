//! A balloon with real RAM, and one whose host only counts.

use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{self, Descriptor, Guest, Request, TestMemory};

use super::*;
use crate::discard::DiscardError;

/// RAM of the guest: of [`testing::memory`].
const RAM: u64 = testing::MEMORY_SIZE;

fn config() -> BalloonConfig {
    BalloonConfig {
        id: "balloon".into(),
        ram: RAM,
        free_page_reporting: true,
        deflate_on_oom: true,
        ..BalloonConfig::default()
    }
}

/// A guest whose RAM is full of ones, but for what the queues take, and its balloon.
fn start(features: u64) -> (Guest, BalloonControl) {
    let ram = testing::memory();
    let ones = vec![1; RAM as usize];
    ram.write_slice(&ones, GuestAddress(0)).unwrap();
    let balloon = Balloon::new(config(), ram.clone()).unwrap();
    let control = balloon.control();
    let mut guest = Guest::with_memory(Box::new(balloon), ram);
    guest.start(features);
    (guest, control)
}

fn pfns(pfns: &[u32]) -> Request {
    Request {
        readable: pfns.iter().copied().flat_map(u32::to_le_bytes).collect(),
        writable: 0,
    }
}

/// First byte of a page.
fn first(memory: &TestMemory, page: u64) -> u8 {
    memory.read_obj(GuestAddress(page * PAGE)).unwrap()
}

struct Inflating;

impl Subject for Inflating {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        // Not the RAM that the queues are in.
        Box::new(Balloon::new(config(), testing::memory()).unwrap())
    }

    fn request(&self, n: u32) -> Request {
        pfns(&[n % 1024, (n + 7) % 1024, (n + 1) % 1024])
    }

    fn check(&self, _n: u32, answer: &[u8]) {
        assert!(answer.is_empty());
    }
}

vm_virtio::conformance!(conformance, Inflating);

#[test]
fn pages_in_the_balloon_are_gone_and_come_back_as_zeros() {
    let (mut guest, control) = start(u64::MAX);
    guest.ask(0, &pfns(&[5, 4, 2, 4]));
    let gone = |guest: &Guest| {
        (0..8)
            .filter(|page| first(&guest.memory, *page) == 0)
            .collect::<Vec<_>>()
    };
    assert_eq!(gone(&guest), [2, 4, 5]);
    guest.ask(1, &pfns(&[5, 4]));
    assert_eq!(gone(&guest), [2, 4, 5]);
    guest.memory.write_obj(3u8, GuestAddress(4 * PAGE)).unwrap();
    assert_eq!(first(&guest.memory, 4), 3);

    guest.core.write_config(4, &3u32.to_le_bytes());
    assert_eq!(control.actual(), 3 * PAGE);
    // The driver cannot say that it has more than there is.
    guest.core.write_config(4, &u32::MAX.to_le_bytes());
    assert_eq!(control.actual(), RAM);
    guest.reset();
    assert_eq!(control.actual(), 0);
}

/// Counts what it is asked.
#[derive(Default)]
struct Counting(Mutex<Vec<(u64, u64)>>);

impl DiscardRam for Counting {
    fn discard(&self, start: GuestAddress, len: u64) -> Result<(), DiscardError> {
        self.0.lock().unwrap().push((start.0 / PAGE, len / PAGE));
        Ok(())
    }
}

#[test]
fn neighbours_go_in_one_call_in_whatever_order_they_come() {
    let ram = Arc::new(Counting::default());
    let balloon = Balloon::new(config(), ram.clone()).unwrap();
    let mut guest = Guest::running(Box::new(balloon));
    let descending: Vec<u32> = (100..356).rev().collect();
    guest.ask(0, &pfns(&descending));
    guest.ask(0, &pfns(&[9, 1, 7, u32::MAX, 8, 0]));
    let calls = std::mem::take(&mut *ram.0.lock().unwrap());
    let last = (u64::from(u32::MAX), 1);
    assert_eq!(calls, [(100, 256), (0, 2), (7, 3), last]);
    // More than are sorted together.
    let many: Vec<u32> = (0..5000).collect();
    guest.ask(0, &pfns(&many));
    let calls = std::mem::take(&mut *ram.0.lock().unwrap());
    assert_eq!(calls.len(), 5);
    assert_eq!(calls.iter().map(|call| call.1).sum::<u64>(), 5000);
}

#[test]
fn pages_that_are_no_ram_are_refused() {
    for wrong in [
        pfns(&[1024]),
        pfns(&[u32::MAX]),
        pfns(&[1022, 1023, 1024]),
        Request {
            readable: vec![0; 5],
            writable: 0,
        },
    ] {
        let (mut guest, _control) = start(u64::MAX);
        guest.offer(0, &wrong);
        guest.kick(0);
        guest.wait_needs_reset();
        assert_eq!(guest.take_used(0), None);
        assert_eq!(first(&guest.memory, 1023), 1);
        // And after a reset it works.
        guest.reset();
        guest.start(u64::MAX);
        guest.ask(0, &pfns(&[3]));
        assert_eq!(first(&guest.memory, 3), 0);
    }
}

/// Offers two free pages from page 4 on, in queue `index`.
fn report(guest: &mut Guest, index: u16) {
    let pages = [Descriptor::writable(4 * PAGE, 2 * 4096)];
    let queue = &mut guest.queues[usize::from(index)];
    queue.add(&pages).unwrap();
    guest.kick(index);
}

#[test]
fn free_pages_are_reported_where_linux_does_and_where_the_standard_does() {
    let both = RING_FEATURES | STATS_VQ | REPORTING;
    for (features, index) in [(both, 3), (both, 4), (RING_FEATURES | REPORTING, 2)] {
        let (mut guest, _control) = start(features);
        report(&mut guest, index);
        guest.wait_used(index);
        let pages: Vec<u8> = (3..7).map(|page| first(&guest.memory, page)).collect();
        assert_eq!(pages, [1, 0, 0, 1]);
    }
    // Not agreed.
    let (mut guest, _control) = start(RING_FEATURES);
    report(&mut guest, 4);
    guest.wait_used(4);
    assert_eq!(first(&guest.memory, 4), 1);
}

fn statistics(entries: &[(u16, u64)]) -> Request {
    let mut readable = Vec::new();
    for (tag, value) in entries {
        readable.extend(tag.to_le_bytes());
        readable.extend(value.to_le_bytes());
    }
    // The rest of an entry is passed over.
    readable.extend([1, 2, 3]);
    Request {
        readable,
        writable: 0,
    }
}

#[test]
fn statistics_stay_with_the_device_until_new_ones_are_wanted() {
    let (mut guest, control) = start(u64::MAX);
    assert_eq!(control.statistics(), None);
    guest.offer(2, &statistics(&[(4, 1000), (5, 2000), (77, 3)]));
    guest.kick(2);
    control.ask_statistics().unwrap();
    guest.wait_used(2);
    let first = BalloonStatistics {
        free: Some(1000),
        total: Some(2000),
        ..BalloonStatistics::default()
    };
    assert_eq!(control.statistics(), Some(first));

    // The next stays over a pause.
    guest.offer(2, &statistics(&[(0, 1), (9, 2)]));
    guest.kick(2);
    guest.core.pause().unwrap();
    assert_eq!(guest.take_used(2), None);
    guest.core.resume().unwrap();
    control.ask_statistics().unwrap();
    guest.wait_used(2);
    let second = BalloonStatistics {
        swap_in: Some(1),
        hugetlb_failures: Some(2),
        ..BalloonStatistics::default()
    };
    assert_eq!(control.statistics(), Some(second));
}

#[test]
fn the_driver_hears_of_a_new_size_at_once_or_when_it_can() {
    let (mut guest, control) = start(u64::MAX);
    let target = |guest: &Guest| {
        let mut bytes = [0; 4];
        guest.core.read_config(0, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    control.resize(16 * PAGE).unwrap();
    control.resize(16 * PAGE).unwrap();
    assert_eq!((guest.interrupt.config_count(), target(&guest)), (1, 16));
    guest.core.pause().unwrap();
    control.resize(3 * PAGE).unwrap();
    assert_eq!(guest.interrupt.config_count(), 1);
    guest.core.resume().unwrap();
    assert_eq!((guest.interrupt.config_count(), target(&guest)), (2, 3));
    assert_eq!(control.target(), 3 * PAGE);

    let refused = |size| control.resize(size).unwrap_err().to_string();
    assert!(refused(RAM + PAGE).contains("there are 4194304"));
    assert!(refused(100).contains("pages of 4096"));
    assert_eq!(target(&guest), 3);
}

#[test]
fn a_balloon_that_moves_keeps_its_size() {
    let make = || {
        let balloon = Balloon::new(config(), testing::memory()).unwrap();
        let control = balloon.control();
        (Box::new(balloon), control)
    };
    let (balloon, control) = make();
    let mut guest = Guest::running(balloon);
    control.resize(64 * PAGE).unwrap();
    guest.core.write_config(4, &7u32.to_le_bytes());
    let (balloon, control) = make();
    let guest = guest.moved_to(|| balloon);
    assert_eq!((control.target(), control.actual()), (64 * PAGE, 7 * PAGE));
    drop(guest);
}

#[test]
fn a_balloon_larger_than_ram_is_refused() {
    let config = BalloonConfig {
        size: RAM + 1,
        ..config()
    };
    let refused = Balloon::<TestMemory>::new(config, testing::memory());
    assert!(matches!(refused.err(), Some(BalloonError::TooLarge { .. })));
}
