//! The device with disks that do what a test wants; with real ones in `files`.

mod files;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block_util::{BucketConfig, RateLimiter, RateLimiterConfig};
use proptest::prelude::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_virtio::feature::VERSION_1;
use vm_virtio::testing::{Descriptor, DriverQueue, Guest, Request, TestInterrupt, TestMemory};
use vm_virtio::{Activation, DeviceQueue, QueueV1, VirtioDevice, status};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::FLUSH;
use super::testing::{Done, MemoryDisk, State, header, read, write};
use super::*;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn config() -> BlockConfig {
    BlockConfig {
        id: "disk".into(),
        queues: 1,
        queue_size: 128,
        serial: "serial".into(),
        engine: Engine::Auto,
        affinity: Vec::new(),
        poll: true,
    }
}

fn flush() -> Request {
    Request {
        readable: header(4, 0),
        writable: 1,
    }
}

fn range(kind: u32, sector: u64, count: u32, flags: u32) -> Request {
    let mut request = write(0, &[0; 16]);
    request.readable[..4].copy_from_slice(&kind.to_le_bytes());
    request.readable[16..24].copy_from_slice(&sector.to_le_bytes());
    request.readable[24..28].copy_from_slice(&count.to_le_bytes());
    request.readable[28..].copy_from_slice(&flags.to_le_bytes());
    request
}

fn memory_block(disk: MemoryDisk, config: BlockConfig) -> (Block<TestMemory>, Arc<State>) {
    let state = disk.state.clone();
    (Block::new(config, Arc::new(disk)).unwrap(), state)
}

/// A guest whose driver runs a disk of 64 sectors.
fn running() -> (Guest, Arc<State>) {
    let (block, state) = memory_block(MemoryDisk::new(64), config());
    (Guest::running(Box::new(block)), state)
}

#[test]
fn what_is_written_is_read() {
    let (mut guest, state) = running();
    assert_eq!(
        guest.ask(0, &read(5, 1024)),
        [&[6; 512][..], &[7; 512], &[OK]].concat()
    );
    assert_eq!(guest.ask(0, &write(6, &[0xaa; 512])), [OK]);
    assert_eq!(state.bytes()[6 * 512..7 * 512], [0xaa; 512]);
    assert_eq!(
        guest.ask(0, &read(5, 1024)),
        [&[6; 512][..], &[0xaa; 512], &[OK]].concat()
    );
    assert_eq!(guest.ask(0, &flush()), [OK]);
    assert_eq!(guest.ask(0, &range(11, 1, 2, 0)), [OK]);
    assert_eq!(guest.ask(0, &range(13, 3, 4, 0)), [OK]);
    assert_eq!(guest.ask(0, &range(13, 7, 1, 1)), [OK]);
    let expected = [
        Done::Read(2560, 1024),
        Done::Write(3072, 512, false),
        Done::Read(2560, 1024),
        Done::Flush,
        Done::Discard(512, 1024),
        Done::WriteZeroes(1536, 2048, false),
        Done::WriteZeroes(3584, 512, true),
    ];
    assert_eq!(state.take_log(), expected);
}

#[test]
fn the_serial_number_is_told() {
    let (mut guest, state) = running();
    let ask = |guest: &mut Guest, room: u32| {
        guest.ask(
            0,
            &Request {
                readable: header(8, 0),
                writable: room + 1,
            },
        )
    };
    assert_eq!(
        ask(&mut guest, 20),
        [&b"serial"[..], &[0; 14], &[OK]].concat()
    );
    assert_eq!(ask(&mut guest, 3), b"ser\0");
    assert_eq!(ask(&mut guest, 0), [OK]);
    assert_eq!(ask(&mut guest, 21).len(), 22);
    assert_eq!(state.take_log(), []);
}

