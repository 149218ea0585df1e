//! Both ways to configuration space, in all widths.

use super::*;
use crate::host_bridge::HostBridge;
use crate::testing::{Rig, TestDevice};
use crate::windows::Windows;
use proptest::prelude::*;
use vm_migration::Section;

/// A host bridge, and a function with everything in slot 31.
fn bus() -> Arc<PciBus> {
    let windows = Windows {
        io: Some(0x1000..=0xffff),
        memory32: Some(0xc000_0000..=0xe7ff_ffff),
        memory64: Some(0x10_0000_0000..=0x1f_ffff_ffff),
    };
    let bus = PciBus::new(0, windows, Arc::default(), Arc::default());
    bus.add(Some(0), Arc::new(HostBridge::default())).unwrap();
    bus.add(Some(31), TestDevice::with(0, Rig::new().config))
        .unwrap();
    Arc::new(bus)
}

fn read<const N: usize>(device: &dyn BusDevice, offset: u64) -> [u8; N] {
    let mut data = [0xee; N];
    device.read(offset, &mut data);
    data
}

fn select(ports: &PciConfigIo, address: u32) {
    ports.write(0, &address.to_le_bytes());
}

const SLOT31: u32 = 0x8000_f800;

#[test]
fn the_window_in_all_widths() {
    let ports = PciConfigIo::new(bus());
    select(&ports, ENABLE);
    assert_eq!(read(&ports, 4), [0x86, 0x80, 0x57, 0x0d]);
    select(&ports, SLOT31 | 0x2c);
    assert_eq!(read(&ports, 4), [0x22, 0x11, 0x44, 0x33]);
    assert_eq!(read(&ports, 4), [0x22, 0x11]);
    assert_eq!(read(&ports, 5), [0x11, 0x44]);
    assert_eq!(read(&ports, 6), [0x44, 0x33]);
    assert_eq!(read(&ports, 7), [0x33]);
    assert_eq!(read(&ports, 5), [0x11, 0x44, 0x33]);
    // Past the window.
    assert_eq!(read(&ports, 7), [0xff, 0xff]);
    assert_eq!(read(&ports, 5), [0xff; 4]);
    assert_eq!(read(&ports, 4), [0xff; 8]);
    assert_eq!(read(&ports, u64::MAX), [0xff; 4]);
    // Writes: command by word, interrupt line by byte, a BAR by dword.
    select(&ports, SLOT31 | 0x04);
    ports.write(4, &[0x04, 0x04]);
    assert_eq!(read(&ports, 4), [0x04, 0x04]);
    ports.write(5, &[0x00]);
    assert_eq!(read(&ports, 4), [0x04, 0x00]);
    ports.write(5, &[0xff; 4]);
    ports.write(7, &[0xff; 2]);
    assert_eq!(read(&ports, 4), [0x04, 0x00], "past the window");
    select(&ports, SLOT31 | 0x10);
    ports.write(4, &[0xff; 4]);
    assert_eq!(read(&ports, 4), [0, 0, 0xff, 0xff]);
    // A qword into both changes neither.
    ports.write(0, &[0; 8]);
    assert_eq!(read(&ports, 0), (SLOT31 | 0x10).to_le_bytes());
}

#[test]
fn the_address_register() {
    let ports = PciConfigIo::new(bus());
    assert_eq!(read(&ports, 0), [0; 4]);
    select(&ports, u32::MAX);
    assert_eq!(read(&ports, 0), 0x80ff_fffcu32.to_le_bytes());
    // In parts.
    select(&ports, 0);
    ports.write(3, &[0x80]);
    ports.write(1, &[0xf8]);
    ports.write(0, &[0x2c]);
    assert_eq!(read(&ports, 0), (SLOT31 | 0x2c).to_le_bytes());
    assert_eq!(read(&ports, 1), [0xf8]);
    assert_eq!(read(&ports, 2), [0x00, 0x80]);
    assert_eq!(read(&ports, 4), [0x22, 0x11, 0x44, 0x33]);
    ports.write(2, &[0x01, 0x80]);
    assert_eq!(read(&ports, 0), (SLOT31 | 0x1_002c).to_le_bytes());
    // Into the window.
    ports.write(3, &[0, 0]);
    assert_eq!(read(&ports, 3), [0xff, 0xff]);
    assert_eq!(read(&ports, 3), [0x80]);
}

