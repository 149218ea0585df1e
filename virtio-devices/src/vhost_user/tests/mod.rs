//! The front end with a back end in a thread: one that does what it should, and ones that do not.

mod backend;
mod hostile;

use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost::vhost_user::VhostUserProtocolFeatures;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vm_virtio::feature::VERSION_1;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Guest, MEMORY_SIZE, Request, SEAM, TestInterrupt, TestMemory, spawn};
use vm_virtio::{VirtioDevice, Worker, status};

use super::*;
use crate::block::testing::{read, write};
use backend::{Manner, Server};

const OK: u8 = 0;
const IOERR: u8 = 1;

/// Guest memory in two regions that another process can map.
fn shared_memory() -> TestMemory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_SIZE).unwrap();
    let region = |start: u64, end: u64| {
        let file = FileOffset::new(file.try_clone().unwrap(), start);
        (GuestAddress(start), (end - start) as usize, Some(file))
    };
    let regions = [region(0, SEAM), region(SEAM, MEMORY_SIZE)];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(regions).unwrap())
}

/// Why back ends were lost.
type Losses = Arc<Mutex<Vec<String>>>;

fn config(socket: &Path, queues: u16) -> (VhostUserConfig, Losses) {
    let losses = Losses::default();
    let heard = losses.clone();
    let config = VhostUserConfig {
        id: "disk".into(),
        socket: socket.into(),
        queues,
        queue_size: 128,
        patience: Duration::from_secs(30),
        spawn: spawn(),
        lost: Arc::new(move |why| heard.lock().unwrap().push(why.to_string())),
    };
    (config, losses)
}

fn device(server: &Server, queues: u16) -> (VhostUserBlock<TestMemory>, Losses) {
    let (config, losses) = config(&server.socket, queues);
    (VhostUserBlock::new(config, false).unwrap(), losses)
}

fn refused(server: &Server, queues: u16, read_only: bool) -> String {
    let device = VhostUserBlock::<TestMemory>::new(config(&server.socket, queues).0, read_only);
    device.err().unwrap().to_string()
}

fn guest(device: VhostUserBlock<TestMemory>) -> Guest {
    let mut guest = Guest::with_memory(Box::new(device), shared_memory());
    guest.start(u64::MAX);
    guest
}

fn asks_for_reset(guest: &Guest) -> bool {
    guest.core.registers().status() & status::NEEDS_RESET != 0
}

/// A disk whose sectors are `n + 1`, read one by one.
struct Sectors(Server);

impl Subject for Sectors {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(device(&self.0, 1).0)
    }

    fn memory(&self) -> TestMemory {
        shared_memory()
    }

    fn request(&self, n: u32) -> Request {
        read(u64::from(n % 64), 512)
    }

    fn check(&self, n: u32, answer: &[u8]) {
        assert_eq!(answer, [&[(n % 64) as u8 + 1; 512][..], &[OK]].concat());
    }
}

vm_virtio::conformance!(conformance, Sectors(Server::new(64, Manner::default())));

#[test]
fn what_is_written_is_in_the_image() {
    let server = Server::new(64, Manner::default());
    let (device, losses) = device(&server, 1);
    let mut guest = guest(device);
    assert_eq!(guest.ask(0, &write(6, &[0xaa; 1024])), [OK]);
    assert_eq!(
        guest.ask(0, &read(7, 1024)),
        [&[0xaa; 512][..], &[9; 512], &[OK]].concat()
    );
    assert_eq!(server.image()[6 * 512..8 * 512], [0xaa; 1024]);
    assert_eq!(guest.ask(0, &write(64, &[1; 512])), [IOERR]);
    let mut capacity = [0; 8];
    guest.core.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 64);
    guest.reset();
    assert!(losses.lock().unwrap().is_empty());
    assert_eq!(server.connections(), 1);
}

#[test]
fn each_queue_has_a_ring() {
    let manner = Manner {
        queues: 4,
        ..Manner::default()
    };
    let server = Server::new(64, manner);
    // Fewer than the back end has.
    let mut guest = guest(device(&server, 3).0);
    let mut queues = [0; 2];
    guest.core.read_config(34, &mut queues);
    assert_eq!(queues, [3, 0]);
    for queue in 0..3 {
        for sector in 0..16 {
            let answer = guest.ask(queue, &read(sector, 512));
            assert_eq!(answer, [&[sector as u8 + 1; 512][..], &[OK]].concat());
        }
    }
    assert_eq!(
        refused(&server, 5, false),
        format!(
            "the vhost-user back end at {:?} serves 4 queues, and num_queues is 5",
            server.socket
        )
    );
}

