//! What the registers say, and which writes they take.

use vm_virtio::status;

use super::super::MAX_CONFIG;
use super::super::{ByHand, Host, MmioError, VirtioMmioDevice};
use super::driver::{Line, Machine};
use crate::transport::pci::tests::Reverser;
use std::sync::Arc;
use vm_virtio::testing::{memory, spawn};

const NEEDS_RESET: u32 = status::NEEDS_RESET as u32;

#[test]
fn the_device_says_what_it_is() {
    let machine = Machine::new(Reverser::boxed(2, 10));
    assert_eq!(machine.read(0), *b"virt");
    let ids = [0x04, 0x08, 0x0c].map(|at| machine.get(at));
    assert_eq!(ids, [2, 0x20, 0x1af4]);
    assert_eq!(machine.get(0x70), 0);
    // Two windows of features, and zeros past them.
    assert_eq!(machine.offered() >> 32 & 1, 1, "VERSION_1");
    machine.set(0x14, 2);
    assert_eq!(machine.get(0x10), 0);
    // Queues are there up to their number.
    for (queue, max) in [(0, 256), (1, 256), (2, 0), (0x1_0000, 0), (u32::MAX, 0)] {
        machine.set(0x30, queue);
        assert_eq!(machine.get(0x34), max, "queue {queue}");
    }
}

#[test]
fn there_are_no_shared_memory_regions_and_no_reset_of_a_queue() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    for region in [0, 1, 255] {
        machine.set(0xac, region);
        let told = [0xb0, 0xb4, 0xb8, 0xbc].map(|at| machine.get(at));
        assert_eq!(told, [u32::MAX; 4]);
    }
    machine.set(0xc0, 1);
    assert_eq!(machine.get(0xc0), 0);
}

#[test]
fn registers_answer_whole_and_in_their_place_only() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    // Parts, pieces, and what only can be written.
    assert_eq!(machine.read::<1>(0), [0]);
    assert_eq!(machine.read::<2>(0), [0; 2]);
    assert_eq!(machine.read::<8>(0), [0; 8]);
    for at in [
        0x01, 0x02, 0xb1, 0x14, 0x20, 0x30, 0x38, 0x50, 0x64, 0x80, 0xa4, 0xac, 0xf8,
    ] {
        assert_eq!(machine.get(at), 0, "{at:#x}");
    }
    machine.write(0x70, &[1]);
    machine.write(0x70, &[1, 0]);
    machine.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    machine.set(0x71, 1);
    // What only can be read.
    for at in [0x00, 0x04, 0x08, 0x10, 0x34, 0x60, 0xfc] {
        machine.set(at, u32::MAX);
    }
    // No status has that many bits.
    machine.set(0x70, 0x101);
    assert_eq!(machine.get(0x70), 0);
    assert_eq!(machine.read(0), *b"virt");
}

#[test]
fn a_queue_is_set_up_before_it_is_ready_and_not_after() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    machine.negotiate();
    machine.set(0x30, 0);
    // No sizes: 0, no power of two, too many, more than 16 bits.
    for size in [0, 3, 512, 0x1_0040] {
        machine.set(0x38, size);
        assert_eq!(machine.device.core().registers().queue_size(), 256);
    }
    machine.set(0x38, 64);
    assert_eq!(machine.device.core().registers().queue_size(), 64);
    for (at, value) in [(0x80, 0x1_0000), (0x90, 0x1_1000), (0xa0, 0x1_2000)] {
        machine.set(at, value);
    }
    machine.set(0x44, 2);
    assert_eq!(machine.get(0x44), 0, "neither ready nor not");
    machine.set(0x44, 1);
    assert_eq!(machine.get(0x44), 1);
    machine.set(0x38, 128);
    assert_eq!(machine.device.core().registers().queue_size(), 64);
    // Before DRIVER_OK it may be taken back (§4.2.2, QueueReady).
    machine.set(0x44, 0);
    assert_eq!(machine.get(0x44), 0);
    machine.set(0x44, 1);
    machine.add_status(status::DRIVER_OK);
    machine.set(0x44, 0);
    assert_eq!(machine.get(0x44), 1, "it is with the device");
    assert_eq!(machine.get(0x70) & NEEDS_RESET, 0);
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    machine.add_status(status::ACKNOWLEDGE);
    machine.add_status(status::DRIVER);
    machine.set(0x24, 0);
    machine.set(0x20, u32::MAX);
    machine.add_status(status::FEATURES_OK);
    assert_eq!(machine.get(0x70), 3);
    machine.set(0x70, 0);
    machine.negotiate();
    // A third window has none.
    machine.set(0x70, 0);
    machine.add_status(status::ACKNOWLEDGE);
    machine.add_status(status::DRIVER);
    machine.set(0x24, 1);
    machine.set(0x20, 1);
    machine.set(0x24, 2);
    machine.set(0x20, 1);
    machine.add_status(status::FEATURES_OK);
    assert_eq!(machine.get(0x70), 3);
}

#[test]
fn rings_in_no_memory_make_it_want_a_reset() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.negotiate();
    machine.set(0x30, 0);
    machine.set(0x84, 1);
    machine.set(0x44, 1);
    machine.add_status(status::DRIVER_OK);
    assert_ne!(machine.get(0x70) & NEEDS_RESET, 0);
    // Which the interrupt tells of.
    assert_eq!((machine.get(0x60), machine.line.take()), (2, 1));
    machine.set(0x70, 0);
    assert_eq!((machine.get(0x70), machine.get(0x60)), (0, 0));
    machine.start();
    assert_eq!(machine.ask(0, b"again", 5), b"niaga");
}

#[test]
fn the_configuration_can_be_accessed_in_any_width() {
    let machine = Machine::new(Reverser::boxed(1, 10));
    assert_eq!(machine.read(0x100), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(machine.read(0x103), [4, 5, 6, 7]);
    assert_eq!(machine.read(0x109), [10]);
    // Past its end there are zeros, up to the end of the page.
    assert_eq!(machine.read(0x108), [9, 10, 0, 0]);
    assert_eq!(machine.read::<8>(0xff8), [0; 8]);
    let before = machine.get(0xfc);
    assert_eq!(machine.get(0xfc), before);
    machine.write(0x101, &[0xaa]);
    machine.write(0x104, &[0xbb, 0xcc]);
    machine.write(0x108, &[0xdd; 4]);
    assert_eq!(machine.read(0x100), [1, 0xaa, 3, 4, 0xbb, 0xcc, 7, 8]);
    assert_eq!(machine.read(0x108), [9, 10], "a write past the end");
    assert_ne!(machine.get(0xfc), before, "another generation");
}

#[test]
fn a_configuration_must_fit_into_the_page() {
    let new = |config_len| {
        let host = Host {
            line: Arc::new(Line::default()),
            notifications: Arc::new(ByHand),
            spawn: spawn(),
            extra_features: 0,
        };
        VirtioMmioDevice::new("it", Reverser::boxed(1, config_len), memory(), host)
    };
    assert!(new(MAX_CONFIG).is_ok());
    let refused = new(MAX_CONFIG + 1).err().unwrap();
    assert!(
        matches!(
            refused,
            MmioError::Device {
                config_len: 0xf01,
                ..
            }
        ),
        "{refused}"
    );
}
