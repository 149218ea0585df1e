//! Notifications, the interrupt, and the device's life.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_migration::Section;
use vm_virtio::VirtioInterrupt;
use vm_virtio::testing::memory;

use super::super::MmioError;
use super::driver::{Doorbells, Machine};
use crate::transport::pci::tests::Reverser;

#[test]
fn a_driver_asks_by_doorbell_and_hears_by_the_interrupt() {
    let mut machine = Machine::new(Reverser::boxed(3, 4));
    assert_eq!(machine.doorbells.queues(), [0, 1, 2]);
    machine.start();
    for queue in [0, 2, 1, 2] {
        assert_eq!(machine.ask(queue, b"hello", 16), b"olleh");
    }
    assert!(machine.device.is_active());
    assert_eq!(machine.device.id(), "it");
    let Machine {
        device,
        doorbells,
        bus,
        ..
    } = machine;
    drop((device, bus));
    assert!(doorbells.queues().is_empty(), "they go with the device");
}

#[test]
fn without_doorbells_the_register_takes_notifications() {
    let doorbells = Arc::new(Doorbells::default());
    doorbells.refuse.store(true, Ordering::SeqCst);
    let mut machine = Machine::with(Reverser::boxed(2, 4), memory(), doorbells);
    machine.start();
    assert_eq!(machine.ask(1, b"by hand", 16), b"dnah yb");
    // Where there is no queue, nothing happens; nor for half a number.
    machine.set(0x50, 2);
    machine.set(0x50, u32::MAX);
    machine.write(0x50, &[0, 0]);
    assert_eq!(machine.ask(0, b"12", 2), b"21");
}

#[test]
fn the_interrupt_says_what_it_was_for_until_it_is_acknowledged() {
    let machine = Machine::new(Reverser::boxed(1, 4));
    let interrupt = machine.device.interrupt.clone();
    interrupt.queue(0);
    interrupt.queue(0);
    // An edge each: the driver may have looked between them.
    assert_eq!((machine.line.take(), machine.get(0x60)), (2, 1));
    interrupt.config_changed();
    assert_eq!((machine.line.take(), machine.get(0x60)), (1, 3));
    machine.set(0x64, 1);
    assert_eq!(machine.get(0x60), 2);
    machine.set(0x64, 0);
    machine.set(0x64, !3);
    assert_eq!(machine.get(0x60), 2);
    machine.set(0x64, u32::MAX);
    assert_eq!(machine.get(0x60), 0);
    assert_eq!(machine.line.take(), 0);
}

#[test]
fn a_reset_forgets_everything() {
    let mut machine = Machine::new(Reverser::boxed(2, 4));
    for by_machine in [false, true] {
        machine.start();
        machine.offer(0, b"lost", 4);
        machine.notify(0);
        machine.device.interrupt.config_changed();
        match by_machine {
            true => machine.device.reset().unwrap(),
            false => machine.set(0x70, 0),
        }
        assert!(!machine.device.is_active());
        assert_eq!((machine.get(0x70), machine.get(0x60)), (0, 0));
        machine.set(0x30, 0);
        assert_eq!(machine.get(0x44), 0);
    }
    machine.start();
    assert_eq!(machine.ask(0, b"new", 3), b"wen");
}

#[test]
fn a_paused_device_answers_when_it_goes_on() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.start();
    machine.device.pause().unwrap();
    assert!(!machine.device.is_active());
    machine.offer(0, b"later", 5);
    machine.notify(0);
    assert_eq!(machine.take_answer(0), None);
    machine.device.resume().unwrap();
    assert_eq!(machine.wait_answer(0), b"retal");
}

/// A machine with `other` on the same memory, and what `machine`'s driver knows.
fn moved(machine: Machine, sections: &[Section]) -> Machine {
    let memory = machine.memory.clone();
    let (queues, ..) = (machine.queues, machine.device, machine.bus);
    let mut other = Machine::with(Reverser::boxed(2, 4), memory, Arc::default());
    other.device.restore(sections).unwrap();
    other.queues = queues;
    other
}

#[test]
fn saved_and_restored_it_goes_on() {
    let mut machine = Machine::new(Reverser::boxed(2, 4));
    machine.start();
    assert_eq!(machine.ask(0, b"before", 6), b"erofeb");
    machine.write(0x102, &[0x77]);
    assert!(machine.device.save().is_err(), "it is at work");
    machine.device.pause().unwrap();
    machine.device.interrupt.config_changed();
    let mut sections = machine.device.save().unwrap();
    assert_eq!(sections.len(), 3);
    sections.reverse();
    let mut machine = moved(machine, &sections);
    assert_eq!((machine.get(0x70), machine.get(0x60) & 2), (0xf, 2));
    assert_eq!(machine.read(0x100), [1, 2, 0x77, 4]);
    machine.device.resume().unwrap();
    assert_eq!(machine.ask(0, b"after", 5), b"retfa");
    assert_eq!(machine.ask(1, b"all", 3), b"lla");
}

#[test]
fn what_is_not_its_state_is_refused() {
    let machine = Machine::new(Reverser::boxed(2, 4));
    let sections = machine.device.save().unwrap();
    let refused = |sections: &[Section]| {
        let other = Machine::new(Reverser::boxed(2, 4));
        other.device.restore(sections).unwrap_err()
    };
    for missing in 0..sections.len() {
        let mut some = sections.clone();
        some.remove(missing);
        let error = refused(&some);
        assert!(
            matches!(error, MmioError::State { .. } | MmioError::Mismatch { .. }),
            "{error}"
        );
    }
    let mut more = sections.clone();
    more.push(Section {
        kind: "stranger".into(),
        ..sections[2].clone()
    });
    assert!(matches!(refused(&more), MmioError::Mismatch { .. }));
    let newer: Vec<Section> = sections
        .iter()
        .cloned()
        .map(|section| Section {
            version: 99,
            ..section
        })
        .collect();
    assert!(matches!(refused(&newer), MmioError::State { .. }));
    let three = Machine::new(Reverser::boxed(3, 4));
    let error = three.device.restore(&sections).unwrap_err();
    assert!(matches!(error, MmioError::Core { .. }), "{error}");
}