#[test]
fn what_a_disk_refuses_shows_in_the_status() {
    let (mut guest, state) = running();
    for (kind, expected) in [
        (io::ErrorKind::InvalidInput, IOERR),
        (io::ErrorKind::StorageFull, IOERR),
        (io::ErrorKind::PermissionDenied, IOERR),
        (io::ErrorKind::Unsupported, UNSUPP),
    ] {
        *state.failing.lock().unwrap() = Some(kind);
        assert_eq!(guest.ask(0, &write(0, &[1; 512])), [expected]);
        assert_eq!(guest.ask(0, &flush()), [expected]);
        assert_eq!(guest.ask(0, &read(0, 512))[512], expected);
    }
    *state.failing.lock().unwrap() = None;
    assert_eq!(guest.ask(0, &write(0, &[1; 512])), [OK]);
    assert_eq!(guest.ask(0, &write(63, &[1; 1024])), [IOERR]);
    assert_eq!(guest.ask(0, &range(99, 0, 0, 0)), [UNSUPP]);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let disk = MemoryDisk {
        read_only: true,
        ..MemoryDisk::new(8)
    };
    let (block, state) = memory_block(disk, config());
    let mut guest = Guest::running(Box::new(block));
    let before = state.bytes().clone();
    assert_eq!(guest.ask(0, &write(0, &[9; 512])), [IOERR]);
    assert_eq!(guest.ask(0, &range(11, 0, 1, 0)), [UNSUPP]);
    assert_eq!(guest.ask(0, &range(13, 0, 1, 0)), [UNSUPP]);
    assert_eq!(*state.bytes(), before);
    assert_eq!(state.take_log(), []);
    assert_eq!(guest.ask(0, &read(1, 512)), [&[2; 512][..], &[OK]].concat());
}

/// §5.2.6.2: when a write is stable as soon as it is done.
#[test]
fn write_through_or_write_back() {
    let durable = |guest: &mut Guest, state: &State| {
        assert_eq!(guest.ask(0, &write(0, &[1; 512])), [OK]);
        state.take_log() == [Done::Write(0, 512, true)]
    };
    let writeback = |guest: &Guest| {
        let mut byte = [0];
        guest.core.read_config(32, &mut byte);
        byte[0]
    };
    let (mut guest, state) = running();
    assert_eq!(writeback(&guest), 1);
    assert!(!durable(&mut guest, &state));
    guest.core.write_config(32, &[0]);
    assert_eq!(writeback(&guest), 0);
    assert!(durable(&mut guest, &state));
    // It outlives a move, but not a reset.
    guest.core.pause().unwrap();
    guest.core.resume().unwrap();
    assert!(durable(&mut guest, &state));
    guest.core.write_config(32, &[1]);
    assert!(!durable(&mut guest, &state));
    guest.core.write_config(32, &[0]);
    guest.reset();
    assert_eq!(writeback(&guest), 1);
    // No flushes: then every write has to be stable, whatever the register says.
    let flush = 1 << 9;
    guest.start(!flush);
    assert_eq!(writeback(&guest), 0);
    assert!(durable(&mut guest, &state));
    guest.core.write_config(32, &[1]);
    assert!(durable(&mut guest, &state));
    // Other fields, and other widths, are not to be written.
    guest.core.write_config(0, &[1; 8]);
    guest.core.write_config(31, &[0, 0]);
    let mut capacity = [0; 8];
    guest.core.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 64);
    assert_eq!(writeback(&guest), 1);
}

#[test]
fn requests_are_answered_as_they_are_done() {
    let (mut guest, state) = running();
    state.reversed.store(true, Ordering::SeqCst);
    state.hold();
    let heads: Vec<_> = (0..8).map(|n| guest.offer(0, &read(n, 512))).collect();
    guest.kick(0);
    state.wait_started(8);
    assert_eq!(guest.take_used(0), None);
    state.release();
    for n in (0..8_u8).rev() {
        let (used, answer) = guest.wait_used(0);
        assert_eq!(used.head, u32::from(heads[usize::from(n)]));
        assert_eq!(answer, [&[n + 1; 512][..], &[OK]].concat());
    }
}

#[test]
fn a_batch_goes_to_the_disk_in_one_call() {
    let (mut guest, state) = running();
    for batch in 1..=5 {
        for n in 0..16 {
            guest.offer(0, &read(n, 512));
        }
        guest.kick(0);
        for n in 0..16 {
            assert_eq!(guest.wait_used(0).1[0], n + 1);
        }
        assert_eq!(state.calls.load(Ordering::SeqCst), batch);
    }
}

#[test]
fn no_more_is_in_flight_than_the_disk_takes() {
    let disk = MemoryDisk {
        depth: 3,
        ..MemoryDisk::new(64)
    };
    let (block, state) = memory_block(disk, config());
    let mut guest = Guest::running(Box::new(block));
    state.hold();
    for n in 0..20 {
        guest.offer(0, &read(n, 512));
    }
    guest.kick(0);
    state.wait_started(3);
    state.release();
    for n in 0..20 {
        assert_eq!(guest.wait_used(0).1[0], n + 1);
    }
    assert_eq!(state.most.load(Ordering::SeqCst), 3);
}

