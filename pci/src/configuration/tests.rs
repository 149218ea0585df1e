//! The bytes of header and capabilities, and what writing them does.

use super::*;
use crate::testing::{IDENTITY, Rig};
use proptest::prelude::*;

fn bytes<const N: usize>(config: &ConfigurationSpace, offset: u16) -> [u8; N] {
    let mut data = [0xee; N];
    config.read(offset, &mut data);
    data
}

fn dword(config: &ConfigurationSpace, offset: u16) -> u32 {
    u32::from_le_bytes(bytes(config, offset))
}

#[test]
fn the_bytes_of_the_header() {
    let config = Rig::new().config;
    #[rustfmt::skip]
    let expected = [
        0xf4, 0x1a, 0x41, 0x10, // vendor, device
        0x00, 0x00, 0x10, 0x00, // command, status: capabilities
        0x01, 0x0a, 0x00, 0x02, // revision, class
        0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, // 32-bit memory
        0x01, 0x00, 0x00, 0x00, // ports
        0x0c, 0x00, 0x00, 0x00, // 64-bit memory, prefetchable
        0x00, 0x00, 0x00, 0x00,
        0x08, 0x00, 0x00, 0x00, // 32-bit memory, prefetchable
        0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00,
        0x22, 0x11, 0x44, 0x33, // subsystem
        0x00, 0x00, 0x00, 0x00, // no ROM
        0x40, 0x00, 0x00, 0x00, // first capability
        0x00, 0x00, 0x00, 0x00,
        0x00, 0x01, 0x00, 0x00, // INTA#
    ];
    assert_eq!(bytes::<64>(&config, 0), expected);
}

#[test]
fn the_bytes_of_the_capabilities() {
    let rig = Rig::new();
    assert_eq!((rig.vendor_at, rig.msix_at, rig.msi_at), (0x40, 0x48, 0x54));
    #[rustfmt::skip]
    let expected = [
        0x09, 0x48, 0x05, 0xaa, 0xbb, 0, 0, 0,
        0x11, 0x54, 0x03, 0x00, // 4 vectors
        0x04, 0x00, 0x00, 0x00, // table: BAR 4, offset 0
        0x04, 0x08, 0x00, 0x00, // pending bits: BAR 4, offset 0x800
        0x05, 0x00, 0x84, 0x01, // 4 vectors, 64-bit, masks
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0,
    ];
    assert_eq!(bytes::<48>(&rig.config, 0x40), expected);
}

#[test]
fn what_the_guest_can_write_of_the_header() {
    let mut config = Rig::new().config;
    let before = bytes::<256>(&config, 0);
    config.write(0, &[0xff; 0x10]);
    config.write(0x28, &[0xff; 0x18]);
    assert_eq!(bytes::<4>(&config, 0), before[..4]);
    assert_eq!(bytes::<2>(&config, 4), [0x47, 0x05]);
    assert_eq!(bytes::<6>(&config, 6), before[6..12]);
    assert_eq!(bytes::<4>(&config, 0xc), [0xff, 0xff, 0, 0]);
    assert_eq!(bytes::<0x14>(&config, 0x28), before[0x28..0x3c]);
    assert_eq!(bytes::<4>(&config, 0x3c), [0xff, 1, 0, 0]);
    // Half of a byte.
    config.write(0x42, &[0, 0xff, 0xff]);
    assert_eq!(bytes::<3>(&config, 0x42), [5, 0xaf, 0xbb]);
}

#[test]
fn decode_bits_exist_only_with_such_bars() {
    let mut config = ConfigurationBuilder::new(IDENTITY).build();
    config.write(COMMAND, &[0xff, 0xff]);
    assert_eq!(config.command(), 0x0544);
    let mut builder = ConfigurationBuilder::new(IDENTITY);
    builder.bar(3, BarKind::Io, 4).unwrap();
    let mut config = builder.build();
    config.write(COMMAND, &[0xff, 0xff]);
    assert_eq!(config.command(), 0x0545);
    assert!(config.is_bus_master());
}

#[test]
fn errors_are_cleared_by_ones() {
    let mut config = Rig::new().config;
    config.put(STATUS, &[0x10, 0xf9]);
    config.write(STATUS, &[0, 0x80]);
    assert_eq!(bytes::<2>(&config, STATUS), [0x10, 0x79]);
    config.write(STATUS, &[0xff, 0xff]);
    assert_eq!(bytes::<2>(&config, STATUS), [0x10, 0]);
}

