//! Notifications, interrupts, and the device's life.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pci::{PciDevice, registers};
use vm_migration::Section;
use vm_virtio::testing::memory;
use vm_virtio::{VirtioInterrupt, status};

use super::super::{NO_VECTOR, TransportError};
use super::Reverser;
use super::driver::{Doorbells, Machine, WINDOW};

#[test]
fn a_driver_asks_by_doorbell_and_hears_by_its_vector() {
    let mut machine = Machine::new(Reverser::boxed(3, 4));
    machine.start();
    for queue in [0, 2, 1, 2] {
        assert_eq!(machine.ask(queue, b"hello", 16), b"olleh");
        assert!(
            machine.messages.take().is_empty(),
            "one message, one vector"
        );
    }
    // The queue's bit is set whether MSI-X is on or not, and reading clears it.
    assert_eq!(machine.read(3, 0), [1]);
    assert_eq!(machine.read(3, 0), [0]);
    assert!(machine.device.is_active());
    assert_eq!(machine.device.id(), "it");
}

#[test]
fn without_doorbells_the_bar_takes_notifications() {
    let doorbells = Arc::new(Doorbells::default());
    doorbells.refuse.store(true, Ordering::SeqCst);
    let mut machine = Machine::with(Reverser::boxed(2, 4), memory(), doorbells, |_| {});
    machine.write_config(registers::COMMAND, &6_u16.to_le_bytes());
    assert!(machine.doorbells.addresses().is_empty());
    machine.start();
    assert_eq!(machine.ask(1, b"by hand", 16), b"dnah yb");
    // Where there is no queue, nothing happens.
    machine.write(2, 8, &[2, 0]);
    machine.write(2, 0xfff, &[1]);
    assert_eq!(machine.ask(0, b"12", 2), b"21");
}

#[test]
fn the_window_can_notify() {
    let mut machine = Machine::new(Reverser::boxed(2, 4));
    machine.start();
    let (at, notify) = (machine.region(5).at, machine.region(2).offset);
    machine.write_config(at + 4, &[0]);
    machine.write_config(at + 8, &(notify + 4).to_le_bytes());
    machine.write_config(at + 12, &2_u32.to_le_bytes());
    machine.queues[1]
        .add(&[vm_virtio::testing::Descriptor::writable(0x9000, 8)])
        .unwrap();
    machine.write_config(at + 16, &[1, 0]);
    let messages = machine.messages.clone();
    assert!(messages.wait_for(|| machine.take_answer(1)).is_empty());
}

#[test]
fn doorbells_follow_the_bar() {
    let machine = Machine::new(Reverser::boxed(3, 4));
    let at = |bar: u64| [0, 4, 8].map(|offset| bar + 0x3000 + offset);
    let first = machine.bar();
    assert_eq!(machine.doorbells.addresses(), at(first));
    assert_eq!(machine.doorbell(2), first + 0x3008);

    let moved = WINDOW + 0x50_0000;
    machine.write_config(registers::BAR0, &(moved as u32).to_le_bytes());
    assert_eq!(machine.bar(), moved);
    assert_eq!(machine.doorbells.addresses(), at(moved));
    // The BAR answers no more.
    machine.write_config(registers::COMMAND, &0_u16.to_le_bytes());
    assert!(machine.doorbells.addresses().is_empty());
    machine.write_config(registers::COMMAND, &2_u16.to_le_bytes());
    assert_eq!(machine.doorbells.addresses(), at(moved));

    machine.bus.remove(machine.slot).unwrap();
    assert!(machine.doorbells.addresses().is_empty());
    // Dropped while it is mapped, it lets go as well.
    machine.device.bar_mapped(0, moved).unwrap();
    assert_eq!(machine.doorbells.addresses(), at(moved));
    let Machine {
        device, doorbells, ..
    } = machine;
    drop(device);
    assert!(doorbells.addresses().is_empty());
}

