//! Slots, BARs on the move, and configuration accesses of every shape.

use super::*;
use crate::bar::BarKind;
use crate::registers::{COMMAND_IO, COMMAND_MEMORY};
use crate::testing::{Rig, TestDevice};
use proptest::prelude::*;
use std::sync::Mutex;
use vm_device::BusDeviceMut;

const LOW: u64 = 0xc000_0000;
const HIGH: u64 = 0x10_0000_0000;
const MEMORY32: BarKind = BarKind::Memory32 {
    prefetchable: false,
};
const MEMORY64: BarKind = BarKind::Memory64 { prefetchable: true };
const BOTH: u16 = COMMAND_IO | COMMAND_MEMORY;

fn windows() -> Windows {
    Windows {
        io: Some(0x1000..=0xffff),
        memory32: Some(LOW..=0xe7ff_ffff),
        memory64: Some(HIGH..=0x1f_ffff_ffff),
    }
}

fn new_bus() -> PciBus {
    PciBus::new(0, windows(), Arc::default(), Arc::default())
}

/// The byte at `address` of memory, if a BAR answers there.
fn peek(bus: &Bus, address: u64) -> Option<u8> {
    let mut byte = [0];
    bus.read(address, &mut byte).then_some(byte[0])
}

fn set_bar(bus: &PciBus, slot: u8, bar: usize, address: u64) {
    let bytes = address.to_le_bytes();
    bus.write_config(slot, 0, bar_register(bar), &bytes[..4]);
    if address > u64::from(u32::MAX) {
        bus.write_config(slot, 0, bar_register(bar + 1), &bytes[4..]);
    }
}

fn set_command(bus: &PciBus, slot: u8, command: u16) {
    bus.write_config(slot, 0, COMMAND, &command.to_le_bytes());
}

