//! What is where: ids, capabilities, registers, and what writes to them change.

use pci::{PciDevice, registers};
use vm_virtio::{feature, status};

use super::super::layout::MAX_QUEUES;
use super::super::{NO_VECTOR, TransportError, VirtioPciDevice};
use super::Reverser;
use super::driver::{Machine, transport};
use vm_virtio::testing::memory;

#[test]
fn ids_are_those_of_a_modern_device() {
    let machine = Machine::new(Reverser::boxed(2, 10));
    assert_eq!(machine.read_config(0), [0xf4, 0x1a, 0x60, 0x10]);
    assert_eq!(machine.read_config(registers::REVISION), [1, 0, 0, 0xff]);
    assert_eq!(
        machine.read_config(registers::SUBSYSTEM_VENDOR),
        [0xf4, 0x1a, 0x60, 0x10]
    );
    assert_eq!(machine.read_config(registers::INTERRUPT_PIN), [0]);
    // A 64-bit BAR, not prefetchable, and nothing else.
    let bars = machine.device.bars();
    assert_eq!(bars.iter().flatten().count(), 1);
    assert_eq!(bars[0].unwrap().size, 0x1_0000);
    assert_eq!(machine.read_config::<1>(registers::BAR0)[0] & 0xf, 4);
}

#[test]
fn capabilities_tell_of_regions_that_do_not_overlap() {
    let machine = Machine::new(Reverser::boxed(3, 10));
    let sizes = [(1, 0x3c), (2, 12), (3, 1), (4, 10)];
    let mut regions = sizes.map(|(kind, size)| {
        let region = machine.region(kind);
        assert_eq!((region.bar, region.size), (0, size), "kind {kind}");
        assert_eq!(region.len, if kind == 2 { 20 } else { 16 });
        (region.offset, region.offset + region.size)
    });
    regions.sort_unstable();
    let msix = machine.msix();
    let control = u16::from_le_bytes(machine.read_config(msix + 2));
    assert_eq!(control, 3, "4 vectors, MSI-X off");
    let table = u32::from_le_bytes(machine.read_config(msix + 4));
    let pending = u32::from_le_bytes(machine.read_config(msix + 8));
    let all = [&regions[..], &[(pending, pending + 8), (table, table + 64)]].concat();
    assert!(all.is_sorted_by(|a, b| a.1 <= b.0), "{all:?}");
    assert!(all.last().unwrap().1 <= 0x1_0000);

    let window = machine.region(5);
    assert_eq!((window.len, window.offset, window.size), (20, 0, 0));
}

#[test]
fn a_device_without_configuration_has_no_capability_for_it() {
    let machine = Machine::new(Reverser::boxed(1, 0));
    let kinds = machine.capabilities();
    let kinds = kinds
        .iter()
        .filter(|(id, _)| *id == registers::CAPABILITY_VENDOR)
        .map(|(_, at)| machine.read_config::<1>(at + 3)[0]);
    assert_eq!(kinds.collect::<Vec<_>>(), [1, 3, 2, 5]);
    assert_eq!(machine.read::<4>(1, 0x2000), [0; 4]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (messages, doorbells) = Default::default();
    let most = transport(
        Reverser::boxed(MAX_QUEUES, 4096),
        &memory(),
        &messages,
        &doorbells,
    );
    assert_eq!(most.bars()[0].unwrap().size, 0x1_0000);
    for (queues, config_len) in [(MAX_QUEUES + 1, 0), (1, 4097)] {
        let device = Reverser::boxed(queues, config_len);
        let host = super::super::Host {
            msi: messages.clone(),
            notifications: doorbells.clone(),
            spawn: vm_virtio::testing::spawn(),
            extra_features: 0,
        };
        let error = VirtioPciDevice::new("big", device, memory(), host)
            .err()
            .unwrap();
        assert!(matches!(error, TransportError::Device { .. }), "{error}");
        assert!(error.to_string().contains("\"big\""));
    }
    assert_eq!(
        VirtioPciDevice::vectors(&*Reverser::boxed(5, 0)),
        6,
        "one for the configuration"
    );
}

#[test]
fn registers_after_a_reset() {
    let machine = Machine::new(Reverser::boxed(2, 4));
    assert_eq!(machine.offered(), feature::RING_FEATURES | 0x15);
    machine.set::<4>(0, 2);
    assert_eq!(machine.get::<4>(4), 0, "there are 64 features");
    assert_eq!(machine.get::<2>(0x10), u64::from(NO_VECTOR));
    assert_eq!(machine.get::<2>(0x12), 2);
    assert_eq!(machine.status(), 0);
    for queue in 0..2 {
        machine.set::<2>(0x16, queue);
        assert_eq!(machine.get::<2>(0x16), queue);
        assert_eq!(machine.get::<2>(0x18), 256);
        assert_eq!(machine.get::<2>(0x1a), u64::from(NO_VECTOR));
        assert_eq!(machine.get::<2>(0x1c), 0);
        assert_eq!(machine.get::<2>(0x1e), queue);
        assert_eq!(machine.get::<8>(0x20), 0);
    }
    // None of it can be written where there is no queue.
    machine.set::<2>(0x16, 2);
    machine.set::<2>(0x1a, 1);
    machine.set::<2>(0x1c, 1);
    machine.set::<8>(0x20, u64::MAX);
    assert_eq!(machine.get::<2>(0x18), 0);
    assert_eq!(machine.get::<2>(0x1a), u64::from(NO_VECTOR));
    assert_eq!(machine.get::<2>(0x1c), 0);
    assert_eq!(machine.get::<2>(0x1e), 0);
    assert_eq!(machine.get::<8>(0x20), 0);
    // Neither queue reset nor notification data.
    assert_eq!(machine.get::<4>(0x38), 0);
    assert_eq!(machine.get::<4>(0x3c), 0);
}

#[test]
fn registers_take_writes_of_their_own_width() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    for (register, value) in [(0x20, 0x1_2345_6780), (0x28, 0x2_0000), (0x30, u64::MAX)] {
        machine.set::<8>(register, value);
        assert_eq!(machine.get::<8>(register), value);
        machine.set::<4>(register + 4, 7);
        assert_eq!(machine.get::<8>(register), value & 0xffff_ffff | 7 << 32);
        // No register is there, or not of that width.
        machine.set::<2>(register, 1);
        machine.set::<1>(register, 1);
        machine.set::<4>(register + 2, 1);
        machine.set::<8>(register + 4, 1);
        assert_eq!(machine.get::<8>(register), value & 0xffff_ffff | 7 << 32);
    }
    machine.set::<2>(0x14, 1);
    machine.set::<4>(0x14, 1);
    assert_eq!(machine.status(), 0);
    for read_only in [4, 0x12, 0x15, 0x1e] {
        let before = machine.get::<2>(read_only);
        machine.set::<2>(read_only, 0x55);
        machine.set::<4>(read_only, 0x55);
        machine.set::<1>(read_only, 0x55);
        assert_eq!(machine.get::<2>(read_only), before);
    }
    // Reads of any width and place.
    assert_eq!(machine.get::<8>(0x12), 0x0100_0000_0000_0001);
}