#[test]
fn masked_vectors_wait() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.start();
    let msix = machine.msix();
    let table = machine.bar() + u64::from(u32::from_le_bytes(machine.read_config(msix + 4)));
    let pending = machine.bar() + u64::from(u32::from_le_bytes(machine.read_config(msix + 8)));
    let mask = table + 16 + 12;
    machine.write_at(mask, &[1, 0, 0, 0]);

    machine.offer(0, b"ab", 2);
    // The ISR status tells of the interrupt that no message does.
    while machine.read::<1>(3, 0) == [0] {
        std::thread::yield_now();
    }
    let answer = loop {
        if let Some(answer) = machine.take_answer(0) {
            break answer;
        }
        std::thread::yield_now();
    };
    assert_eq!(answer, b"ba");
    let mut bits = [0];
    while bits[0] & 2 == 0 {
        assert!(machine.mmio.read(pending, &mut bits));
    }
    assert!(machine.messages.take().is_empty());
    machine.write_at(mask, &[0; 4]);
    assert_eq!(machine.messages.take(), [1]);
    assert!(machine.mmio.read(pending, &mut bits));
    assert_eq!(bits, [0]);
}

#[test]
fn changes_of_the_configuration_have_a_vector_and_a_bit() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.start();
    machine.device.interrupt.config_changed();
    assert_eq!(machine.messages.take(), [0]);
    machine.device.interrupt.queue(0);
    assert_eq!(machine.messages.take(), [1]);
    assert_eq!(machine.read(3, 0), [3]);
    // No vector: only the bit.
    machine.set::<2>(0x10, u64::from(NO_VECTOR));
    machine.device.interrupt.config_changed();
    assert!(machine.messages.take().is_empty());
    // A wide read has the byte, and nothing beside it.
    assert_eq!(machine.read(3, 0), [2, 0, 0, 0]);
    assert_eq!(machine.read(3, 1), [0]);
}

#[test]
fn a_fault_is_told_by_the_vector_of_the_configuration() {
    let mut machine = Machine::new(Reverser::boxed(2, 4));
    machine.start();
    machine.queues[1].offer(9999);
    machine.notify(1);
    let messages = machine.messages.clone();
    messages.wait_for(|| (machine.status() & status::NEEDS_RESET != 0).then_some(()));
    assert_eq!(machine.ask(0, b"xy", 2), b"yx");
    machine.set::<1>(0x14, 0);
    machine.start();
    assert_eq!(machine.ask(1, b"xyz", 3), b"zyx");
}

#[test]
fn a_reset_forgets_vectors_and_isr_but_not_the_bar() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.start();
    assert_eq!(machine.ask(0, b"1", 1), b"1");
    let bar = machine.bar();
    machine.set::<1>(0x14, 0);
    assert!(!machine.device.is_active());
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.get::<2>(0x10), u64::from(NO_VECTOR));
    machine.set::<2>(0x16, 0);
    assert_eq!(machine.get::<2>(0x1a), u64::from(NO_VECTOR));
    assert_eq!(machine.read(3, 0), [0]);
    assert_eq!(machine.bar(), bar);
    machine.start();
    assert_eq!(machine.ask(0, b"12", 2), b"21");
    // As the machine does it.
    machine.device.reset().unwrap();
    assert_eq!((machine.status(), machine.device.is_active()), (0, false));
}

#[test]
fn paused_it_is_still_and_resumed_it_goes_on() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.device.resume().unwrap();
    assert!(!machine.device.is_active(), "there is no driver yet");
    machine.start();
    machine.device.pause().unwrap();
    assert!(!machine.device.is_active());
    machine.offer(0, b"later", 5);
    assert_eq!(machine.take_answer(0), None);
    machine.device.resume().unwrap();
    let messages = machine.messages.clone();
    assert_eq!(messages.wait_for(|| machine.take_answer(0)), b"retal");
}