#[test]
fn a_disk_that_cannot_be_written() {
    let manner = Manner {
        read_only: true,
        ..Manner::default()
    };
    let server = Server::new(8, manner);
    let (config, _) = config(&server.socket, 1);
    let mut guest = guest(VhostUserBlock::new(config, true).unwrap());
    assert_ne!(guest.core.registers().features() & 1 << 5, 0, "RO");
    assert_eq!(guest.ask(0, &write(0, &[7; 512])), [IOERR]);
    assert_eq!(server.image()[..512], [1; 512]);

    let error = refused(&Server::new(8, Manner::default()), 1, true);
    assert!(
        error.ends_with("can be written, and readonly=on"),
        "{error}"
    );
}

#[test]
fn the_driver_chooses_the_cache() {
    let server = Server::new(8, Manner::default());
    let mut guest = guest(device(&server, 1).0);
    let cache = |guest: &Guest| {
        let mut byte = [0xff];
        guest.core.read_config(32, &mut byte);
        byte[0]
    };
    assert_eq!(cache(&guest), 1);
    guest.core.write_config(32, &[0]);
    assert_eq!(cache(&guest), 0);
    // It comes along when the guest moves, and not over a reset.
    let mut guest = guest.moved_to(|| {
        let device = device(&server, 1).0;
        Box::new(device)
    });
    assert_eq!(cache(&guest), 0);
    guest.core.resume().unwrap();
    assert_eq!(guest.ask(0, &write(0, &[7; 512])), [OK]);
    guest.reset();
    assert_eq!(cache(&guest), 1);
}

#[test]
fn without_features_of_the_protocol_that_are_not_needed() {
    let manner = Manner {
        // REPLY_ACK is there with any back end of the crate.
        protocol: VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK,
        ..Manner::default()
    };
    let server = Server::new(8, manner);
    let (device, losses) = device(&server, 1);
    let mut guest = guest(device);
    for _ in 0..3 {
        assert_eq!(guest.ask(0, &read(1, 512))[..512], [2; 512]);
        guest.core.pause().unwrap();
        guest.core.resume().unwrap();
    }
    assert!(losses.lock().unwrap().is_empty());
}

#[test]
fn a_back_end_that_goes_away_and_comes_back() {
    let server = Server::new(8, Manner::default());
    let (device, losses) = device(&server, 1);
    let mut guest = guest(device);
    assert_eq!(guest.ask(0, &read(1, 512))[..512], [2; 512]);
    server.hang_up();
    guest.wait_needs_reset();
    assert_eq!(
        *losses.lock().unwrap(),
        [format!(
            "the vhost-user back end at {:?} is gone",
            server.socket
        )]
    );
    // There is another: the driver that resets the device goes on.
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(guest.ask(0, &read(2, 512))[..512], [3; 512]);
    assert_eq!(losses.lock().unwrap().len(), 1);

    // There is none any more. The configuration can be read all the same.
    server.hang_up();
    guest.wait_needs_reset();
    server.end();
    guest.reset();
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest.set_up_queues();
    guest.driver_ok();
    assert!(asks_for_reset(&guest));
    let mut capacity = [0; 8];
    guest.core.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
}

#[test]
fn a_back_end_that_goes_away_during_a_pause() {
    let server = Server::new(8, Manner::default());
    let (device, losses) = device(&server, 1);
    let mut guest = guest(device);
    assert_eq!(guest.ask(0, &read(1, 512))[..512], [2; 512]);
    guest.core.pause().unwrap();
    server.hang_up();
    guest.offer(0, &read(2, 512));
    guest.core.resume().unwrap();
    // Nothing was in flight: the next one goes on where it was.
    assert_eq!(guest.wait_used(0).1[..512], [3; 512]);
    assert!(!asks_for_reset(&guest));
    assert_eq!(losses.lock().unwrap().len(), 1);
}