#[test]
fn vectors_that_there_are_not_become_none() {
    let machine = Machine::new(Reverser::boxed(2, 4));
    for register in [0x10, 0x1a] {
        for vector in [0, 2, 1] {
            machine.set::<2>(register, vector);
            assert_eq!(machine.get::<2>(register), vector);
        }
        machine.set::<2>(register, 3);
        assert_eq!(machine.get::<2>(register), u64::from(NO_VECTOR));
        machine.set::<2>(register, 1);
        machine.set::<2>(register, u64::from(NO_VECTOR));
        assert_eq!(machine.get::<2>(register), u64::from(NO_VECTOR));
    }
}

#[test]
fn an_enabled_queue_stays_as_it_is() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.start();
    let before: [u8; 0x3c] = machine.read(1, 0);
    machine.set::<2>(0x18, 16);
    machine.set::<2>(0x1c, 0);
    for register in [0x20, 0x28, 0x30] {
        machine.set::<8>(register, 0x5000);
    }
    machine.set::<4>(0xc, 0);
    let after: [u8; 0x3c] = machine.read(1, 0);
    assert_eq!(after, before);
    assert_eq!(machine.ask(0, b"abc", 3), b"cba");
}

#[test]
fn features_are_refused_through_the_status() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    assert!(!machine.negotiate(feature::RING_FEATURES | 2));
    machine.set_status(status::DRIVER_OK);
    assert_eq!(machine.status(), status::ACKNOWLEDGE | status::DRIVER);
    machine.set::<1>(0x14, 0);
    // Features past the 64 that there are.
    machine.set::<4>(8, 2);
    machine.set::<4>(0xc, 1);
    assert!(!machine.negotiate(feature::RING_FEATURES));
    machine.set::<1>(0x14, 0);
    assert!(machine.negotiate(feature::RING_FEATURES));
}

#[test]
fn the_configuration_is_the_device_s() {
    let machine = Machine::new(Reverser::boxed(1, 10));
    assert_eq!(machine.read::<4>(4, 0), [1, 2, 3, 4]);
    assert_eq!(machine.read::<4>(4, 8), [9, 10, 0, 0]);
    assert_eq!(machine.read::<8>(4, 0xffc), [0; 8]);
    let generation = machine.get::<1>(0x15);
    assert_eq!(machine.get::<1>(0x15), generation);
    machine.write(4, 3, &[0x77, 0x78]);
    assert_eq!(machine.read::<4>(4, 2), [3, 0x77, 0x78, 6]);
    assert_ne!(machine.get::<1>(0x15), generation);
    // Past the end: nothing.
    machine.write(4, 9, &[1, 2]);
    assert_eq!(machine.read::<2>(4, 9), [10, 0]);
}

#[test]
fn the_window_reaches_the_bar() {
    let machine = Machine::new(Reverser::boxed(1, 10));
    let at = machine.region(5).at;
    let aim = |bar: u8, offset: u32, len: u32| {
        machine.write_config(at + 4, &[bar]);
        machine.write_config(at + 8, &offset.to_le_bytes());
        machine.write_config(at + 12, &len.to_le_bytes());
    };
    let config = machine.region(4).offset;
    aim(0, config, 4);
    assert_eq!(machine.read_config(at + 16), [1, 2, 3, 4]);
    aim(0, config + 6, 2);
    assert_eq!(machine.read_config::<2>(at + 16), [7, 8]);
    machine.write_config(at + 16, &[0x70, 0x80]);
    assert_eq!(machine.read::<4>(4, 5), [6, 0x70, 0x80, 9]);
    aim(0, 0x14, 1);
    machine.write_config(at + 16, &[1]);
    assert_eq!(machine.status(), 1);

    // What it cannot show is left alone, and so are the data.
    for (bar, offset, len) in [
        (1, config, 4),
        (0, config + 1, 2),
        (0, config, 3),
        (0, config, 8),
        (0, config, 0),
        (0, 0x1_0000, 4),
        (0, u32::MAX, 1),
    ] {
        aim(bar, offset, len);
        machine.write_config(at + 16, &[0xaa; 4]);
        assert_eq!(machine.read_config(at + 16), [0xaa; 4]);
        assert_eq!(machine.read::<4>(4, 0), [1, 2, 3, 4]);
    }
}