/// Saves, ends it, and goes on in another machine with the same memory.
fn moved(machine: Machine) -> Machine {
    machine.device.pause().unwrap();
    let sections = machine.device.save().unwrap();
    let Machine { memory, queues, .. } = machine;
    let mut machine = Machine::with(Reverser::boxed(2, 4), memory, Arc::default(), |device| {
        device.restore(&sections).unwrap();
    });
    machine.queues = queues;
    machine
}

#[test]
fn saved_and_restored_another_goes_on() {
    let mut machine = Machine::new(Reverser::boxed(2, 4));
    let bar = WINDOW + 0x1234_0000;
    machine.write_config(registers::BAR0, &(bar as u32).to_le_bytes());
    machine.start();
    assert_eq!(machine.ask(1, b"before", 6), b"erofeb");
    machine.write(4, 0, &[0x99]);
    machine.set::<2>(0x16, 1);
    let registers: [u8; 0x3c] = machine.read(1, 0);
    assert!(machine.device.save().is_err(), "it is at work");
    machine.device.pause().unwrap();
    machine.offer(1, b"in between", 10);
    machine.set::<2>(0x16, 1);

    let mut machine = moved(machine);
    assert_eq!(machine.bar(), bar);
    assert_eq!(machine.read::<0x3c>(1, 0), registers);
    assert_eq!(machine.read(4, 0), [0x99, 2]);
    assert_eq!(machine.read(3, 0), [1]);
    assert_eq!(machine.take_answer(1), None);
    machine.device.resume().unwrap();
    machine.messages.expect(2);
    assert_eq!(machine.take_answer(1).unwrap(), b"neewteb ni");
    assert_eq!(machine.ask(0, b"after", 5), b"retfa");
}

#[test]
fn state_that_does_not_fit_is_refused_by_name() {
    let mut machine = Machine::new(Reverser::boxed(2, 4));
    machine.start();
    machine.device.pause().unwrap();
    let sections = machine.device.save().unwrap();
    let kinds: Vec<_> = sections.iter().map(|s| s.kind.as_str()).collect();
    assert_eq!(
        kinds,
        ["pci-configuration", "virtio-pci", "virtio", "reverser"]
    );
    assert!(sections.iter().all(|section| section.id == "it"));
    let refused = |queues: usize, sections: &[Section]| {
        let other = Machine::new(Reverser::boxed(queues, 4));
        other.device.restore(sections).unwrap_err()
    };
    for missing in 0..4 {
        let mut some = sections.clone();
        some.remove(missing);
        let error = refused(2, &some);
        assert!(error.to_string().contains("\"it\""), "{error}");
    }
    let twice = [&sections[..], &sections[3..]].concat();
    assert!(matches!(
        refused(2, &twice),
        TransportError::Mismatch { .. }
    ));
    assert!(matches!(refused(3, &sections), TransportError::Core { .. }));

    let mut odd = sections.clone();
    odd[1].data = br#"{"isr":0,"config_vector":0,"queue_vectors":[1]}"#.to_vec();
    assert!(matches!(refused(2, &odd), TransportError::Mismatch { .. }));
    odd = sections.clone();
    odd[1].version = 2;
    assert!(matches!(refused(2, &odd), TransportError::State { .. }));
    odd = sections;
    let text = String::from_utf8(odd[0].data.clone()).unwrap();
    // Another vendor.
    odd[0].data = text.replacen("244", "245", 1).into_bytes();
    assert!(matches!(refused(2, &odd), TransportError::Fit { .. }));
}

#[test]
fn unplugged_and_dropped_it_touches_nothing() {
    let mut machine = Machine::new(Reverser::boxed(1, 4));
    machine.start();
    machine.bus.remove(machine.slot).unwrap();
    let Machine {
        device, mut queues, ..
    } = machine;
    // The device was still at work: dropping it waits for its worker.
    drop(Arc::into_inner(device).expect("the bus has it still"));
    queues[0]
        .add(&[vm_virtio::testing::Descriptor::writable(0x9000, 8)])
        .unwrap();
    assert_eq!(queues[0].take_used(), None);
}