#[test]
fn a_pause_waits_for_what_is_in_flight() {
    let (mut guest, state) = running();
    state.hold();
    for n in 0..6 {
        guest.offer(0, &write(n, &[0xbb; 512]));
    }
    guest.kick(0);
    state.wait_started(6);
    guest.core.pause().unwrap();
    // What the disk did is told; nothing is left to it.
    for _ in 0..6 {
        assert_eq!(guest.take_used(0).unwrap().1, [OK]);
    }
    assert_eq!(state.take_log().len(), 6);
    guest.offer(0, &read(0, 512));
    guest.kick(0);
    state.release();
    guest.core.resume().unwrap();
    assert_eq!(guest.wait_used(0).1[..512], [0xbb; 512]);
    assert_eq!(state.opened.load(Ordering::SeqCst), 1);
}

#[test]
fn a_reset_waits_as_well() {
    let (mut guest, state) = running();
    state.hold();
    guest.offer(0, &write(1, &[0xcc; 512]));
    guest.kick(0);
    state.wait_started(1);
    guest.reset();
    assert_eq!(state.take_log(), [Done::Write(512, 512, false)]);
    state.release();
    guest.start(u64::MAX);
    assert_eq!(guest.ask(0, &read(1, 512))[..512], [0xcc; 512]);
}

#[test]
fn a_disk_that_is_busy_is_asked_again() {
    let (mut guest, state) = running();
    state.busy_kicks.store(5, Ordering::SeqCst);
    assert_eq!(guest.ask(0, &write(0, &[1; 512])), [OK]);
    assert_eq!(state.busy_kicks.load(Ordering::SeqCst), 0);
}

#[test]
fn a_disk_that_is_gone_costs_errors_and_not_the_vm() {
    let (mut guest, state) = running();
    state.broken_kicks.store(true, Ordering::SeqCst);
    guest.offer(0, &write(0, &[1; 512]));
    guest.kick(0);
    guest.wait_needs_reset();
    guest.core.pause().unwrap();
    assert_eq!(guest.take_used(0).unwrap().1, [IOERR]);
    state.broken_kicks.store(false, Ordering::SeqCst);
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(guest.ask(0, &write(0, &[1; 512])), [OK]);

    // In flight when it goes away.
    state.hold();
    guest.offer(0, &read(0, 512));
    guest.kick(0);
    state.wait_started(2);
    state.broken_waits.store(true, Ordering::SeqCst);
    guest.core.pause().unwrap();
    assert_eq!(guest.take_used(0).unwrap().1[512], IOERR);
    state.release();
    guest.core.resume().unwrap();
    assert_eq!(guest.ask(0, &read(0, 512))[512], OK);
}

fn limiter(operations: u64, refill: Duration) -> Arc<RateLimiter> {
    let bucket = BucketConfig {
        size: operations,
        one_time_burst: 0,
        refill,
    };
    let config = RateLimiterConfig {
        bandwidth: None,
        operations: Some(bucket),
    };
    Arc::new(RateLimiter::new(&config).unwrap())
}

#[test]
fn a_limit_lets_requests_wait() {
    let (mut block, state) = memory_block(MemoryDisk::new(64), config());
    block
        .limit(limiter(3, Duration::from_secs(36_000)))
        .unwrap();
    let mut guest = Guest::running(Box::new(block));
    for n in 0..5 {
        guest.offer(0, &read(n, 512));
    }
    guest.kick(0);
    for n in 0..3 {
        assert_eq!(guest.wait_used(0).1[0], n + 1);
    }
    // Neither notifications nor a pause help, and a reset ends the waiting.
    guest.kick(0);
    guest.core.pause().unwrap();
    guest.core.resume().unwrap();
    guest.reset();
    assert_eq!(guest.take_used(0), None);
    assert_eq!(state.take_log().len(), 3);
    // What the disk does not move is free.
    guest.start(u64::MAX);
    assert_eq!(guest.ask(0, &read(64, 512))[512], IOERR);
}

#[test]
fn limited_requests_go_on_in_time() {
    let (mut block, state) = memory_block(MemoryDisk::new(64), config());
    block.limit(limiter(2, Duration::from_millis(4))).unwrap();
    let mut guest = Guest::running(Box::new(block));
    for n in 0..20 {
        guest.offer(0, &read(n, 512));
    }
    guest.kick(0);
    for n in 0..20 {
        assert_eq!(guest.wait_used(0).1[0], n + 1);
    }
    assert_eq!(state.take_log().len(), 20);
}

