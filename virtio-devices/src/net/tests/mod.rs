//! The device between a driver and ends that a test holds.

mod burst;
mod control;
mod tap;
mod wire;

use std::sync::Mutex;

use block_util::BucketConfig;
use net_util::VNET_HEADER_LEN;
use vm_virtio::RegistersV1;
use vm_virtio::feature::VERSION_1;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Descriptor, Guest, Request, SEAM, TestMemory};

use super::config::{CTRL_RX, GUEST_CSUM, MRG_RXBUF};
use super::*;
use wire::{ENDLESS_LEN, Endless, Wire};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const MAC: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);

fn config(pairs: u16, size: u16) -> NetConfig {
    NetConfig {
        id: "_net0".into(),
        mac: MAC,
        mtu: Some(1500),
        queue_pairs: pairs,
        queue_size: size,
        offloads: OFFLOADS,
        limit: RateLimiterConfig::default(),
    }
}

fn device(ends: Vec<Box<dyn PacketQueue>>, size: u16) -> Net<TestMemory> {
    let config = config(u16::try_from(ends.len()).unwrap(), size);
    Net::with_queues(config, OFFLOADS, ends).unwrap()
}

/// A guest with one pair of queues of `size` entries, and those features of `wanted` that there are.
fn running(size: u16, wanted: u64) -> (Guest, Wire) {
    let wire = Wire::new();
    let mut guest = Guest::new(Box::new(device(vec![wire.end()], size)));
    guest.start(wanted);
    (guest, wire)
}

fn packet(len: usize, seed: u32) -> Vec<u8> {
    let body = (0..).map(|n: u32| (n * 7 + seed) as u8);
    [0; VNET_HEADER_LEN]
        .into_iter()
        .chain(body)
        .take(len)
        .collect()
}

fn readable(bytes: Vec<u8>) -> Request {
    Request {
        readable: bytes,
        writable: 0,
    }
}

fn room(writable: u32) -> Request {
    Request {
        readable: Vec::new(),
        writable,
    }
}

/// Waits for a packet in one or more buffers; how many, and the packet.
fn receive(guest: &mut Guest) -> (u16, Vec<u8>) {
    let (_, mut packet) = guest.wait_used(RECEIVE);
    let count = u16::from_le_bytes([packet[10], packet[11]]);
    for _ in 1..count {
        // They are there with the first.
        let (_, more) = guest.take_used(RECEIVE).expect("a part is not there");
        packet.extend(more);
    }
    packet[10..12].fill(0);
    (count, packet)
}

/// How far the device is in the queue for packets to the driver: popped, used.
fn indexes(guest: &Guest) -> (u16, u16) {
    let [registers, _] = guest.core.save("it").unwrap();
    let queue = registers.decode::<RegistersV1>().unwrap().queues[usize::from(RECEIVE)];
    (queue.next_available, queue.next_used)
}

/// The device, given room for packets, of which there are plenty.
struct Receiving;

impl Subject for Receiving {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(device(vec![Box::new(Endless::new())], 256))
    }

    fn queue(&self) -> u16 {
        RECEIVE
    }

    fn request(&self, n: u32) -> Request {
        // What is cut to half of it has room as well.
        let least = 2 * (VNET_HEADER_LEN + ENDLESS_LEN);
        room(least as u32 + n * 37 % 200)
    }

    fn check(&self, _n: u32, answer: &[u8]) {
        assert_eq!(answer.len(), VNET_HEADER_LEN + ENDLESS_LEN);
        assert_eq!(answer[10..12], [1, 0]);
        let (header, body) = answer.split_at(VNET_HEADER_LEN);
        assert_eq!(header[1..10], [0xee; 9]);
        assert!(body.iter().all(|byte| *byte == body[0]), "{body:?}");
    }
}

/// The device, given packets.
struct Sending {
    wire: Wire,
    sent: Mutex<Vec<Vec<u8>>>,
}

impl Sending {
    fn new() -> Self {
        Self {
            wire: Wire::new(),
            sent: Mutex::default(),
        }
    }
}

