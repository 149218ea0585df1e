//! A memory device whose region is real RAM, beside that of the queues.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Guest, TestMemory};

use super::blocks::Fill;
use super::request::{Answer, Request as Ask};
use super::*;

const START: u64 = 4 << 30;
const BLOCKS: u64 = 8;

fn region() -> Arc<GuestMemoryMmap> {
    let ranges = [(GuestAddress(START), (BLOCKS * BLOCK) as usize)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn device(requested: u64, ram: &Arc<GuestMemoryMmap>) -> Mem<TestMemory> {
    let config = MemConfig {
        id: "mem".into(),
        start: START,
        size: BLOCKS * BLOCK,
        requested: requested * BLOCK,
    };
    Mem::new(config, ram.clone(), Box::new(())).unwrap()
}

fn start(requested: u64) -> (Guest, MemControl, Arc<GuestMemoryMmap>) {
    let ram = region();
    let mem = device(requested, &ram);
    let control = mem.control();
    (Guest::running(Box::new(mem)), control, ram)
}

fn at(block: u64) -> u64 {
    START + block * BLOCK
}

fn request(ask: Ask) -> vm_virtio::testing::Request {
    vm_virtio::testing::Request {
        readable: ask.bytes(),
        writable: ANSWER_LEN as u32,
    }
}

#[track_caller]
fn expect(guest: &mut Guest, ask: Ask, answer: Answer) {
    assert_eq!(guest.ask(0, &request(ask)), answer.bytes(), "{ask:?}");
}

struct States;

impl Subject for States {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(device(4, &region()))
    }

    fn request(&self, n: u32) -> vm_virtio::testing::Request {
        request(match n % 3 {
            0 => Ask::State(at(u64::from(n) % BLOCKS), 1),
            1 => Ask::UnplugAll,
            _ => Ask::Unknown,
        })
    }

    fn check(&self, n: u32, answer: &[u8]) {
        let wanted = match n % 3 {
            0 => Answer::State(Fill::None),
            1 => Answer::Ack,
            _ => Answer::Error,
        };
        assert_eq!(answer, wanted.bytes());
    }
}

vm_virtio::conformance!(conformance, States);

#[test]
fn blocks_are_plugged_and_unplugged() {
    let (mut guest, control, ram) = start(4);
    expect(&mut guest, Ask::Plug(at(1), 3), Answer::Ack);
    assert_eq!(control.plugged(), 3 * BLOCK);
    expect(&mut guest, Ask::State(at(1), 3), Answer::State(Fill::All));
    expect(&mut guest, Ask::State(at(0), 2), Answer::State(Fill::Some));
    expect(&mut guest, Ask::State(at(4), 4), Answer::State(Fill::None));

    for block in 1..4 {
        ram.write_obj(block, GuestAddress(at(block))).unwrap();
    }
    expect(&mut guest, Ask::Unplug(at(2), 1), Answer::Ack);
    let words: Vec<u64> = (1..4)
        .map(|block| ram.read_obj(GuestAddress(at(block))).unwrap())
        .collect();
    assert_eq!(words, [1, 0, 3]);
    assert_eq!(control.plugged(), 2 * BLOCK);

    expect(&mut guest, Ask::UnplugAll, Answer::Ack);
    assert_eq!(control.plugged(), 0);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(at(3))).unwrap(), 0);
    expect(&mut guest, Ask::Plug(at(0), 4), Answer::Ack);
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let (mut guest, control, ram) = start(4);
    expect(&mut guest, Ask::Plug(at(0), 2), Answer::Ack);
    ram.write_obj(1u8, GuestAddress(at(0))).unwrap();
    for (ask, answer) in [
        // More than is requested.
        (Ask::Plug(at(2), 3), Answer::Nack),
        // Plugged already, in part.
        (Ask::Plug(at(1), 1), Answer::Error),
        (Ask::Plug(at(1), 2), Answer::Error),
        // Not plugged, in part.
        (Ask::Unplug(at(1), 2), Answer::Error),
        (Ask::Unplug(at(5), 1), Answer::Error),
        // No block.
        (Ask::Plug(at(2) + 4096, 1), Answer::Error),
        (Ask::Plug(at(2), 0), Answer::Error),
        (Ask::Unplug(at(0), 0), Answer::Error),
        (Ask::State(at(0) + 1, 1), Answer::Error),
        (Ask::State(at(0), 0), Answer::Error),
        // Not in the region.
        (Ask::Plug(at(7), 2), Answer::Error),
        (Ask::Plug(at(8), 1), Answer::Error),
        (Ask::Plug(0, 1), Answer::Error),
        (Ask::Plug(START - BLOCK, 1), Answer::Error),
        (Ask::Unplug(START - BLOCK, 2), Answer::Error),
        (Ask::State(u64::MAX - BLOCK + 1, u16::MAX), Answer::Error),
        (Ask::State(at(0), u16::MAX), Answer::Error),
        (Ask::Unknown, Answer::Error),
    ] {
        expect(&mut guest, ask, answer);
    }
    assert_eq!(control.plugged(), 2 * BLOCK);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(at(0))).unwrap(), 1);
}

