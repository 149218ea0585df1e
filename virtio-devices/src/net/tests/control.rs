//! What a driver asks by the control queue, pairs that come into use and go out of it, the link, and saved state.

use super::super::config::{CTRL_VQ, MQ};
use super::*;

/// With one pair, or without MQ.
const CONTROL: u16 = 2;

/// The device, asked to take an address.
struct Commands(Wire);

impl Subject for Commands {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(device(vec![self.0.end()], 256))
    }

    fn queue(&self) -> u16 {
        CONTROL
    }

    fn request(&self, n: u32) -> Request {
        command(1, 1, &[2, 0, 0, 0, 1, n as u8])
    }

    fn check(&self, _n: u32, answer: &[u8]) {
        // Without the feature it is refused.
        assert!(answer == [0] || answer == [1]);
    }
}

vm_virtio::conformance!(control_queue, Commands(Wire::new()));

fn command(class: u8, number: u8, data: &[u8]) -> Request {
    Request {
        readable: [&[class, number], data].concat(),
        writable: 1,
    }
}

fn wires(count: usize) -> (Vec<Wire>, Vec<Box<dyn PacketQueue>>) {
    let wires: Vec<_> = (0..count).map(|_| Wire::new()).collect();
    let ends = wires.iter().map(Wire::end).collect();
    (wires, ends)
}

fn config_of(guest: &Guest) -> [u8; 12] {
    let mut config = [0; 12];
    guest.core.read_config(0, &mut config);
    config
}

#[test]
fn commands_are_done_or_refused() {
    let (mut guest, wire) = running(256, u64::MAX);
    let tables = |first: u32, second: u32, len: usize| {
        let mut data = first.to_le_bytes().to_vec();
        data.extend(vec![7; 6 * first.min(9) as usize]);
        data.extend(second.to_le_bytes());
        data.resize(len, 7);
        data
    };
    let offloads = |bits: u64| bits.to_le_bytes().to_vec();
    let table: [(u8, u8, Vec<u8>, u8); 25] = [
        // Which packets: the device gives all.
        (0, 0, vec![1], 0),
        (0, 1, vec![0], 0),
        (0, 0, vec![], 1),
        (0, 1, vec![0, 0], 1),
        (0, 2, vec![1], 1),
        (1, 0, tables(0, 0, 8), 0),
        (1, 0, tables(2, 3, 8 + 5 * 6), 0),
        (1, 0, tables(2, 3, 8 + 5 * 6 - 1), 1),
        (1, 0, tables(2, 3, 8 + 5 * 6 + 1), 1),
        (1, 0, tables(u32::MAX, 0, 70), 1),
        (1, 0, tables(1, u32::MAX, 70), 1),
        (1, 0, vec![0; 7], 1),
        // An address.
        (1, 1, vec![2, 9, 8, 7, 6, 5], 0),
        (1, 1, vec![2, 9, 8, 7, 6], 1),
        (1, 1, vec![3, 9, 8, 7, 6, 5], 1),
        (1, 2, vec![2, 9, 8, 7, 6, 5], 1),
        // Pairs: there is one, and no such feature.
        (4, 0, vec![1, 0], 1),
        // Offloads.
        (5, 0, offloads(1 << 1 | 1 << 7), 0),
        (5, 0, offloads(1 << 7), 0),
        (5, 0, offloads(1), 1),
        (5, 0, vec![0; 7], 1),
        (5, 1, offloads(0), 1),
        // Classes that are not offered: VLANs, announcements.
        (2, 0, vec![0, 0], 1),
        (3, 0, vec![], 1),
        (255, 255, vec![], 1),
    ];
    for (class, number, data, ack) in table {
        let answer = guest.ask(CONTROL, &command(class, number, &data));
        assert_eq!(answer, [ack], "{class} {number} {data:?}");
    }
    assert_eq!(config_of(&guest)[..6], [2, 9, 8, 7, 6, 5]);
    let told = |wire: &Wire| std::mem::take(&mut wire.told.lock().unwrap().offloads);
    let some = Offloads::CSUM | Offloads::TSO4;
    assert_eq!(told(&wire), [OFFLOADS, some, Offloads::empty()]);
    wire.told.lock().unwrap().refuse = true;
    let all = command(5, 0, &offloads(1 << 1));
    assert_eq!(guest.ask(CONTROL, &all), [1]);
    assert_eq!(guest.ask(CONTROL, &all), [0]);

    guest.reset();
    assert_eq!(config_of(&guest)[..6], MAC.bytes());
    guest.start(VERSION_1 | CTRL_VQ);
    for (class, number, data) in [(0, 0, vec![1]), (1, 1, vec![2; 6]), (5, 0, offloads(0))] {
        let answer = guest.ask(CONTROL, &command(class, number, &data));
        assert_eq!(answer, [1], "the feature was not negotiated");
    }
}