impl Subject for Sending {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(device(vec![self.wire.end()], 256))
    }

    fn queue(&self) -> u16 {
        TRANSMIT
    }

    fn request(&self, n: u32) -> Request {
        readable(packet(VNET_HEADER_LEN + 60 + n as usize * 37 % 200, n))
    }

    fn check(&self, n: u32, answer: &[u8]) {
        assert!(answer.is_empty());
        let mut sent = self.sent.lock().unwrap();
        sent.extend(std::iter::from_fn(|| self.wire.try_receive()));
        let wanted = self.request(n).readable;
        let place = sent.iter().position(|packet| *packet == wanted);
        sent.remove(place.expect("it was not sent"));
    }
}

vm_virtio::conformance!(receive_queue, Receiving);
vm_virtio::conformance!(transmit_queue, Sending::new());

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs() {
    let (mut guest, wire) = running(256, u64::MAX);
    for _ in 0..40 {
        guest.offer(RECEIVE, &room(100));
    }
    guest.kick(RECEIVE);
    for (len, count) in [(350, 4), (100, 1), (12, 1), (101, 2), (400, 4), (2800, 28)] {
        wire.send(&packet(len, 3));
        assert_eq!(receive(&mut guest), (count, packet(len, 3)));
    }
    // Those that are left are the driver's to take back.
    guest.core.pause().unwrap();
    assert_eq!(indexes(&guest), (40, 40));
}

#[test]
fn buffers_that_are_not_used_stay_in_the_queue() {
    let (mut guest, wire) = running(256, u64::MAX);
    for _ in 0..40 {
        guest.offer(RECEIVE, &room(100));
    }
    guest.kick(RECEIVE);
    wire.send(&packet(250, 1));
    assert_eq!(receive(&mut guest).0, 3);
    guest.core.pause().unwrap();
    assert_eq!(indexes(&guest), (3, 3));
    wire.send(&packet(3700, 2));
    guest.core.resume().unwrap();
    assert_eq!(receive(&mut guest), (37, packet(3700, 2)));
}

#[test]
fn packets_wait_for_buffers() {
    let (mut guest, wire) = running(256, u64::MAX);
    for n in 0..20 {
        wire.send(&packet(200, n));
    }
    for n in 0..20 {
        assert_eq!(guest.take_used(RECEIVE), None);
        guest.offer(RECEIVE, &room(2000));
        guest.kick(RECEIVE);
        assert_eq!(receive(&mut guest), (1, packet(200, n)));
    }
}

#[test]
fn a_packet_longer_than_what_was_given_waits_for_more() {
    for wanted in [u64::MAX, VERSION_1 | MRG_RXBUF | GUEST_CSUM] {
        let (mut guest, wire) = running(256, wanted);
        guest.offer(RECEIVE, &room(100));
        guest.offer(RECEIVE, &room(50));
        guest.kick(RECEIVE);
        wire.send(&packet(350, 5));
        wire.wait_taken();
        wire.send(&packet(20, 6));
        // It is longer than the 1530 bytes of the MTU, too.
        wire.send(&packet(4000, 7));
        // One buffer more is not enough yet; the device wants to hear of others all the same.
        for len in [100, 100, 100, 100, 3000, 3000] {
            guest.offer(RECEIVE, &room(len));
            if guest.queues[usize::from(RECEIVE)].wants_kick(1) {
                guest.kick(RECEIVE);
            }
        }
        assert_eq!(receive(&mut guest), (4, packet(350, 5)));
        assert_eq!(receive(&mut guest), (1, packet(20, 6)));
        assert_eq!(receive(&mut guest), (3, packet(4000, 7)));
    }
}

#[test]
fn a_packet_that_waits_for_buffers_outlives_a_pause_but_no_reset() {
    let (mut guest, wire) = running(256, u64::MAX);
    for reset in [false, true] {
        guest.offer(RECEIVE, &room(100));
        guest.kick(RECEIVE);
        wire.send(&packet(350, 5));
        wire.wait_taken();
        guest.core.pause().unwrap();
        guest.core.resume().unwrap();
        if reset {
            guest.reset();
            guest.start(u64::MAX);
        }
        wire.send(&packet(60, 6));
        guest.offer(RECEIVE, &room(2000));
        guest.kick(RECEIVE);
        let got = if reset {
            (1, packet(60, 6))
        } else {
            (2, packet(350, 5))
        };
        assert_eq!(receive(&mut guest), got);
        if !reset {
            guest.offer(RECEIVE, &room(2000));
            guest.kick(RECEIVE);
            assert_eq!(receive(&mut guest), (1, packet(60, 6)));
        }
    }
}