#[test]
fn another_back_end_has_to_be_like_the_first() {
    let server = Server::new(8, Manner::default());
    let (device, _) = device(&server, 1);
    let mut guest = guest(device);
    server.change(|manner| manner.hidden = 1 << 9);
    server.hang_up();
    guest.wait_needs_reset();
    guest.reset();
    let features = guest.core.registers().offered_features();
    assert!(guest.negotiate(features));
    guest.set_up_queues();
    guest.driver_ok();
    assert!(asks_for_reset(&guest));
}

#[test]
fn memory_that_cannot_be_shared_is_kept() {
    let server = Server::new(8, Manner::default());
    // None of it is shared.
    let mut guest = Guest::new(Box::new(device(&server, 1).0));
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest.set_up_queues();
    guest.driver_ok();
    assert!(asks_for_reset(&guest));
    assert_eq!(server.connections(), 1);
}

#[test]
fn rings_across_two_regions_are_refused() {
    let server = Server::new(8, Manner::default());
    let (device, losses) = device(&server, 1);
    let mut guest = Guest::with_memory(Box::new(device), shared_memory());
    assert!(guest.negotiate(VERSION_1));
    guest.set_up_queues();
    let registers = guest.core.registers_mut();
    registers.select_queue(0);
    registers.write_queue_ready(false);
    let place = (SEAM - 64) as u32;
    registers.write_queue_address(
        vm_virtio::QueueAddress::Descriptors,
        vm_virtio::Half::Low,
        place,
    );
    registers.write_queue_ready(true);
    guest.driver_ok();
    assert!(asks_for_reset(&guest));
    // That was the driver's fault, and not the back end's.
    assert!(losses.lock().unwrap().is_empty());
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(guest.ask(0, &read(1, 512))[..512], [2; 512]);
}

#[test]
fn only_shared_regions_are_told() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x2000).unwrap();
    let with_file = |start, offset| {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        (GuestAddress(start), 0x1000, Some(file))
    };
    let ranges = [
        (GuestAddress(0), 0x1000, None),
        with_file(0x1000, 0x1000),
        with_file(0x8000, 0),
    ];
    let all = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
    all.write_obj(1_u8, GuestAddress(0)).unwrap();
    let told: Vec<_> = memory::regions(&all)
        .unwrap()
        .iter()
        .map(|r| {
            (
                r.guest_phys_addr,
                r.userspace_addr,
                r.memory_size,
                r.mmap_offset,
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            (0x1000, 0x1000, 0x1000, 0x1000),
            (0x8000, 0x8000, 0x1000, 0)
        ]
    );
}

#[test]
fn the_configuration_changes() {
    let server = Server::new(8, Manner::default());
    let mut grown: Arc<AtomicU64> = Arc::default();
    server.change(|manner| grown = manner.grown.clone());
    let (config, _) = config(&server.socket, 1);
    let kind = front::Kind {
        features: u64::MAX,
        config_len: 60,
        answers_all: true,
    };
    let front = front::Front::<TestMemory>::connect(config, kind).unwrap();
    let interrupt = Arc::new(TestInterrupt::default());
    let (events, ends) = front.events();
    let worker = Worker::start("w", vec![events], interrupt.clone(), &spawn()).unwrap();
    assert_eq!(front.space()[0], 8);
    grown.store(5, Ordering::SeqCst);
    let mut channel = ends.channel.unwrap();
    let message = [2_u32, 1, 0].map(u32::to_ne_bytes).concat();
    channel.write_all(&message).unwrap();
    interrupt.wait_for("a change", || (front.space()[0] == 13).then_some(()));
    worker.stop().unwrap();
    assert_eq!(interrupt.config_count(), 1);
}

#[test]
fn a_change_that_nobody_told_is_seen_at_the_next_start() {
    let server = Server::new(8, Manner::default());
    let mut grown: Arc<AtomicU64> = Arc::default();
    server.change(|manner| grown = manner.grown.clone());
    let mut guest = guest(device(&server, 1).0);
    let capacity = |guest: &Guest| {
        let mut byte = [0];
        guest.core.read_config(0, &mut byte);
        byte[0]
    };
    grown.store(5, Ordering::SeqCst);
    assert_eq!(capacity(&guest), 8);
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(capacity(&guest), 13);
}