#[test]
fn a_command_that_is_none_wants_a_reset() {
    for bad in [readable(vec![0, 0, 1]), room(1)] {
        let (mut guest, _wire) = running(256, u64::MAX);
        guest.offer(CONTROL, &bad);
        guest.kick(CONTROL);
        guest.wait_needs_reset();
    }
}

/// Room for a packet that comes to a pair, which is there at once or must come.
fn give_room(guest: &mut Guest, pair: u16) {
    guest.offer(2 * pair, &room(2000));
    guest.kick(2 * pair);
}

#[test]
fn pairs_come_into_use_and_go_out_of_it() {
    let (wires, ends) = wires(3);
    let mut guest = Guest::running(Box::new(device(ends, 64)));
    let control = 6;
    let attached = |pair: usize| std::mem::take(&mut wires[pair].told.lock().unwrap().attached);
    let set =
        |guest: &mut Guest, count: u16| guest.ask(control, &command(4, 0, &count.to_le_bytes()));
    assert_eq!([0, 1, 2].map(attached), [vec![], vec![false], vec![false]]);
    // What the driver gives to a pair that is not in use waits there.
    for pair in 0..3 {
        give_room(&mut guest, pair);
        wires[usize::from(pair)].send(&packet(100, pair.into()));
    }
    assert_eq!(guest.wait_used(0).1[12..], packet(100, 0)[12..]);
    for refused in [0, 4, u16::MAX] {
        assert_eq!(set(&mut guest, refused), [1]);
    }
    assert_eq!((guest.take_used(2), guest.take_used(4)), (None, None));
    assert_eq!(set(&mut guest, 3), [0]);
    for pair in 1..3_u16 {
        assert_eq!(
            guest.wait_used(2 * pair).1[12..],
            packet(100, pair.into())[12..]
        );
        guest.ask(2 * pair + 1, &readable(packet(70, pair.into())));
        assert_eq!(wires[usize::from(pair)].receive(), packet(70, pair.into()));
    }
    assert_eq!([0, 1, 2].map(attached), [vec![], vec![true], vec![true]]);
    let offloads = |pair: usize| wires[pair].told.lock().unwrap().offloads.clone();
    assert_eq!(offloads(2).last(), Some(&OFFLOADS));

    // One that refuses leaves all as they were.
    wires[2].told.lock().unwrap().refuse = true;
    assert_eq!(set(&mut guest, 1), [1]);
    assert_eq!([0, 1, 2].map(attached), [vec![], vec![false, true], vec![]]);
    assert_eq!(set(&mut guest, 2), [0]);
    assert_eq!([0, 1, 2].map(attached), [vec![], vec![], vec![false]]);

    // Saved and restored, two are in use.
    let moved = || Box::new(device(wires.iter().map(Wire::end).collect(), 64)) as Box<_>;
    guest = guest.moved_to(moved);
    guest.core.resume().unwrap();
    for pair in [0, 1] {
        give_room(&mut guest, pair);
        wires[usize::from(pair)].send(&packet(90, pair.into()));
        assert_eq!(
            guest.wait_used(2 * pair).1[12..],
            packet(90, pair.into())[12..]
        );
    }
    // A reset leaves one in use, also without MQ, where the control queue is the one after it.
    guest.reset();
    guest.start(u64::MAX);
    let told = [0, 1, 2].map(attached);
    assert_eq!(told, [vec![], vec![false], vec![false]]);
    guest.reset();
    guest.start(!MQ);
    let mac = command(1, 1, &[2, 1, 1, 1, 1, 1]);
    assert_eq!(guest.ask(CONTROL, &mac), [0]);
    assert_eq!(config_of(&guest)[..6], [2, 1, 1, 1, 1, 1]);
}