#[test]
fn packets_of_all_sizes_come_in_order() {
    let (mut guest, wire) = running(256, u64::MAX);
    // Long ones after short ones need more room than was expected; more than one turn of each.
    let sizes = (0..600).map(|n| match n % 150 {
        149 => 40_000,
        n if n > 100 => 3000 + 10 * n,
        n => 60 + n,
    });
    for _ in 0..250 {
        guest.offer(RECEIVE, &room(1500));
    }
    guest.kick(RECEIVE);
    for (n, len) in (0..).zip(sizes) {
        wire.send(&packet(len, n));
        let (count, got) = receive(&mut guest);
        assert!(got == packet(len, n), "packet {n} of {len} bytes");
        assert_eq!(usize::from(count), len.div_ceil(1500));
        if n % 50 == 49 {
            // Nothing is with the device but buffers: all may be had anew.
            guest.reset();
            guest.start(u64::MAX);
            for _ in 0..250 {
                guest.offer(RECEIVE, &room(1500));
            }
            guest.kick(RECEIVE);
        }
    }
}

#[test]
fn a_long_packet_at_the_end_of_a_turn_needs_no_further_event() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.core.pause().unwrap();
    for _ in 0..200 {
        guest.offer(RECEIVE, &room(1500));
    }
    for n in 0..63 {
        wire.send(&packet(60, n));
    }
    wire.send(&packet(20_000, 63));
    guest.core.resume().unwrap();
    for n in 0..63 {
        assert_eq!(receive(&mut guest), (1, packet(60, n)));
    }
    assert!(receive(&mut guest) == (14, packet(20_000, 63)));
}

#[test]
fn a_packet_that_can_never_fit_does_not_hold_up_others() {
    let (mut guest, wire) = running(4, u64::MAX);
    for _ in 0..4 {
        guest.offer(RECEIVE, &room(100));
    }
    guest.kick(RECEIVE);
    wire.send(&packet(401, 1));
    wire.send(&packet(400, 2));
    assert_eq!(receive(&mut guest), (4, packet(400, 2)));
}

#[test]
fn without_merging_a_packet_has_one_buffer() {
    let (mut guest, wire) = running(256, VERSION_1);
    for _ in 0..3 {
        guest.offer(RECEIVE, &room(1530));
    }
    guest.kick(RECEIVE);
    wire.send(&packet(1531, 1));
    // Flags of checksums are nothing to this driver, and there is one buffer.
    let mut sent = packet(1530, 2);
    sent[..12].fill(0xee);
    wire.send(&sent);
    let (_, got) = guest.wait_used(RECEIVE);
    assert_eq!(
        got[..12],
        [0, 238, 238, 238, 238, 238, 238, 238, 238, 238, 1, 0]
    );
    assert_eq!(got[12..], sent[12..]);
}

#[test]
fn what_is_no_packet_is_not_received() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.offer(RECEIVE, &room(100));
    guest.kick(RECEIVE);
    wire.send(&[1; VNET_HEADER_LEN - 1]);
    wire.send(&packet(60, 1));
    assert_eq!(receive(&mut guest), (1, packet(60, 1)));
}

#[test]
fn a_buffer_without_room_for_the_header_wants_a_reset() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.offer(RECEIVE, &room(100));
    guest.offer(RECEIVE, &room(VNET_HEADER_LEN as u32 - 1));
    guest.kick(RECEIVE);
    guest.wait_needs_reset();
    // Others go on.
    guest.ask(TRANSMIT, &readable(packet(60, 1)));
    assert_eq!(wire.receive(), packet(60, 1));
}

#[test]
fn a_buffer_in_too_many_pieces_wants_a_reset() {
    let (mut guest, wire) = running(256, u64::MAX);
    let table = guest.room(16 * 1024);
    let at = guest.room(1024);
    // Two of them lie across two regions of memory.
    let mut pieces: Vec<_> = (0..1020).map(|n| Descriptor::writable(at + n, 1)).collect();
    pieces.extend([Descriptor::writable(SEAM - 8, 16); 2]);
    let queue = &mut guest.queues[usize::from(RECEIVE)];
    queue.add_indirect(table, &pieces).unwrap();
    guest.kick(RECEIVE);
    wire.send(&packet(60, 1));
    guest.wait_needs_reset();
}