#[test]
fn a_request_without_room_for_the_answer_is_not_done() {
    let (mut guest, control, _ram) = start(4);
    let short = vm_virtio::testing::Request {
        writable: 9,
        ..request(Ask::Plug(at(0), 1))
    };
    guest.offer(0, &short);
    guest.kick(0);
    guest.wait_needs_reset();
    assert_eq!(control.plugged(), 0);
}

/// The last two fields of the configuration: bytes plugged, bytes requested.
fn config(guest: &Guest) -> [u64; 2] {
    let mut bytes = [0; 16];
    guest.core.read_config(40, &mut bytes);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    [word(0), word(8)]
}

#[test]
fn the_driver_hears_of_a_new_size_at_once_or_when_it_can() {
    let (mut guest, control, _ram) = start(1);
    let mut bytes = [0; 40];
    guest.core.read_config(0, &mut bytes);
    let fields = [BLOCK, 0, START, BLOCKS * BLOCK, BLOCKS * BLOCK];
    assert_eq!(bytes, fields.map(u64::to_le_bytes).as_flattened());
    assert_eq!(config(&guest), [0, BLOCK]);
    control.resize(3 * BLOCK).unwrap();
    control.resize(3 * BLOCK).unwrap();
    assert_eq!(guest.interrupt.config_count(), 1);
    expect(&mut guest, Ask::Plug(at(0), 2), Answer::Ack);
    assert_eq!(config(&guest), [2 * BLOCK, 3 * BLOCK]);
    guest.core.pause().unwrap();
    control.resize(0).unwrap();
    assert_eq!(guest.interrupt.config_count(), 1);
    guest.core.resume().unwrap();
    assert_eq!(guest.interrupt.config_count(), 2);
    // It is for the driver to unplug.
    assert_eq!((control.requested(), control.plugged()), (0, 2 * BLOCK));
    for wrong in [BLOCK + 1, 9 * BLOCK, u64::MAX] {
        assert!(matches!(control.resize(wrong), Err(MemError::Size { .. })));
    }
}

#[test]
fn a_reset_of_the_device_leaves_memory_where_it_is() {
    let (mut guest, control, ram) = start(4);
    expect(&mut guest, Ask::Plug(at(0), 2), Answer::Ack);
    ram.write_obj(5u8, GuestAddress(at(1))).unwrap();
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(control.plugged(), 2 * BLOCK);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(at(1))).unwrap(), 5);
    expect(&mut guest, Ask::State(at(0), 2), Answer::State(Fill::All));
}

#[test]
fn a_device_that_moves_keeps_its_blocks() {
    let (mut guest, control, ram) = start(2);
    control.resize(5 * BLOCK).unwrap();
    expect(&mut guest, Ask::Plug(at(1), 2), Answer::Ack);
    expect(&mut guest, Ask::Plug(at(6), 1), Answer::Ack);
    let next = device(0, &ram);
    let control = next.control();
    let mut guest = guest.moved_to(|| Box::new(next));
    guest.core.resume().unwrap();
    assert_eq!(
        (control.requested(), control.plugged()),
        (5 * BLOCK, 3 * BLOCK)
    );
    expect(&mut guest, Ask::Unplug(at(6), 1), Answer::Ack);
    expect(&mut guest, Ask::State(at(1), 2), Answer::State(Fill::All));
}

#[test]
fn state_of_another_device_is_refused() {
    let good = MemV1 {
        size: BLOCKS * BLOCK,
        requested: BLOCK,
        told: BLOCK,
        plugged: vec![(0, 1), (7, 1)],
    };
    let restore = |state: &MemV1| {
        let section = Section::encode("mem", state).unwrap();
        VirtioDevice::<TestMemory>::restore(&mut device(0, &region()), &section)
    };
    restore(&good).unwrap();
    for (size, plugged) in [
        (BLOCK, vec![]),
        (good.size, vec![(7, 2)]),
        (good.size, vec![(8, 1)]),
        (good.size, vec![(0, 0)]),
        (good.size, vec![(0, 3), (2, 1)]),
        (good.size, vec![(u64::MAX, 2)]),
    ] {
        let state = MemV1 {
            size,
            plugged,
            ..good.clone()
        };
        assert!(restore(&state).is_err(), "{state:?}");
    }
}

#[test]
fn regions_that_are_no_blocks() {
    for (start, size) in [
        (START + 4096, BLOCK),
        (START, BLOCK + 1),
        (START, 0),
        (u64::MAX - BLOCK + 1, BLOCK),
    ] {
        let config = MemConfig {
            start,
            size,
            ..MemConfig::default()
        };
        let made = Mem::<TestMemory>::new(config, region(), Box::new(()));
        assert!(matches!(made.err(), Some(MemError::Region { .. })));
    }
}