#[test]
fn a_window_that_is_closed_or_shows_nothing() {
    let ports = PciConfigIo::new(bus());
    for address in [
        SLOT31 & !ENABLE,
        SLOT31 | 0x01_0000,
        SLOT31 | 0x80_0000,
        SLOT31 | 0x100,
        SLOT31 | 0x700,
        SLOT31 - 0x800,
    ] {
        select(&ports, address);
        ports.write(4, &[0xff; 4]);
        assert_eq!(read(&ports, 4), [0xff; 4], "{address:#x}");
        assert_eq!(read(&ports, 7), [0xff], "{address:#x}");
    }
    select(&ports, SLOT31);
    assert_eq!(read(&ports, 4), [0xf4, 0x1a, 0x41, 0x10]);
}

#[test]
fn what_linux_asks_before_it_uses_the_ports() {
    let ports = PciConfigIo::new(bus());
    ports.write(3, &[1]);
    let before = read::<4>(&ports, 0);
    select(&ports, 0x8000_0000);
    assert_eq!(read(&ports, 0), 0x8000_0000u32.to_le_bytes());
    ports.write(0, &before);
    select(&ports, 0x8000_0008);
    assert_eq!(read(&ports, 6), [0x00, 0x06], "a host bridge");
}

#[test]
fn the_address_register_is_saved() {
    let ports = PciConfigIo::new(bus());
    select(&ports, SLOT31 | 0x2c);
    let section = Section::encode("ports", &ports.save()).unwrap();
    let other = PciConfigIo::new(bus());
    other.restore(section.decode().unwrap());
    assert_eq!(read(&other, 4), [0x22, 0x11, 0x44, 0x33]);
    other.restore(PciConfigIoState { address: u32::MAX });
    assert_eq!(other.save().address, ADDRESS_BITS);
}

#[test]
fn memory_reaches_the_same() {
    let bus = bus();
    let memory = PciConfigMmio::new(bus.clone());
    let slot = 31 << 15;
    assert_eq!(read(&memory, 0), [0x86, 0x80, 0x57, 0x0d]);
    assert_eq!(read(&memory, slot), [0xf4, 0x1a, 0x41, 0x10]);
    assert_eq!(read(&memory, slot + 0x2f), [0x33]);
    assert_eq!(
        read(&memory, slot + 0x2c),
        [0x22, 0x11, 0x44, 0x33, 0, 0, 0, 0]
    );
    memory.write(slot + 0x3c, &[0x0b]);
    let ports = PciConfigIo::new(bus);
    select(&ports, SLOT31 | 0x3c);
    assert_eq!(read(&ports, 4), [0x0b, 1, 0, 0]);
    assert_eq!(
        read(&memory, slot + 0x100),
        [0; 4],
        "no extended capability"
    );
    for nothing in [
        slot + 0x1000,
        slot + 0x7000,
        slot - 0x8000,
        1 << 20,
        (1 << 20) + slot,
        255 << 20,
        ECAM_SIZE - 4,
        ECAM_SIZE,
        u64::MAX - 3,
    ] {
        memory.write(nothing, &[0; 4]);
        assert_eq!(read(&memory, nothing), [0xff; 4], "{nothing:#x}");
    }
    // From one function into the next.
    assert_eq!(read(&memory, 0xffe), [0xff; 4]);
    assert_eq!(read(&memory, slot + 0xffe), [0, 0]);
}

proptest! {
    /// Any access by ports and memory: no panic, and what is read-only stays.
    #[test]
    fn any_access(
        accesses in prop::collection::vec(
            (any::<bool>(), any::<bool>(), prop_oneof![0..8u64, 31 << 15..32u64 << 15, 0..ECAM_SIZE, any::<u64>()],
             prop::collection::vec(any::<u8>(), 0..20)),
            0..100,
        ),
    ) {
        let bus = bus();
        let ports = PciConfigIo::new(bus.clone());
        let memory = PciConfigMmio::new(bus);
        select(&ports, SLOT31);
        for (by_port, write, offset, mut data) in accesses {
            let device: &dyn BusDevice = if by_port { &ports } else { &memory };
            if write {
                device.write(offset, &data);
            } else {
                device.read(offset, &mut data);
            }
        }
        let slot = 31 << 15;
        prop_assert_eq!(read(&memory, 0), [0x86, 0x80, 0x57, 0x0d]);
        prop_assert_eq!(read(&memory, slot), [0xf4, 0x1a, 0x41, 0x10]);
        prop_assert_eq!(read(&memory, slot + 8), [1, 0x0a, 0, 2]);
        prop_assert_eq!(read(&memory, slot + 0x2c), [0x22, 0x11, 0x44, 0x33]);
        prop_assert_eq!(read(&memory, slot + 0x34), [0x40, 0, 0, 0]);
        prop_assert_eq!(read(&memory, slot + 0x48), [0x11, 0x54, 3]);
    }
}