fn register(bus: &PciBus, slot: u8, offset: u16) -> u32 {
    let mut data = [0; 4];
    bus.read_config(slot, 0, offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn slots_are_given_and_taken_back() {
    let bus = new_bus();
    let device = || TestDevice::new(0, &[]);
    assert_eq!(bus.add(None, device()), Ok(1), "0 is the host bridge's");
    assert_eq!(bus.add(Some(3), device()), Ok(3));
    assert_eq!(bus.add(Some(3), device()), Err(PciBusError::SlotTaken(3)));
    assert_eq!(
        bus.add(Some(32), device()),
        Err(PciBusError::SlotOutside(32))
    );
    assert_eq!(bus.add(None, device()), Ok(2));
    assert_eq!(bus.taken_slots(), 0b1110);
    for slot in 4..32 {
        assert_eq!(bus.add(None, device()), Ok(slot));
    }
    assert_eq!(bus.add(None, device()), Err(PciBusError::NoSlot(0)));
    assert_eq!(bus.add(Some(0), device()), Ok(0));
    bus.remove(17).unwrap();
    assert_eq!(bus.remove(17).err(), Some(PciBusError::SlotEmpty(17)));
    assert_eq!(bus.remove(200).err(), Some(PciBusError::SlotEmpty(200)));
    assert!(bus.device(17).is_none() && bus.device(255).is_none());
    assert_eq!(register(&bus, 17, 0), u32::MAX);
    assert_eq!(bus.add(None, device()), Ok(17));
    assert_eq!(bus.bdf(17).to_string(), "0000:00:11.0");
}

#[test]
fn bars_get_addresses_and_answer_when_enabled() {
    let bus = new_bus();
    let bars = [
        (0, MEMORY32, 0x1000),
        (1, BarKind::Io, 0x20),
        (2, MEMORY64, 0x10_0000),
        (4, MEMORY32, 0x1_0000),
    ];
    let device = TestDevice::new(0x05, &bars);
    let slot = bus.add(None, device.clone()).unwrap();
    // The largest first, each at a multiple of its size.
    let expected = [(0, LOW + 0x1_0000), (1, 0x1000), (2, HIGH), (4, LOW)];
    for (index, address) in expected {
        assert_eq!(device.bars()[index].unwrap().address, address);
        assert_eq!(bus.bar_address(slot, index), None, "not enabled");
    }
    assert_eq!(peek(&bus.memory, LOW), None);
    set_command(&bus, slot, COMMAND_MEMORY);
    assert_eq!(peek(&bus.memory, LOW + 0x1_0003), Some(0x06));
    assert_eq!(peek(&bus.memory, HIGH + 1), Some(0x24));
    assert_eq!(peek(&bus.memory, LOW + 0xffff), Some(0xba));
    assert_eq!(peek(&bus.ports, 0x1000), None);
    set_command(&bus, slot, BOTH);
    assert_eq!(peek(&bus.ports, 0x101f), Some(0x0a));
    assert_eq!(peek(&bus.ports, 0x1020), None);
    assert!(bus.memory.write(HIGH + 0xffffc, &[1, 2, 3, 4]));
    assert_eq!(
        *device.writes.lock().unwrap(),
        [(2, 0xffffc, vec![1, 2, 3, 4])]
    );
    set_command(&bus, slot, COMMAND_IO);
    assert_eq!(peek(&bus.memory, LOW), None);
    assert_eq!(peek(&bus.ports, 0x1000), Some(0x15));
    bus.remove(slot).unwrap();
    assert_eq!(peek(&bus.ports, 0x1000), None);
    let moves = device.take_moves();
    let (come, gone): (Vec<_>, Vec<_>) = moves.into_iter().partition(|(_, _, mapped)| *mapped);
    assert_eq!(come.len(), 4);
    assert_eq!(
        gone.iter().map(|(bar, ..)| *bar).collect::<Vec<_>>(),
        [0, 2, 4, 1]
    );
}

#[test]
fn room_that_lacks() {
    let narrow = Windows {
        memory32: Some(LOW..=LOW + 0x2fff),
        ..Windows::default()
    };
    let bus = PciBus::new(7, narrow, Arc::default(), Arc::default());
    let wide = TestDevice::new(0, &[(0, MEMORY64, 0x1000)]);
    assert_eq!(bus.add(None, wide.clone()), Ok(1), "64-bit below 4 GiB");
    assert_eq!(wide.bars()[0].unwrap().address, LOW);
    let large = TestDevice::new(0, &[(0, MEMORY32, 0x1000), (1, MEMORY32, 0x2000)]);
    let error = bus.add(None, large.clone()).unwrap_err();
    assert!(matches!(
        error,
        PciBusError::NoAddress {
            slot: 2,
            source: AllocatorError::NoAddress { size: 0x2000, .. }
        }
    ));
    assert_eq!(large.bars()[0].unwrap().address, 0, "nothing was given");
    assert_eq!(bus.taken_slots(), 0b10);
    let ports = TestDevice::new(0, &[(0, BarKind::Io, 4)]);
    assert!(bus.add(None, ports).is_err(), "no ports at all");
}

#[test]
fn new_devices_keep_clear_of_where_the_guest_moved_others() {
    let bus = new_bus();
    let first = TestDevice::new(1, &[(0, MEMORY32, 0x1000)]);
    let slot = bus.add(None, first).unwrap();
    set_bar(&bus, slot, 0, LOW + 0x1000);
    let second = TestDevice::new(2, &[(0, MEMORY32, 0x1000), (1, MEMORY32, 0x1000)]);
    bus.add(None, second.clone()).unwrap();
    let addresses = second.bars().map(|bar| bar.map(|bar| bar.address));
    assert_eq!(addresses[..2], [Some(LOW), Some(LOW + 0x2000)]);
}

#[test]
fn the_guest_moves_a_bar() {
    let bus = new_bus();
    let device = TestDevice::new(0, &[(0, MEMORY32, 0x1000), (2, MEMORY64, 0x1000)]);
    let slot = bus.add(None, device.clone()).unwrap();
    set_command(&bus, slot, COMMAND_MEMORY);
    device.take_moves();
    set_bar(&bus, slot, 0, 0xd000_0000);
    assert_eq!(
        device.take_moves(),
        [(0, LOW, false), (0, 0xd000_0000, true)]
    );
    assert_eq!(peek(&bus.memory, LOW), None);
    assert_eq!(peek(&bus.memory, 0xd000_0fff), Some(0xff));
    // With decoding off, both halves at leisure.
    set_command(&bus, slot, 0);
    device.take_moves();
    set_bar(&bus, slot, 2, HIGH + 0x5000);
    assert_eq!(device.take_moves(), []);
    set_command(&bus, slot, COMMAND_MEMORY);
    assert_eq!(bus.bar_address(slot, 2), Some(HIGH + 0x5000));
    // With decoding on, by way of nowhere.
    set_bar(&bus, slot, 2, HIGH + 0x3_0000_6000);
    assert_eq!(bus.bar_address(slot, 2), Some(HIGH + 0x3_0000_6000));
    assert_eq!(peek(&bus.memory, HIGH + 0x5000), None);
    // Byte by byte.
    for (at, byte) in (0x10..).zip(0xc123_4000u32.to_le_bytes()) {
        bus.write_config(slot, 0, at, &[byte]);
    }
    assert_eq!(bus.bar_address(slot, 0), Some(0xc123_4000));
}

#[test]
fn sizing_with_decoding_on_leads_away_and_back() {
    let bus = new_bus();
    let bars = [
        (0, MEMORY32, 0x1000),
        (1, BarKind::Io, 0x20),
        (2, MEMORY64, 0x4000),
    ];
    let slot = bus.add(None, TestDevice::new(0, &bars)).unwrap();
    set_command(&bus, slot, BOTH);
    for index in [0, 1, 2, 3] {
        let at = bar_register(index);
        let before = register(&bus, slot, at);
        let there = bus.bar_address(slot, index.min(2));
        assert!(there.is_some());
        bus.write_config(slot, 0, at, &[0xff; 4]);
        let sizes = [0xffff_f000, 0xffff_ffe1, 0xffff_c00c, 0xffff_ffff];
        assert_eq!(register(&bus, slot, at), sizes[index]);
        let bar = index.min(2);
        // Half of a 64-bit address can be one in the window.
        let between = (index == 2).then_some(0x10_ffff_c000);
        assert_eq!(bus.bar_address(slot, bar), between);
        bus.write_config(slot, 0, at, &before.to_le_bytes());
        assert_eq!(bus.bar_address(slot, bar), there);
    }
}

#[test]
fn an_overlap_is_refused_until_it_ends() {
    let bus = new_bus();
    let one = TestDevice::new(1, &[(0, MEMORY32, 0x1000)]);
    let two = TestDevice::new(2, &[(0, MEMORY32, 0x4000)]);
    let first = bus.add(None, one.clone()).unwrap();
    let second = bus.add(None, two).unwrap();
    set_command(&bus, first, COMMAND_MEMORY);
    set_command(&bus, second, COMMAND_MEMORY);
    let theirs = bus.bar_address(second, 0).unwrap();
    one.take_moves();
    set_bar(&bus, first, 0, theirs + 0x3000);
    assert_eq!(one.take_moves(), [(0, LOW, false)], "nowhere");
    assert_eq!(bus.bar_address(first, 0), None);
    assert_eq!(
        register(&bus, first, 0x10),
        (theirs + 0x3000) as u32,
        "the register is the guest's"
    );
    assert_eq!(peek(&bus.memory, theirs + 0x3000), Some(2));
    // The other one leaves.
    set_command(&bus, second, 0);
    assert_eq!(bus.bar_address(first, 0), Some(theirs + 0x3000));
    assert_eq!(peek(&bus.memory, theirs + 0x3000), Some(1));
    // And cannot come back over it, until this one is unplugged.
    set_command(&bus, second, COMMAND_MEMORY);
    assert_eq!(bus.bar_address(second, 0), None);
    bus.remove(first).unwrap();
    assert_eq!(bus.bar_address(second, 0), Some(theirs));
}

#[test]
fn two_bars_change_places() {
    let bus = new_bus();
    let device = TestDevice::new(0, &[(0, MEMORY32, 0x1000), (1, MEMORY32, 0x1000)]);
    let slot = bus.add(None, device).unwrap();
    set_command(&bus, slot, COMMAND_MEMORY);
    let (a, b) = (LOW, LOW + 0x1000);
    set_bar(&bus, slot, 0, b);
    assert_eq!(
        [0, 1].map(|bar| bus.bar_address(slot, bar)),
        [None, Some(b)]
    );
    set_bar(&bus, slot, 1, a);
    let after = [0, 1].map(|bar| bus.bar_address(slot, bar));
    assert_eq!(after, [Some(b), Some(a)]);
    assert_eq!(peek(&bus.memory, a), Some(0x10));
}

/// A device of the machine's own.
struct Fixed;

impl BusDeviceMut for Fixed {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xf1);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

#[test]
fn bars_stay_in_their_windows_and_off_other_devices() {
    let bus = new_bus();
    bus.memory
        .insert(0xd000_0800, 0x10, Arc::new(Mutex::new(Fixed)))
        .unwrap();
    let bars = [
        (0, MEMORY32, 0x1000),
        (1, BarKind::Io, 0x100),
        (2, MEMORY64, 0x2000),
    ];
    let slot = bus.add(None, TestDevice::new(0, &bars)).unwrap();
    set_command(&bus, slot, BOTH);
    let ends = |index, address| {
        set_bar(&bus, slot, index, address);
        bus.bar_address(slot, index)
    };
    for nowhere in [
        0,
        LOW - 0x1000,
        0xe800_0000,
        0xfee0_0000,
        0xffff_f000,
        0xd000_0000,
    ] {
        assert_eq!(ends(0, nowhere), None, "{nowhere:#x}");
    }
    assert_eq!(ends(0, 0xe7ff_f000), Some(0xe7ff_f000), "the last place");
    for nowhere in [0, 0xf00, 0xcf00, 0x1_0000, 0xffff_ff00] {
        let there = ends(1, nowhere);
        assert_eq!(there.is_some(), nowhere == 0xcf00, "{nowhere:#x}");
    }
    for nowhere in [
        HIGH - 0x2000,
        0x1_0000_0000,
        0x20_0000_0000,
        u64::MAX - 0x1fff,
        0x8000_0000_0000_0000,
    ] {
        assert_eq!(ends(2, nowhere), None, "{nowhere:#x}");
    }
    assert_eq!(ends(2, 0x1f_ffff_e000), Some(0x1f_ffff_e000));
    assert_eq!(peek(&bus.memory, 0xd000_0800), Some(0xf1));
}

#[test]
fn a_device_can_refuse_an_address() {
    let bus = new_bus();
    let device = TestDevice::new(0, &[(0, MEMORY32, 0x1000)]);
    *device.refuse.lock().unwrap() = Some(LOW);
    let slot = bus.add(None, device.clone()).unwrap();
    set_command(&bus, slot, COMMAND_MEMORY);
    assert_eq!(bus.bar_address(slot, 0), None);
    assert_eq!(peek(&bus.memory, LOW), None);
    set_bar(&bus, slot, 0, LOW + 0x1000);
    assert_eq!(bus.bar_address(slot, 0), Some(LOW + 0x1000));
    assert_eq!(device.take_moves(), [(0, LOW + 0x1000, true)]);
}

#[test]
fn a_restored_device_answers_where_it_did() {
    let bus = new_bus();
    let bars = [(0, MEMORY32, 0x1000), (2, MEMORY64, 0x1000)];
    let device = TestDevice::new(0, &bars);
    let slot = bus.add(None, device.clone()).unwrap();
    set_bar(&bus, slot, 0, 0xd000_0000);
    set_bar(&bus, slot, 2, HIGH + 0x7000);
    set_command(&bus, slot, COMMAND_MEMORY);
    let state = device.config.lock().unwrap().save();
    let elsewhere = new_bus();
    let again = TestDevice::new(0, &bars);
    again.config.lock().unwrap().restore(&state).unwrap();
    elsewhere.add(Some(slot), again).unwrap();
    assert_eq!(elsewhere.bar_address(slot, 0), Some(0xd000_0000));
    assert_eq!(elsewhere.bar_address(slot, 2), Some(HIGH + 0x7000));
    // Restored where it is.
    elsewhere.remove(slot).unwrap();
    let third = TestDevice::new(0, &bars);
    elsewhere.add(Some(slot), third.clone()).unwrap();
    third.config.lock().unwrap().restore(&state).unwrap();
    assert_eq!(elsewhere.bar_address(slot, 0), None);
    elsewhere.refresh();
    assert_eq!(elsewhere.bar_address(slot, 0), Some(0xd000_0000));
}

#[test]
fn accesses_of_all_sizes() {
    let bus = new_bus();
    let slot = bus
        .add(None, TestDevice::with(0, Rig::new().config))
        .unwrap();
    let mut all = [0; 64];
    bus.read_config(slot, 0, 0, &mut all);
    assert_eq!(all[..4], [0xf4, 0x1a, 0x41, 0x10]);
    for offset in 0..60u16 {
        for len in 0..=8 {
            let mut data = vec![0xee; len];
            bus.read_config(slot, 0, offset, &mut data);
            let at = usize::from(offset);
            let end = 64.min(at + len);
            assert_eq!(data[..end - at], all[at..end]);
        }
    }
    // A write across dwords: cache line size, and the first BAR after it.
    bus.write_config(slot, 0, 0x0c, &[0x10, 0, 0, 0, 0, 0, 0xab, 0xcd]);
    assert_eq!(register(&bus, slot, 0x0c), 0x10);
    assert_eq!(register(&bus, slot, 0x10), 0xcdab_0000);
    assert_eq!(register(&bus, slot, 0xffc), 0, "no extended capability");
    for (slot, function, offset, len) in [
        (slot, 1, 0, 4),
        (slot, 7, 0, 4),
        (slot + 1, 0, 0, 4),
        (255, 0, 0, 4),
        (slot, 0, 0xffd, 4),
        (slot, 0, 0x1000, 1),
        (slot, 0, u16::MAX, 8),
        (slot, 0, 0, 4097),
    ] {
        let mut data = vec![0; len];
        bus.write_config(slot, function, offset, &data);
        bus.read_config(slot, function, offset, &mut data);
        assert_eq!(data, vec![0xff; len]);
    }
    assert_eq!(register(&bus, slot, 0x10), 0xcdab_0000, "nothing written");
}

#[test]
fn segments_are_found_by_number() {
    let mut segments = Segments::default();
    let new = |id| Arc::new(PciBus::new(id, windows(), Arc::default(), Arc::default()));
    segments.add(new(0)).unwrap();
    segments.add(new(5)).unwrap();
    assert_eq!(segments.add(new(5)), Err(PciBusError::SegmentTwice(5)));
    assert_eq!(segments.get(5).unwrap().bdf(2).to_string(), "0005:00:02.0");
    assert!(segments.get(1).is_none());
    assert_eq!(
        segments.iter().map(|bus| bus.segment()).collect::<Vec<_>>(),
        [0, 5]
    );
}

fn access() -> impl Strategy<Value = (u8, u16, Vec<u8>)> {
    let offset = prop_oneof![
        3 => (4..10u16).prop_map(|dword| dword * 4),
        1 => 0..0x110u16,
        1 => any::<u16>(),
    ];
    let address = prop_oneof![
        (0..8u32).prop_map(|page| 0xc000_0000 + page * 0x1000),
        (0..8u32).prop_map(|port| 0x1000 + port * 0x20),
        Just(0x10),
        Just(u32::MAX),
        Just(3),
        any::<u32>(),
    ];
    let data = prop_oneof![
        3 => address.prop_map(|address| address.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..12),
    ];
    (0..5u8, offset, data)
}

proptest! {
    /// Whatever is written: a BAR answers where its register says, in its window and alone, or something is in its way.
    #[test]
    fn bars_answer_where_they_should(writes in prop::collection::vec(access(), 0..60)) {
        let bus = new_bus();
        let bars = [
            (0, MEMORY32, 0x1000),
            (1, BarKind::Io, 0x20),
            (2, MEMORY64, 0x2000),
            (4, MEMORY32, 0x4000),
        ];
        let devices: Vec<_> = (1..4u8).map(|slot| {
            let device = TestDevice::new(slot, &bars);
            bus.add(Some(slot), device.clone()).unwrap();
            set_command(&bus, slot, BOTH);
            device
        }).collect();
        for (slot, offset, data) in &writes {
            bus.write_config(*slot, 0, *offset, data);
        }
        let mut answering = Vec::new();
        let mut silent = Vec::new();
        for (slot, device) in (1..).zip(&devices) {
            let mut ids = [0; 4];
            bus.read_config(slot, 0, 0, &mut ids);
            prop_assert_eq!(ids, [0xf4, 0x1a, 0x41, 0x10]);
            for bar in device.bars().into_iter().flatten() {
                match bus.bar_address(slot, bar.index) {
                    Some(address) => {
                        prop_assert_eq!(address, bar.address);
                        prop_assert!(bar.decoded && bus.windows.contain(&bar));
                        let space = bus.bus_of(&bar);
                        let mark = slot ^ (bar.index as u8) << 4;
                        prop_assert_eq!(peek(space, address), Some(mark));
                        prop_assert_eq!(peek(space, address + bar.size - 1), Some(mark ^ (bar.size - 1) as u8));
                        answering.push(bar);
                    }
                    None => silent.push(bar),
                }
            }
            // What the device was told adds up to the same.
            let mut told = [None; BARS];
            for (bar, address, mapped) in device.take_moves() {
                prop_assert_eq!(told[bar], (!mapped).then_some(address));
                told[bar] = mapped.then_some(address);
            }
            for (index, told) in told.into_iter().enumerate() {
                prop_assert_eq!(told, bus.bar_address(slot, index));
            }
        }
        for bar in silent {
            let blocked = answering.iter().any(|other| {
                other.kind.space() == bar.kind.space()
                    && other.address <= bar.last().unwrap_or(u64::MAX)
                    && other.last().unwrap_or(u64::MAX) >= bar.address
            });
            prop_assert!(!bar.decoded || !bus.windows.contain(&bar) || blocked, "{:?}", bar);
        }
    }
}