#[test]
fn queues_have_a_way_in_each_and_idle_ones_none() {
    let (block, state) = memory_block(
        MemoryDisk::new(64),
        BlockConfig {
            queues: 4,
            ..config()
        },
    );
    assert_eq!(state.opened.load(Ordering::SeqCst), 4);
    let mut guest = Guest::new(Box::new(block));
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest.set_up_queues();
    for idle in [1, 3] {
        let registers = guest.core.registers_mut();
        registers.select_queue(idle);
        registers.write_queue_ready(false);
    }
    guest.driver_ok();
    for _ in 0..3 {
        for queue in [0, 2] {
            let sector = u64::from(queue) + 10;
            assert_eq!(guest.ask(queue, &read(sector, 512))[0], sector as u8 + 1);
        }
        guest.core.pause().unwrap();
        guest.core.resume().unwrap();
    }
    guest.reset();
    guest.start(u64::MAX);
    for queue in 0..4 {
        assert_eq!(guest.ask(queue, &write(0, &[1; 512])), [OK]);
    }
    assert_eq!(state.opened.load(Ordering::SeqCst), 4);
}

#[test]
fn queues_come_home_in_their_order() {
    let memory = vm_virtio::testing::memory();
    let queue = |index: u16, ready| {
        let base = 0x1_0000 * (u64::from(index) + 1);
        let state = QueueV1 {
            ready,
            ..DriverQueue::new(&memory, base, 64, false).state()
        };
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        DeviceQueue::new(index, 128, &state, VERSION_1, &*memory, kick).unwrap()
    };
    let (mut block, _) = memory_block(
        MemoryDisk::new(1),
        BlockConfig {
            queues: 4,
            ..config()
        },
    );
    let activation = Activation {
        memory: memory.clone(),
        queues: vec![
            queue(0, true),
            queue(1, false),
            queue(2, false),
            queue(3, true),
        ],
        features: VERSION_1,
        interrupt: Arc::new(TestInterrupt::default()),
        spawn: vm_virtio::testing::spawn(),
    };
    block.activate(activation).unwrap();
    let home = block.deactivate().unwrap();
    let indexes: Vec<_> = home.iter().map(DeviceQueue::index).collect();
    assert_eq!(indexes, [0, 1, 2, 3]);
    assert!(block.deactivate().unwrap().is_empty());
}

