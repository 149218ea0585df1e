//! Devices behind the IOMMU: what they see, and what the driver hears of it.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vm_virtio::testing::{Descriptor, TestInterrupt, spawn};
use vm_virtio::{DeviceCore, QueueAddress, feature, status};

use super::*;
use crate::Rng;

type Seen = EndpointMemory<TestMemory>;

/// A guest with an IOMMU, and what the first endpoint sees.
fn machine() -> (Guest, Seen, IommuControl) {
    let (guest, control) = running();
    let seen = EndpointMemory::translated(guest.memory.clone(), control.endpoint(0x10));
    (guest, seen, control)
}

fn can(seen: &Seen, address: u64, len: usize, access: Permissions) -> bool {
    seen.memory()
        .check_range(GuestAddress(address), len, access)
}

/// The next fault that the driver hears of: reason, flags, endpoint, address.
fn fault(guest: &mut Guest) -> (u8, u32, u32, u64) {
    let room = Request {
        readable: Vec::new(),
        writable: 24,
    };
    let answer = guest.ask(EVENTS, &room);
    assert_eq!(answer.len(), 24);
    (
        answer[0],
        u32::from_le_bytes(answer[4..8].try_into().unwrap()),
        u32::from_le_bytes(answer[8..12].try_into().unwrap()),
        u64::from_le_bytes(answer[16..24].try_into().unwrap()),
    )
}

#[test]
fn what_is_mapped_is_seen_where_it_is_mapped() {
    let (mut guest, seen, _) = machine();
    for request in [
        attach(1, 0x10, 0),
        // In another order, side by side, and across the seam of the two regions of RAM.
        map(1, 0x7000_0000, 0x7000_0fff, 0x1000, READ | WRITE),
        map(1, 0x7000_1000, 0x7000_2fff, 0x1f_f000, READ | WRITE),
        map(1, 0x7000_3000, 0x7000_3fff, 0x0, READ),
    ] {
        assert_eq!(ask(&mut guest, &request), OK);
    }
    let memory = seen.memory();
    let bytes: Vec<u8> = (0..0x3000u32).map(|n| (n % 251) as u8).collect();
    memory
        .write_slice(&bytes, GuestAddress(0x7000_0000))
        .unwrap();
    let mut read = vec![0; bytes.len()];
    memory
        .read_slice(&mut read, GuestAddress(0x7000_0000))
        .unwrap();
    assert_eq!(read, bytes);
    guest
        .memory
        .read_slice(&mut read[..0x1000], GuestAddress(0x1000))
        .unwrap();
    guest
        .memory
        .read_slice(&mut read[0x1000..], GuestAddress(0x1f_f000))
        .unwrap();
    assert_eq!(read, bytes);

    assert!(can(&seen, 0x7000_0800, 0x3000, Permissions::Read));
    assert!(!can(&seen, 0x7000_0800, 0x3000, Permissions::Write));
    assert_eq!(
        fault(&mut guest),
        (2, 0x102, 0x10, 0x7000_3000),
        "the page that is read-only"
    );
    assert!(!can(&seen, 0x7000_3800, 0x801, Permissions::Read));
    assert_eq!(fault(&mut guest), (2, 0x101, 0x10, 0x7000_4000));
    // Nothing is written, not even what could be.
    memory
        .write_slice(&[0xee; 0x1001], GuestAddress(0x7000_2000))
        .unwrap_err();
    let byte: u8 = memory.read_obj(GuestAddress(0x7000_2000)).unwrap();
    assert_eq!(byte, bytes[0x2000]);
    assert_eq!(fault(&mut guest), (2, 0x102, 0x10, 0x7000_3000));
}

#[test]
fn a_mapping_to_where_no_memory_is() {
    let (mut guest, seen, _) = machine();
    for request in [
        attach(1, 0x10, 0),
        map(1, 0, 0xfff, 0x3f_f000, READ | WRITE),
        map(1, 0x1000, 0x1fff, 0x40_0000, READ | WRITE),
    ] {
        assert_eq!(ask(&mut guest, &request), OK);
    }
    assert!(can(&seen, 0, 0x1000, Permissions::Write));
    assert!(!can(&seen, 0xfff, 2, Permissions::Write));
    let memory = seen.memory();
    memory.write_obj(1u8, GuestAddress(0x1000)).unwrap_err();
    memory.read_obj::<u64>(GuestAddress(0xffc)).unwrap_err();
}

#[test]
fn without_a_domain_it_is_the_bypass_that_counts() {
    let (mut guest, seen, control) = machine();
    let whole = |seen: &Seen| can(seen, 0, 4 << 20, Permissions::ReadWrite);
    assert!(whole(&seen));
    bypass(&mut guest, 0);
    assert!(!whole(&seen));
    assert_eq!(fault(&mut guest), (1, 0x103, 0x10, 0));
    assert_eq!(ask(&mut guest, &attach(5, 0x10, 1)), OK);
    assert!(whole(&seen), "a domain that translates nothing");
    bypass(&mut guest, 1);
    assert_eq!(ask(&mut guest, &attach(6, 0x10, 0)), OK);
    assert!(!whole(&seen), "nothing is mapped");
    assert_eq!(ask(&mut guest, &detach(6, 0x10)), OK);
    assert!(whole(&seen));
    control.remove(0x10);
    assert!(!whole(&seen), "the device is gone");
    assert!(control.endpoint(0x18).id() == 0x18);
}

