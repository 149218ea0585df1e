//! Packets that come without a break are read many together.

use super::*;

fn running(size: u16) -> (Guest, Wire) {
    let wire = Wire::new();
    let mut guest = Guest::new(Box::new(device(vec![wire.batch_end()], size)));
    guest.start(u64::MAX);
    (guest, wire)
}

fn give(guest: &mut Guest, count: usize, len: u32) {
    for _ in 0..count {
        guest.offer(RECEIVE, &room(len));
    }
}

fn check(guest: &mut Guest, n: u32, len: usize, room: usize) {
    let (count, got) = receive(guest);
    assert!(got == packet(len, n), "packet {n} of {len} bytes");
    assert_eq!(usize::from(count), len.div_ceil(room), "packet {n}");
}

#[test]
fn packets_of_a_burst_come_in_order() {
    let (mut guest, wire) = running(256);
    guest.core.pause().unwrap();
    give(&mut guest, 250, 1500);
    // Longer ones come in the midst of short ones, when nobody expects them; one is too short to be one.
    let len = |n: u32| if n % 50 == 37 { 5000 } else { 60 + n as usize };
    for n in 0..150 {
        wire.send(&packet(len(n), n));
        if n == 70 {
            wire.send(&[1; VNET_HEADER_LEN - 1]);
        }
    }
    guest.core.resume().unwrap();
    for n in 0..150 {
        check(&mut guest, n, len(n), 1500);
    }
    // Buffers that were not needed are not lost: they take what comes next.
    guest.core.pause().unwrap();
    let (popped, used) = indexes(&guest);
    assert_eq!(popped, used);
    assert_eq!(used, 150 + 3 * 3);
    for n in 0..60 {
        wire.send(&packet(100, n));
    }
    guest.core.resume().unwrap();
    for n in 0..60 {
        check(&mut guest, n, 100, 1500);
    }
}

#[test]
fn what_comes_after_a_packet_that_waits_for_buffers_waits_behind_it() {
    for reset in [false, true] {
        let (mut guest, wire) = running(256);
        guest.core.pause().unwrap();
        give(&mut guest, 60, 100);
        let len = |n: u32| if n == 40 { 3000 } else { 70 };
        for n in 0..60 {
            wire.send(&packet(len(n), n));
        }
        guest.core.resume().unwrap();
        // The long one needs 30 buffers, and 20 are left.
        for n in 0..40 {
            check(&mut guest, n, 70, 100);
        }
        if reset {
            guest.reset();
            guest.start(u64::MAX);
            // Those that were read are gone with the reset, and the device works.
            give(&mut guest, 200, 100);
            guest.kick(RECEIVE);
            wire.send(&packet(90, 99));
            loop {
                let (_, got) = receive(&mut guest);
                if got == packet(90, 99) {
                    break;
                }
                assert!((41..60).any(|n| got == packet(70, n)), "{got:?}");
            }
            continue;
        }
        for _ in 0..2 {
            guest.core.pause().unwrap();
            let (popped, used) = indexes(&guest);
            assert_eq!((popped, used), (40, 40));
            guest.core.resume().unwrap();
        }
        give(&mut guest, 30, 100);
        guest.kick(RECEIVE);
        for n in 40..60 {
            check(&mut guest, n, len(n), 100);
        }
    }
}

#[test]
fn a_burst_ends_with_the_buffers() {
    let (mut guest, wire) = running(64);
    guest.core.pause().unwrap();
    give(&mut guest, 20, 1500);
    for n in 0..50 {
        wire.send(&packet(60, n));
    }
    guest.core.resume().unwrap();
    for n in 0..50 {
        check(&mut guest, n, 60, 1500);
        if n % 10 == 9 {
            give(&mut guest, 10, 1500);
            guest.kick(RECEIVE);
        }
    }
    // The worker has gone to sleep meanwhile, or will: the next packet wakes it.
    wire.send(&packet(60, 50));
    check(&mut guest, 50, 60, 1500);
}

#[test]
fn packets_before_a_buffer_that_is_none_have_come() {
    let (mut guest, wire) = running(256);
    guest.core.pause().unwrap();
    give(&mut guest, 12, 1500);
    guest.offer(RECEIVE, &room(VNET_HEADER_LEN as u32 - 1));
    for n in 0..30 {
        wire.send(&packet(60, n));
    }
    guest.core.resume().unwrap();
    guest.wait_needs_reset();
    let mut n = 0;
    while let Some((_, got)) = guest.take_used(RECEIVE) {
        assert_eq!(got[12..], packet(60, n)[12..]);
        n += 1;
    }
    assert!(n > 4, "{n}");
}