#[test]
fn sizes_of_all_kinds() {
    let mut config = Rig::new().config;
    for register in 0..6 {
        config.write(bar_register(register), &[0xff; 4]);
    }
    assert_eq!(dword(&config, 0x10), 0xffff_0000);
    assert_eq!(dword(&config, 0x14), 0xffff_ffe1);
    assert_eq!(dword(&config, 0x18), 0x0000_000c);
    assert_eq!(dword(&config, 0x1c), 0xffff_fffe);
    assert_eq!(dword(&config, 0x20), 0xffff_f008);
    assert_eq!(dword(&config, 0x24), 0, "no BAR");
    // As a driver computes it.
    let wide = u64::from(dword(&config, 0x1c)) << 32 | u64::from(dword(&config, 0x18) & !0xf);
    assert_eq!(!wide + 1, 8 << 30);
}

#[test]
fn sizes_down_to_the_smallest_and_up_to_the_largest() {
    let memory32 = BarKind::Memory32 {
        prefetchable: false,
    };
    let memory64 = BarKind::Memory64 {
        prefetchable: false,
    };
    for (kind, size, low, high) in [
        (BarKind::Io, 4, 0xffff_fffd, None),
        (BarKind::Io, 256, 0xffff_ff01, None),
        (memory32, 16, 0xffff_fff0, None),
        (memory32, 1 << 31, 0x8000_0000, None),
        (memory64, 16, 0xffff_fff4, Some(0xffff_ffff)),
        (memory64, 1 << 31, 0x8000_0004, Some(0xffff_ffff)),
        (memory64, 1 << 32, 0x0000_0004, Some(0xffff_ffff)),
        (memory64, 1 << 63, 0x0000_0004, Some(0x8000_0000)),
    ] {
        let mut builder = ConfigurationBuilder::new(IDENTITY);
        builder.bar(0, kind, size).unwrap();
        let mut config = builder.build();
        config.write(0x10, &[0xff; 8]);
        assert_eq!(dword(&config, 0x10), low, "{kind:?} {size:#x}");
        assert_eq!(dword(&config, 0x14), high.unwrap_or(0));
    }
}

#[test]
fn bars_follow_the_registers() {
    let mut config = Rig::new().config;
    let bar = |config: &ConfigurationSpace, index: usize| config.bars()[index].unwrap();
    config.write(0x10, &0xc123_4567u32.to_le_bytes());
    config.write(0x14, &0x0000_1234u32.to_le_bytes());
    config.write(0x18, &0x4000_0000u32.to_le_bytes());
    // The high half, byte by byte.
    for (at, byte) in (0x1c..).zip(0x0000_0013u32.to_le_bytes()) {
        config.write(at, &[byte]);
    }
    assert_eq!(bar(&config, 0).address, 0xc123_0000);
    assert_eq!(bar(&config, 1).address, 0x1220);
    assert_eq!(bar(&config, 2).address, 0x12_0000_0000, "8 GiB aligned");
    assert_eq!((config.bars()[3], config.bars()[5]), (None, None));
    for (command, io, memory) in [(0, false, false), (1, true, false), (2, false, true)] {
        config.write(COMMAND, &[command, 0]);
        let decoded = [0, 1, 2, 4].map(|index| bar(&config, index).decoded);
        assert_eq!(decoded, [memory, io, memory, memory]);
    }
}

#[test]
fn bars_that_cannot_be() {
    let memory32 = BarKind::Memory32 {
        prefetchable: false,
    };
    let memory64 = BarKind::Memory64 {
        prefetchable: false,
    };
    for (kind, size) in [
        (BarKind::Io, 2),
        (BarKind::Io, 512),
        (BarKind::Io, 0),
        (memory32, 8),
        (memory32, 0x1800),
        (memory32, 1 << 32),
        (memory64, 0),
        (memory64, u64::MAX),
    ] {
        let mut builder = ConfigurationBuilder::new(IDENTITY);
        let error = builder.bar(0, kind, size).err();
        assert_eq!(
            error,
            Some(ConfigurationError::BarSize {
                index: 0,
                kind,
                size
            })
        );
    }
    let mut builder = ConfigurationBuilder::new(IDENTITY);
    builder.bar(1, memory64, 0x1000).unwrap();
    for (index, kind) in [
        (0, memory64),
        (1, memory32),
        (2, memory32),
        (2, memory64),
        (5, memory64),
        (6, memory32),
        (usize::MAX, memory32),
    ] {
        let error = builder.bar(index, kind, 0x1000).err();
        assert_eq!(error, Some(ConfigurationError::BarIndex(index)));
    }
    builder.bar(0, memory32, 0x1000).unwrap();
    builder.bar(5, memory32, 0x1000).unwrap();
}