#[test]
fn a_new_size_is_told_to_the_driver() {
    let (block, state) = memory_block(MemoryDisk::new(64), config());
    let control = block.control();
    let mut guest = Guest::running(Box::new(block));
    let capacity = |guest: &Guest| {
        let mut bytes = [0; 8];
        guest.core.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(guest.ask(0, &read(64, 512))[512], IOERR);
    let generation = guest.core.config_generation();
    control.resize(100 * 512).unwrap();
    assert_eq!(guest.interrupt.config_count(), 1);
    assert_ne!(guest.core.config_generation(), generation);
    assert_eq!(capacity(&guest), 100);
    assert_eq!(
        guest.ask(0, &read(64, 512)),
        [&[0; 512][..], &[OK]].concat()
    );

    // The same size is no news, and what the disk refuses changes nothing.
    control.resize(100 * 512).unwrap();
    let error = control.resize(1 << 40).unwrap_err();
    assert_eq!(error.to_string(), "disk \"disk\"");
    assert_eq!((guest.interrupt.config_count(), capacity(&guest)), (1, 100));

    // While it does not work, it is told later.
    guest.core.pause().unwrap();
    control.resize(10 * 512).unwrap();
    assert_eq!(guest.interrupt.config_count(), 1);
    guest.core.resume().unwrap();
    assert_eq!(guest.interrupt.config_count(), 2);
    assert_eq!(capacity(&guest), 10);
    assert_eq!(guest.ask(0, &read(10, 512))[512], IOERR);
    assert_eq!(state.bytes().len(), 5120);
}

#[test]
fn a_disk_of_another_size_is_told_after_a_move() {
    for sectors in [64, 80] {
        let (block, _) = memory_block(MemoryDisk::new(64), config());
        let mut guest = Guest::running(Box::new(block));
        guest.core.write_config(32, &[0]);
        guest = guest.moved_to(|| {
            let (block, _) = memory_block(MemoryDisk::new(sectors), config());
            Box::new(block)
        });
        guest.core.resume().unwrap();
        let mut byte = [1];
        guest.core.read_config(32, &mut byte);
        assert_eq!(byte, [0], "write-through is kept");
        let expected = u64::from(sectors != 64);
        assert_eq!(guest.interrupt.config_count(), expected);
    }
}

#[test]
fn configurations_that_cannot_be() {
    let refused = |config: BlockConfig| {
        let disk = Arc::new(MemoryDisk::new(1));
        let error = Block::<TestMemory>::new(config, disk).err().unwrap();
        error.to_string()
    };
    let none = BlockConfig {
        queues: 0,
        ..config()
    };
    assert_eq!(refused(none), "disk \"disk\" has no queues");
    for queue_size in [0, 1, 2, 3, 127, 32769] {
        let odd = BlockConfig {
            queue_size,
            ..config()
        };
        assert!(refused(odd).contains("queues of"), "{queue_size}");
    }
    let long = BlockConfig {
        serial: "x".repeat(21),
        ..config()
    };
    assert!(refused(long).contains("more than 20 bytes"));
    let full = BlockConfig {
        serial: "x".repeat(20),
        queue_size: 32768,
        ..config()
    };
    let disk = Arc::new(MemoryDisk::new(1));
    assert!(Block::<TestMemory>::new(full, disk).is_ok());
}

/// What the disk writes to guest memory shows in its bitmap, for a migration to send it again.
#[test]
fn reads_mark_the_pages_that_they_change() {
    let memory: GuestMemoryMmap<AtomicBitmap> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(memory);
    // The rings are laid out in other memory, and copied.
    let rings = vm_virtio::testing::memory();
    let mut driver = DriverQueue::new(&rings, 0x1000, 4, false);
    rings
        .write_slice(&header(0, 1), GuestAddress(0x8000))
        .unwrap();
    let buffers = [
        Descriptor::readable(0x8000, 16),
        Descriptor::writable(0x1_0000, 0x2000),
        Descriptor::writable(0x2_0000, 1),
    ];
    driver.add(&buffers).unwrap();
    let mut copy = vec![0; 0x9000];
    rings.read_slice(&mut copy, GuestAddress(0)).unwrap();
    memory.write_slice(&copy, GuestAddress(0)).unwrap();
    let region = memory.iter().next().unwrap();
    let dirty = |address| region.bitmap().dirty_at(address);
    assert!(!dirty(0x1_0000) && !dirty(0x2_0000));

    let disk = Arc::new(MemoryDisk::new(64));
    let mut block = Block::new(config(), disk).unwrap();
    let interrupt = Arc::new(TestInterrupt::default());
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let state = QueueV1 {
        size: 4,
        ..driver.state()
    };
    let queue = DeviceQueue::new(0, 128, &state, VERSION_1 | FLUSH, &*memory, kick).unwrap();
    let activation = Activation {
        memory: memory.clone(),
        queues: vec![queue],
        features: VERSION_1 | FLUSH,
        interrupt: interrupt.clone(),
        spawn: vm_virtio::testing::spawn(),
    };
    block.activate(activation).unwrap();
    let used_index = GuestAddress(driver.used_ring() + 2);
    interrupt.wait_for("the read", || {
        let used: u16 = memory.read_obj(used_index).unwrap();
        (used == 1).then_some(())
    });
    block.deactivate().unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1_0000)).unwrap(), 2);
    assert!(dirty(0x1_0000) && dirty(0x1_1fff) && dirty(0x2_0000));
    assert!(!dirty(0xf000) && !dirty(0x1_2000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The disk is what a model says after any requests, however they are cut and however many are in flight.
    #[test]
    fn any_requests_leave_the_disk_as_they_should(
        requests in prop::collection::vec((0_u8..5, 0_u64..70, 1_u32..8, 1_u32..3000, any::<u8>()), 1..40),
        reversed in any::<bool>(),
    ) {
        let (mut guest, state) = running();
        state.reversed.store(reversed, Ordering::SeqCst);
        let mut model = state.bytes().clone();
        for (kind, sector, count, piece, value) in requests {
            let len = count as usize * 512;
            let start = sector as usize * 512;
            let fits = start + len <= model.len();
            let request = match kind {
                0 => write(sector, &vec![value; len]),
                1 => read(sector, len as u32),
                2 => range(13, sector, count, u32::from(value & 1)),
                3 => range(11, sector, count, 0),
                _ => flush(),
            };
            // However it is cut, within what the queue holds.
            let piece = piece.max(len as u32 / 60);
            let (buffers, place) = guest.buffers(&request, piece);
            let head = guest.queues[0].add(&buffers).unwrap();
            guest.expect_answer(0, head, place);
            guest.kick(0);
            let (_, answer) = guest.wait_used(0);
            let (status, data) = answer.split_last().unwrap();
            prop_assert_eq!(*status, if fits || kind == 4 { OK } else { IOERR });
            if fits {
                match kind {
                    0 => model[start..start + len].fill(value),
                    1 => prop_assert_eq!(data, &model[start..start + len]),
                    2 => model[start..start + len].fill(0),
                    _ => {}
                }
            }
        }
        prop_assert_eq!(&*state.bytes(), &model);
        prop_assert_eq!(guest.core.registers().status() & status::NEEDS_RESET, 0);
    }
}
