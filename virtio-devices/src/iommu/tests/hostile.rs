//! Requests that are none.

use super::*;

#[test]
fn requests_that_are_cut_short_are_refused() {
    let (mut guest, _) = running();
    for request in [
        attach(0, 0x10, 0),
        detach(0, 0x10),
        map(0, 0, 0xfff, 0, READ),
        unmap(0, 0, 0xfff),
    ] {
        for len in 1..request.readable.len() {
            let short = Request {
                readable: request.readable[..len].to_vec(),
                writable: 4,
            };
            assert_eq!(ask(&mut guest, &short), INVALID, "{short:?}");
        }
    }
    let nothing = Request {
        readable: Vec::new(),
        writable: 4,
    };
    assert_eq!(ask(&mut guest, &nothing), INVALID);
}

#[test]
fn more_room_than_a_tail_needs_has_it_at_its_end() {
    let (mut guest, _) = running();
    let wide = Request {
        writable: 10_000,
        ..attach(0, 0x99, 0)
    };
    let answer = guest.ask(REQUESTS, &wide);
    assert_eq!(answer.len(), 10_000);
    assert_eq!(answer[9_996..], [NO_ENTRY, 0, 0, 0]);
    assert_eq!(answer[..4096], [0; 4096]);
}

#[test]
fn a_request_without_room_for_a_tail_wants_a_reset() {
    let (mut guest, _) = running();
    guest.offer(
        REQUESTS,
        &Request {
            writable: 3,
            ..attach(0, 0x10, 0)
        },
    );
    guest.kick(REQUESTS);
    guest.wait_needs_reset();
    assert_eq!(guest.take_used(REQUESTS), None);
}

#[test]
fn a_buffer_too_small_for_a_fault_wants_a_reset() {
    let (mut guest, control) = running();
    assert_eq!(ask(&mut guest, &attach(0, 0x10, 0)), OK);
    guest.offer(
        EVENTS,
        &Request {
            readable: Vec::new(),
            writable: 23,
        },
    );
    guest.kick(EVENTS);
    control
        .endpoint(0x10)
        .fault(endpoint::Reason::Mapping, 0, Permissions::Read);
    guest.wait_needs_reset();
}

#[test]
fn features_that_were_not_taken_are_not_there() {
    let (device, _) = device();
    let mut guest = Guest::new(device);
    guest.start(!(F_MMIO | F_BYPASS_CONFIG | F_PROBE));
    assert_eq!(guest.ask(REQUESTS, &probe(0x10))[64], UNSUPPORTED);
    assert_eq!(ask(&mut guest, &attach(0, 0x10, 1)), INVALID);
    assert_eq!(ask(&mut guest, &attach(0, 0x10, 0)), OK);
    assert_eq!(ask(&mut guest, &map(0, 0, 0xfff, 0, READ | 4)), INVALID);
}