#[test]
fn packets_wait_for_the_host() {
    let (mut guest, wire) = running(256, u64::MAX);
    for n in 0..200 {
        guest.offer(TRANSMIT, &readable(packet(4000, n)));
    }
    guest.kick(TRANSMIT);
    // The socket takes fewer than all. None is lost, none comes twice, over a pause either.
    let first = guest.wait_used(TRANSMIT);
    assert_eq!(first.0.len, 0);
    guest.core.pause().unwrap();
    let used = guest.queues[usize::from(TRANSMIT)].used_index();
    assert!(used < 200, "the host took all {used}");
    guest.core.resume().unwrap();
    for n in 0..200 {
        assert_eq!(wire.receive(), packet(4000, n));
    }
    for _ in 1..200 {
        guest.wait_used(TRANSMIT);
    }
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn more_packets_than_a_turn_are_sent_without_another_notification() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.core.pause().unwrap();
    for n in 0..200 {
        guest.offer(TRANSMIT, &readable(packet(60, n)));
    }
    guest.core.resume().unwrap();
    for n in 0..200 {
        guest.wait_used(TRANSMIT);
        assert_eq!(wire.receive(), packet(60, n));
    }
}

#[test]
fn packets_of_a_batch_go_out_in_order() {
    let wire = Wire::new();
    let mut guest = Guest::new(Box::new(device(vec![wire.batch_end()], 256)));
    guest.start(u64::MAX);
    guest.core.pause().unwrap();
    for n in 0..100 {
        guest.offer(TRANSMIT, &readable(packet(60 + n as usize, n)));
        if n % 40 == 7 {
            // Dropped, alone.
            guest.offer(TRANSMIT, &readable(packet(65_566, n)));
        }
    }
    guest.core.resume().unwrap();
    for n in 0..100 {
        assert_eq!(wire.receive(), packet(60 + n as usize, n));
    }
    for _ in 0..103 {
        guest.wait_used(TRANSMIT);
    }
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn packets_of_a_batch_before_a_fault_are_sent() {
    let wire = Wire::new();
    let mut guest = Guest::new(Box::new(device(vec![wire.batch_end()], 256)));
    guest.start(u64::MAX);
    for n in 0..5 {
        guest.offer(TRANSMIT, &readable(packet(60, n)));
    }
    guest.offer(TRANSMIT, &readable(vec![0; VNET_HEADER_LEN - 1]));
    guest.kick(TRANSMIT);
    guest.wait_needs_reset();
    for n in 0..5 {
        assert_eq!(wire.receive(), packet(60, n));
    }
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn no_more_packets_move_than_the_limit_allows() {
    let wire = Wire::new();
    let operations = BucketConfig {
        size: 5,
        one_time_burst: 2,
        refill: std::time::Duration::from_secs(100_000),
    };
    let config = NetConfig {
        limit: RateLimiterConfig {
            bandwidth: None,
            operations: Some(operations),
        },
        ..config(1, 256)
    };
    let net = Net::with_queues(config, OFFLOADS, vec![wire.batch_end()]).unwrap();
    let mut guest = Guest::new(Box::new(net));
    guest.start(u64::MAX);
    for n in 0..20 {
        guest.offer(TRANSMIT, &readable(packet(60, n)));
        guest.offer(RECEIVE, &room(100));
        wire.send(&packet(60, n));
    }
    guest.kick(TRANSMIT);
    guest.kick(RECEIVE);
    for n in 0..7 {
        assert_eq!(wire.receive(), packet(60, n));
        assert_eq!(receive(&mut guest), (1, packet(60, n)));
    }
    // Whatever the worker was at is done.
    guest.core.pause().unwrap();
    assert_eq!(wire.try_receive(), None);
    assert_eq!(indexes(&guest), (7, 7));
    assert_eq!(guest.queues[usize::from(TRANSMIT)].used_index(), 7);
}

#[test]
fn a_limit_lets_packets_go_on_in_time() {
    let wire = Wire::new();
    let bandwidth = BucketConfig {
        size: 1000,
        one_time_burst: 0,
        refill: std::time::Duration::from_millis(10),
    };
    let config = NetConfig {
        limit: RateLimiterConfig {
            bandwidth: Some(bandwidth),
            operations: None,
        },
        ..config(1, 256)
    };
    let net = Net::with_queues(config, OFFLOADS, vec![wire.end()]).unwrap();
    let mut guest = Guest::new(Box::new(net));
    guest.start(u64::MAX);
    for n in 0..10 {
        guest.offer(TRANSMIT, &readable(packet(700, n)));
        guest.offer(RECEIVE, &room(1000));
        wire.send(&packet(700, n));
    }
    guest.kick(TRANSMIT);
    guest.kick(RECEIVE);
    for n in 0..10 {
        assert_eq!(wire.receive(), packet(700, n));
        assert_eq!(receive(&mut guest), (1, packet(700, n)));
    }
}

#[test]
fn what_the_host_does_not_take_is_dropped() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.ask(TRANSMIT, &readable(packet(65_566, 1)));
    let table = guest.room(16 * 1024);
    let at = guest.room(2000);
    // As many buffers as there can be, two of which lie across two regions of memory.
    let mut pieces: Vec<_> = (0..1021).map(|n| Descriptor::readable(at + n, 1)).collect();
    pieces.extend([Descriptor::readable(SEAM - 8, 16); 2]);
    let queue = &mut guest.queues[usize::from(TRANSMIT)];
    queue.add_indirect(table, &pieces).unwrap();
    guest.kick(TRANSMIT);
    guest.wait_used(TRANSMIT);
    guest.ask(TRANSMIT, &readable(packet(65_565, 2)));
    assert_eq!(wire.receive(), packet(65_565, 2));
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn a_packet_without_a_header_wants_a_reset() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.offer(TRANSMIT, &readable(packet(60, 1)));
    guest.offer(TRANSMIT, &readable(vec![0; VNET_HEADER_LEN - 1]));
    guest.kick(TRANSMIT);
    guest.wait_needs_reset();
    assert_eq!(wire.receive(), packet(60, 1));
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn an_end_that_hangs_up_is_left_alone() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.offer(RECEIVE, &room(100));
    guest.kick(RECEIVE);
    drop(wire);
    // What is sent goes nowhere, and the device goes on.
    for n in 0..10 {
        guest.ask(TRANSMIT, &readable(packet(60, n)));
    }
    assert_eq!(guest.take_used(RECEIVE), None);
    guest.core.pause().unwrap();
}

#[test]
fn what_cannot_be_offered_is_refused_by_name() {
    let refused = |config: NetConfig, ends: usize| {
        let wires: Vec<_> = (0..ends).map(|_| Wire::new()).collect();
        let ends = wires.iter().map(Wire::end).collect();
        let made = Net::<TestMemory>::with_queues(config, OFFLOADS, ends);
        made.err().unwrap().to_string()
    };
    let good = config(1, 256);
    assert_eq!(
        refused(config(0, 256), 0),
        r#"network device "_net0" cannot have 0 pairs of queues: 1 to 256"#
    );
    assert!(refused(config(257, 256), 0).contains("257 pairs"));
    assert_eq!(
        refused(config(2, 256), 1),
        r#"network device "_net0" has 2 pairs of queues, and its host's end has 1"#
    );
    for size in [0, 1, 100] {
        assert!(refused(config(1, size), 1).contains(&format!("queues of {size} entries")));
    }
    let mac = MacAddr::new([1, 0, 0, 0, 0, 0]);
    assert!(
        refused(
            NetConfig {
                mac,
                ..good.clone()
            },
            1
        )
        .contains("of a group")
    );
    let mtu = Some(67);
    assert!(refused(NetConfig { mtu, ..good }, 1).contains("an MTU of 67"));
}

#[test]
fn offloads_are_those_of_the_driver() {
    let (mut guest, wire) = running(256, u64::MAX);
    guest.reset();
    guest.start(VERSION_1 | GUEST_CSUM | CTRL_RX);
    guest.reset();
    guest.start(VERSION_1);
    let told = wire.told.lock().unwrap();
    assert_eq!(told.offloads, [OFFLOADS, Offloads::CSUM, Offloads::empty()]);
    assert!(told.attached.is_empty(), "there is one queue only");
}

#[test]
fn an_end_that_refuses_does_not_start() {
    let wire = Wire::new();
    let mut guest = Guest::new(Box::new(device(vec![wire.end()], 256)));
    wire.told.lock().unwrap().refuse = true;
    assert!(guest.negotiate(VERSION_1));
    guest.set_up_queues();
    guest.driver_ok();
    guest.wait_needs_reset();
    assert!(!guest.core.is_active());
    guest.reset();
    guest.start(u64::MAX);
    guest.ask(TRANSMIT, &readable(packet(60, 1)));
    assert_eq!(wire.receive(), packet(60, 1));
}