#[test]
fn a_driver_need_not_have_all_pairs() {
    let (wires, ends) = wires(2);
    let mut guest = Guest::new(Box::new(device(ends, 64)));
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest.set_up_queues();
    for index in [2, 3] {
        let registers = guest.core.registers_mut();
        registers.select_queue(index);
        registers.write_queue_ready(false);
    }
    guest.driver_ok();
    guest.ask(TRANSMIT, &readable(packet(60, 1)));
    assert_eq!(wires[0].receive(), packet(60, 1));
    guest.core.pause().unwrap();
    guest.core.resume().unwrap();
    assert_eq!(guest.ask(4, &command(1, 1, &[2; 6])), [0]);
}

#[test]
fn the_driver_hears_of_the_link() {
    let wire = Wire::new();
    let net = device(vec![wire.end()], 64);
    let control = net.control();
    let mut guest = Guest::running(Box::new(net));
    let up = |guest: &Guest| config_of(guest)[6..8] == [1, 0];
    assert!(up(&guest));
    control.set_link(true);
    assert_eq!(guest.interrupt.config_count(), 0);
    control.set_link(false);
    assert!(!up(&guest));
    assert_eq!(guest.interrupt.config_count(), 1);
    // A change while it is paused is told as it goes on.
    guest.core.pause().unwrap();
    control.set_link(true);
    assert_eq!(guest.interrupt.config_count(), 1);
    guest.core.resume().unwrap();
    assert_eq!(guest.interrupt.config_count(), 2);
    assert!(up(&guest));
    // And one of which it has not heard where it was before.
    control.set_link(false);
    guest = guest.moved_to(|| Box::new(device(vec![wire.end()], 64)));
    guest.core.resume().unwrap();
    assert_eq!((guest.interrupt.config_count(), up(&guest)), (1, true));
}

#[test]
fn what_the_driver_chose_is_restored() {
    let wire = Wire::new();
    let new = || Box::new(device(vec![wire.end()], 64)) as Box<_>;
    let mut guest = Guest::running(new());
    assert_eq!(guest.ask(CONTROL, &command(1, 1, &[2, 3, 3, 3, 3, 3])), [0]);
    let chosen = command(5, 0, &(1_u64 << 1).to_le_bytes());
    assert_eq!(guest.ask(CONTROL, &chosen), [0]);
    guest = guest.moved_to(new);
    assert_eq!(config_of(&guest)[..6], [2, 3, 3, 3, 3, 3]);
    guest.core.resume().unwrap();
    let told = wire.told.lock().unwrap().offloads.clone();
    assert_eq!(told, [OFFLOADS, Offloads::CSUM, Offloads::CSUM]);
}

#[test]
fn more_pairs_than_there_are_cannot_be_restored() {
    let wire = Wire::new();
    let mut net = device(vec![wire.end()], 64);
    let state = NetV1 {
        mac: MAC,
        link_up: true,
        pairs: 2,
        offloads: None,
    };
    let section = Section::encode("net", &state).unwrap();
    let restored = VirtioDevice::<TestMemory>::restore(&mut net, &section);
    assert!(matches!(
        restored,
        Err(MigrationError::TooLong {
            size: 2,
            limit: 1,
            ..
        })
    ));
}