#[test]
fn what_is_held_stays_and_both_endpoints_follow_their_domain() {
    let (mut guest, seen, control) = machine();
    let other = EndpointMemory::translated(guest.memory.clone(), control.endpoint(0x18));
    for request in [
        attach(1, 0x10, 0),
        attach(1, 0x18, 0),
        map(1, 0x5000, 0x5fff, 0x2000, READ),
    ] {
        assert_eq!(ask(&mut guest, &request), OK);
    }
    guest.memory.write_obj(77u8, GuestAddress(0x2000)).unwrap();
    let held = seen.memory();
    let copy = held.clone();
    assert_eq!(ask(&mut guest, &unmap(1, 0x5000, 0x5fff)), OK);
    for held in [held, copy] {
        assert_eq!(held.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 77);
    }
    for seen in [&seen, &other] {
        assert!(!can(seen, 0x5000, 1, Permissions::Read));
    }
}

#[test]
fn faults_that_nobody_takes_are_bounded() {
    let (mut guest, seen, _) = machine();
    assert_eq!(ask(&mut guest, &attach(1, 0x10, 0)), OK);
    for page in 0..200 {
        assert!(!can(&seen, page << 12, 1, Permissions::Read));
    }
    for page in 0..64 {
        assert_eq!(fault(&mut guest), (2, 0x101, 0x10, page << 12));
    }
    // A buffer waits; a fault comes into it.
    guest.offer(
        EVENTS,
        &Request {
            readable: Vec::new(),
            writable: 24,
        },
    );
    guest.kick(EVENTS);
    assert!(!can(&seen, 0xabc_d000, 1, Permissions::Write));
    let (_, answer) = guest.wait_used(EVENTS);
    assert_eq!(answer[16..24], 0xabc_d000u64.to_le_bytes());
}

/// An entropy device behind the IOMMU: its rings and its buffers have addresses that are mapped.
#[test]
fn a_device_works_through_it() {
    let (mut guest, seen, _) = machine();
    let interrupt = Arc::new(TestInterrupt::default());
    let device = Rng::open("rng", Path::new("/dev/urandom")).unwrap();
    let mut core = DeviceCore::new(
        Box::new(device),
        feature::ACCESS_PLATFORM,
        seen,
        interrupt.clone(),
        spawn(),
    )
    .unwrap();
    // Rings at 0x20_1000 in the guest are at IOVA 0x4000_0000; a buffer is two pages that are far from each other.
    let rings = 0x30_0000;
    let shift = 0x4000_0000 - rings;
    for request in [
        attach(1, 0x10, 0),
        map(1, rings + shift, rings + shift + 0xfff, rings, READ | WRITE),
        map(1, 0x9000_0000, 0x9000_0fff, 0x38_0000, WRITE),
        map(1, 0x9000_1000, 0x9000_1fff, 0x31_0000, WRITE),
    ] {
        assert_eq!(ask(&mut guest, &request), OK);
    }
    let features = core.registers().offered_features();
    assert_ne!(features & feature::ACCESS_PLATFORM, 0);
    let mut driver = vm_virtio::testing::DriverQueue::new(&guest.memory, rings, 16, true);
    let state = driver.state();
    for bit in [status::ACKNOWLEDGE, status::DRIVER] {
        let now = core.registers().status();
        core.write_status(now | bit).unwrap();
    }
    let registers = core.registers_mut();
    for half in [vm_virtio::Half::Low, vm_virtio::Half::High] {
        registers.select_driver_features(match half {
            vm_virtio::Half::Low => 0,
            vm_virtio::Half::High => 1,
        });
        let bits = match half {
            vm_virtio::Half::Low => features as u32,
            vm_virtio::Half::High => (features >> 32) as u32,
        };
        registers.write_driver_features(bits);
    }
    let now = core.registers().status();
    core.write_status(now | status::FEATURES_OK).unwrap();
    let registers = core.registers_mut();
    registers.select_queue(0);
    registers.write_queue_size(16);
    for (which, address) in [
        (QueueAddress::Descriptors, state.descriptors),
        (QueueAddress::Available, state.available),
        (QueueAddress::Used, state.used),
    ] {
        let address = address + shift;
        registers.write_queue_address(which, vm_virtio::Half::Low, address as u32);
        registers.write_queue_address(which, vm_virtio::Half::High, (address >> 32) as u32);
    }
    registers.write_queue_ready(true);
    let now = core.registers().status();
    core.write_status(now | status::DRIVER_OK).unwrap();

    let buffer = Descriptor::writable(0x9000_0f00, 0x200);
    driver.add(&[buffer]).unwrap();
    core.kick(0).unwrap().write(1).unwrap();
    let used = interrupt.wait_for("entropy", || driver.take_used());
    assert_eq!(used.len, 0x200);
    for place in [0x38_0f00, 0x31_0000] {
        let mut bytes = [0; 0x100];
        guest
            .memory
            .read_slice(&mut bytes, GuestAddress(place))
            .unwrap();
        assert!(bytes.iter().any(|byte| *byte != 0), "{place:#x}");
    }
    // One page is no longer the device's: it wants a reset, and the driver hears why.
    assert_eq!(ask(&mut guest, &unmap(1, 0x9000_1000, 0x9000_1fff)), OK);
    driver.add(&[buffer]).unwrap();
    core.kick(0).unwrap().write(1).unwrap();
    interrupt.wait_for("NEEDS_RESET", || {
        (core.registers().status() & status::NEEDS_RESET != 0).then_some(())
    });
    assert_eq!(fault(&mut guest), (2, 0x102, 0x10, 0x9000_1000));
    assert_eq!(driver.take_used(), None);
}