#[test]
fn capabilities_fill_the_room_there_is() {
    let mut builder = ConfigurationBuilder::new(IDENTITY);
    assert_eq!(
        builder.capability(9, &[0; 3], &[0; 2]),
        Err(ConfigurationError::CapabilityMask {
            id: 9,
            body: 3,
            writable: 2
        })
    );
    assert_eq!(builder.capability(9, &[0; 185], &[0; 185]), Ok(0x40));
    let none = |size| Err(ConfigurationError::CapabilityRoom { id: 9, size });
    assert_eq!(builder.capability(9, &[0; 3], &[0; 3]), none(5));
    assert_eq!(builder.capability(9, &[7; 2], &[0; 2]), Ok(0xfc));
    assert_eq!(builder.capability(9, &[], &[]), none(2));
    let config = builder.build();
    assert_eq!(bytes::<4>(&config, 0xfc), [9, 0, 7, 7]);
    assert_eq!(bytes::<2>(&config, 0x40), [9, 0xfc]);
}

#[test]
fn msix_must_lie_in_its_bars() {
    let rig = Rig::new();
    let memory32 = BarKind::Memory32 {
        prefetchable: false,
    };
    for (bar, kind, size, what) in [
        (3, memory32, 0x1000, "table"),
        (4, BarKind::Io, 0x100, "table"),
        (4, memory32, 0x800, "pending bits"),
    ] {
        let mut builder = ConfigurationBuilder::new(IDENTITY);
        builder.bar(bar, kind, size).unwrap();
        let error = builder.msix(&rig.table);
        assert_eq!(error, Err(ConfigurationError::Msix { what, bar: 4 }));
    }
}

#[test]
fn the_pin_gives_way() {
    let mut rig = Rig::new();
    let (msix, msi) = (rig.msix_at + 3, rig.msi_at + 2);
    let config = &mut rig.config;
    assert!(!config.interrupt_asserted());
    assert!(config.set_interrupt(true));
    assert_eq!(bytes::<1>(config, STATUS), [0x18]);
    for (register, disable, enable) in [(COMMAND + 1, 4, 0), (msix, 0x80, 0), (msi, 1, 0)] {
        config.write(register, &[disable]);
        assert!(!config.interrupt_asserted(), "{register:#x}");
        config.write(register, &[enable]);
        assert!(config.interrupt_asserted(), "{register:#x}");
    }
    assert!(!config.set_interrupt(false));
    let mut pinless = ConfigurationBuilder::new(IDENTITY).build();
    assert!(!pinless.set_interrupt(true));
}

#[test]
fn msix_control_reaches_the_table() {
    let mut rig = Rig::new();
    let at = rig.msix_at;
    rig.config.write(at + 2, &[0xff, 0xff]);
    assert_eq!(bytes::<2>(&rig.config, at + 2), [0x03, 0xc0]);
    assert!(rig.table.enabled());
    assert_eq!(rig.table.control_word(), 0xc003);
    rig.config.write(at, &[0; 4]);
    assert!(!rig.table.enabled());
    assert_eq!(bytes::<4>(&rig.config, at), [0x11, 0x54, 3, 0]);
}

#[test]
fn past_the_end() {
    let mut config = Rig::new().config;
    config.write(0xfe, &[0xff; 8]);
    config.write(0xffff, &[0xff; 8]);
    config.put(0xfe, &[1; 8]);
    assert_eq!(bytes::<4>(&config, 0xfe), [1, 1, 0, 0]);
    assert_eq!(bytes::<4>(&config, 0x100), [0; 4]);
    assert_eq!(bytes::<4>(&config, u16::MAX), [0; 4]);
}

proptest! {
    /// Whatever is written wherever: bits that the guest cannot write stay, reads of any size agree with each other.
    #[test]
    fn read_only_bits_stay(
        writes in prop::collection::vec((0u16..0x110, prop::collection::vec(any::<u8>(), 0..10)), 0..64),
    ) {
        let mut rig = Rig::new();
        let before = bytes::<256>(&rig.config, 0);
        // The tests above say which these are.
        let writable = rig.config.writable;
        for (offset, data) in &writes {
            rig.config.write(*offset, data);
            for bar in rig.config.bars().into_iter().flatten() {
                prop_assert!(bar.address.is_multiple_of(bar.size));
            }
        }
        let after = bytes::<256>(&rig.config, 0);
        for at in 0..256 {
            prop_assert_eq!((before[at] ^ after[at]) & !writable[at], 0, "byte {:#x}", at);
        }
        for at in 0..256u16 {
            prop_assert_eq!(bytes::<1>(&rig.config, at)[0], after[usize::from(at)]);
        }
        // What MSI-X does is what the registers say.
        prop_assert_eq!(rig.table.control_word().to_le_bytes(), bytes::<2>(&rig.config, rig.msix_at + 2));
        prop_assert_eq!(rig.msi.enabled(), bytes::<1>(&rig.config, rig.msi_at + 2)[0] & 1 != 0);
    }
}
