//! The protocol's rules, without queues and sockets: what each packet does, and what a hostile pair of ends cannot do.

use std::collections::HashMap;

use proptest::prelude::*;

use super::super::muxer::{Action, MOST_STREAMS, Muxer, Next};
use super::super::packet::{HOST_CID, Header, NO_RECEIVE, NO_SEND, NOTHING, STREAM, op};
use super::super::stream::{BUFFER, Ports};

const CID: u64 = 3;
const PORTS: Ports = Ports {
    host: 80,
    guest: 1024,
};

fn packet(op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        kind: STREAM,
        op,
        buf_alloc: 1000,
        ..Header::default()
    }
}

/// What the guest gets next, which is a header alone.
fn header(muxer: &mut Muxer) -> Header {
    match muxer.next(4096) {
        Some(Next::Packet(header)) => header,
        other => panic!("{other:?}"),
    }
}

/// The guest asked for a stream and got it; the host's end is 7.
fn open() -> (Muxer, u32) {
    let mut muxer = Muxer::new(CID);
    let request = packet(op::REQUEST);
    assert_eq!(muxer.packet(&request, 0), Action::Connect { ports: PORTS });
    let stream = muxer.grant(&request, PORTS, 7).unwrap();
    let response = header(&mut muxer);
    assert_eq!(
        (response.op, response.buf_alloc, response.fwd_cnt),
        (op::RESPONSE, BUFFER, 0)
    );
    assert_eq!((response.src_port, response.dst_port), (80, 1024));
    assert_eq!((response.src_cid, response.dst_cid), (HOST_CID, CID));
    (muxer, stream)
}

fn refused(muxer: &mut Muxer) {
    assert_eq!(header(muxer).op, op::RST);
    assert_eq!(muxer.next(4096), None);
}

#[test]
fn bytes_go_to_the_guest_as_far_as_it_has_room() {
    let (mut muxer, stream) = open();
    let bytes = |most| {
        Some(Next::Bytes {
            stream,
            host: 7,
            most,
        })
    };
    assert_eq!(muxer.next(600), bytes(600));
    let sent = muxer.sent(stream, 600).unwrap();
    assert_eq!((sent.op, sent.len), (op::RW, 600));
    assert_eq!(muxer.next(600), bytes(400));
    muxer.sent(stream, 400);
    // It has none: it is asked, once.
    assert_eq!(header(&mut muxer).op, op::CREDIT_REQUEST);
    assert_eq!(muxer.next(600), None);
    let update = Header {
        fwd_cnt: 900,
        ..packet(op::CREDIT_UPDATE)
    };
    assert_eq!(muxer.packet(&update, 0), Action::None);
    assert_eq!(muxer.next(1000), bytes(900));
    // There is nothing after all.
    muxer.dry(stream);
    assert_eq!(muxer.next(1000), None);
    muxer.readable(stream);
    assert_eq!(muxer.next(1000), bytes(900));
}

#[test]
fn numbers_of_credit_wrap() {
    let (mut muxer, stream) = open();
    for round in 1..=5u32 {
        // Half of what there is to count, each time.
        muxer.sent(stream, 1 << 31).unwrap();
        let update = Header {
            fwd_cnt: round.wrapping_mul(1 << 31),
            ..packet(op::CREDIT_UPDATE)
        };
        muxer.packet(&update, 0);
        assert!(matches!(
            muxer.next(5000),
            Some(Next::Bytes { most: 1000, .. })
        ));
    }
    // A count that was never reached is no room.
    let lie = Header {
        fwd_cnt: 1,
        ..packet(op::CREDIT_UPDATE)
    };
    muxer.packet(&lie, 0);
    muxer.readable(stream);
    assert_eq!(header(&mut muxer).op, op::CREDIT_REQUEST);
}

#[test]
fn the_guest_is_told_of_room_before_it_has_none() {
    let (mut muxer, stream) = open();
    muxer.dry(stream);
    while muxer.next(1).is_some() {}
    let rw = |len| Header {
        len,
        ..packet(op::RW)
    };
    let deliver = |len| Action::Deliver {
        stream,
        host: 7,
        len,
    };
    assert_eq!(muxer.packet(&rw(BUFFER), BUFFER), deliver(BUFFER));
    muxer.forwarded(stream, BUFFER / 8);
    assert_eq!(muxer.next(0), None);
    muxer.forwarded(stream, BUFFER / 8);
    let update = header(&mut muxer);
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, BUFFER / 4));
    // Told when it asks, too.
    muxer.forwarded(stream, 1);
    muxer.packet(&packet(op::CREDIT_REQUEST), 0);
    assert_eq!(header(&mut muxer).fwd_cnt, BUFFER / 4 + 1);
    // Beyond its room it may not go.
    let room = BUFFER / 4 + 1;
    assert_eq!(
        muxer.packet(&rw(room + 1), room + 1),
        Action::Abort { host: 7 }
    );
    refused(&mut muxer);
}

#[test]
fn halves_end_one_by_one() {
    let (mut muxer, stream) = open();
    assert!(!muxer.host_done(stream, NO_SEND));
    let told = header(&mut muxer);
    assert_eq!((told.op, told.flags), (op::SHUTDOWN, NO_SEND));
    // The other half goes on.
    let rw = Header {
        len: 10,
        ..packet(op::RW)
    };
    assert!(matches!(
        muxer.packet(&rw, 10),
        Action::Deliver { len: 10, .. }
    ));
    let done = Header {
        flags: NO_SEND,
        ..packet(op::SHUTDOWN)
    };
    let halves = Action::Halves {
        host: 7,
        done: NO_SEND,
    };
    assert_eq!(muxer.packet(&done, 0), halves);
    // What it said that it would not send is a broken rule.
    let (mut other, _) = open();
    other.packet(&done, 0);
    assert_eq!(other.packet(&rw, 10), Action::Abort { host: 7 });
    let done = Header {
        flags: NO_RECEIVE,
        ..packet(op::SHUTDOWN)
    };
    assert_eq!(muxer.packet(&done, 0), Action::Finish { host: 7 });
    refused(&mut muxer);
}

#[test]
fn a_guest_that_receives_no_more_gets_no_more() {
    let (mut muxer, _) = open();
    let done = Header {
        flags: NO_RECEIVE,
        ..packet(op::SHUTDOWN)
    };
    muxer.packet(&done, 0);
    assert_eq!(muxer.next(100), None);
}

#[test]
fn a_host_that_is_gone_lingers_until_the_guest_lets_go() {
    let (mut muxer, stream) = open();
    assert!(muxer.host_done(stream, NOTHING));
    let told = header(&mut muxer);
    assert_eq!((told.op, told.flags), (op::SHUTDOWN, NOTHING));
    // What was on its way is dropped.
    let rw = Header {
        len: 10,
        ..packet(op::RW)
    };
    assert_eq!(muxer.packet(&rw, 10), Action::None);
    assert_eq!(muxer.packet(&packet(op::RST), 0), Action::None);
    // Its ports are free again, and nothing is known by them.
    assert_eq!(muxer.packet(&packet(op::RST), 0), Action::None);
    assert_eq!(muxer.packet(&rw, 10), Action::None);
    refused(&mut muxer);
}

#[test]
fn the_host_asks() {
    let mut muxer = Muxer::new(CID);
    let stream = muxer.request(99, 4).unwrap();
    let request = header(&mut muxer);
    assert_eq!(
        (request.op, request.dst_port, request.buf_alloc),
        (op::REQUEST, 99, BUFFER)
    );
    assert!(muxer.is_asking(stream));
    let answer = |op| Header {
        src_port: 99,
        dst_port: request.src_port,
        ..packet(op)
    };
    let port = request.src_port;
    assert_eq!(
        muxer.packet(&answer(op::RESPONSE), 0),
        Action::Granted { host: 4, port }
    );
    assert!(matches!(
        muxer.next(9),
        Some(Next::Bytes {
            host: 4,
            most: 9,
            ..
        })
    ));
    // Granted twice is once too often.
    assert_eq!(
        muxer.packet(&answer(op::RESPONSE), 0),
        Action::Abort { host: 4 }
    );
    refused(&mut muxer);

    // Refused.
    muxer.request(99, 5).unwrap();
    let request = header(&mut muxer);
    let refusal = Header {
        dst_port: request.src_port,
        ..answer(op::RST)
    };
    assert_eq!(muxer.packet(&refusal, 0), Action::Abort { host: 5 });
    assert_eq!(muxer.next(9), None);

    // Gave up before the guest heard, and after.
    let unheard = muxer.request(99, 6).unwrap();
    assert!(muxer.host_done(unheard, NOTHING));
    assert_eq!(muxer.next(9), None);
    let heard = muxer.request(99, 6).unwrap();
    assert_eq!(header(&mut muxer).op, op::REQUEST);
    assert!(muxer.host_done(heard, NOTHING));
    refused(&mut muxer);
}

#[test]
fn what_is_for_nobody_is_refused() {
    let mut muxer = Muxer::new(CID);
    let request = packet(op::REQUEST);
    for wrong in [
        Header {
            src_cid: 4,
            ..request
        },
        Header {
            dst_cid: 9,
            ..request
        },
        Header { kind: 2, ..request },
        packet(op::RESPONSE),
        packet(op::RW),
        packet(op::SHUTDOWN),
        packet(op::CREDIT_UPDATE),
        packet(0),
        packet(u16::MAX),
    ] {
        assert_eq!(muxer.packet(&wrong, 0), Action::None, "{wrong:?}");
        let refusal = header(&mut muxer);
        assert_eq!(refusal, wrong.refusal());
        // Which is not answered in turn.
        let rst = Header {
            op: op::RST,
            ..wrong
        };
        assert_eq!(muxer.packet(&rst, 0), Action::None);
        assert_eq!(muxer.next(9), None);
    }
}

#[test]
fn packets_of_an_open_stream_that_make_no_sense_end_it() {
    for (wrong, payload) in [
        (packet(op::REQUEST), 0),
        (packet(op::RESPONSE), 0),
        (packet(0), 0),
        // Longer than its chain.
        (
            Header {
                len: 11,
                ..packet(op::RW)
            },
            10,
        ),
        (
            Header {
                len: u32::MAX,
                ..packet(op::RW)
            },
            u32::MAX,
        ),
    ] {
        let (mut muxer, _) = open();
        let action = muxer.packet(&wrong, payload);
        assert_eq!(action, Action::Abort { host: 7 }, "{wrong:?}");
        refused(&mut muxer);
    }
}

#[test]
fn streams_and_refusals_are_bounded() {
    let mut muxer = Muxer::new(CID);
    for host in 0..MOST_STREAMS as u32 {
        muxer.request(1, host).unwrap();
    }
    assert_eq!(muxer.request(1, 9), None);
    let request = packet(op::REQUEST);
    assert_eq!(muxer.grant(&request, PORTS, 9), None);
    assert_eq!(header(&mut muxer).op, op::RST);

    let mut taken = 0;
    while muxer.takes_packets() {
        muxer.packet(&packet(op::RW), 0);
        taken += 1;
        assert!(taken < 10_000);
    }
    while muxer.next(0).is_some() {}
    assert!(muxer.takes_packets());
}

#[test]
fn a_stream_that_lingers_makes_room_for_a_new_one() {
    let mut muxer = Muxer::new(CID);
    let grant = |muxer: &mut Muxer, guest: u32| {
        let ports = Ports { host: 80, guest };
        let request = Header {
            src_port: guest,
            ..packet(op::REQUEST)
        };
        muxer.grant(&request, ports, guest)
    };
    let all: Vec<u32> = (0..MOST_STREAMS as u32)
        .map(|guest| grant(&mut muxer, guest).unwrap())
        .collect();
    assert!(muxer.host_done(all[5], NOTHING));
    assert!(muxer.host_done(all[2], NOTHING));
    // The one that lingers longest goes.
    grant(&mut muxer, 5000).unwrap();
    let refusal = header(&mut muxer);
    assert_eq!((refusal.op, refusal.dst_port), (op::RST, 5));
    grant(&mut muxer, 5001).unwrap();
    assert_eq!(header(&mut muxer).dst_port, 2);
    assert_eq!(grant(&mut muxer, 5002), None);
}

#[test]
fn streams_take_turns() {
    let mut muxer = Muxer::new(CID);
    for guest in 0..4 {
        let ports = Ports { host: 80, guest };
        let request = Header {
            src_port: guest,
            buf_alloc: 1 << 20,
            ..packet(op::REQUEST)
        };
        muxer.grant(&request, ports, guest).unwrap();
    }
    for _ in 0..4 {
        assert_eq!(header(&mut muxer).op, op::RESPONSE);
    }
    let mut order = Vec::new();
    for _ in 0..12 {
        let Some(Next::Bytes { stream, host, .. }) = muxer.next(100) else {
            panic!("no bytes");
        };
        muxer.sent(stream, 100);
        order.push(host);
    }
    assert_eq!(order, [0, 1, 2, 3].repeat(3));
}

/// What either side does.
#[derive(Clone, Debug)]
enum Step {
    Packet(Header, u32),
    Request(u32),
    Done(usize, u32),
    Readable(usize),
    Forward(usize, u32),
    /// The guest takes so many packets; of bytes there are so many.
    Next(u8, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![0..2000u32, Just(BUFFER), any::<u32>()];
    let header = (
        0..4u32,
        0..3u32,
        0..9u16,
        len.clone(),
        0..4u32,
        any::<u32>(),
        len.clone(),
        prop::bool::weighted(0.9),
    )
        .prop_map(
            |(guest, host, op, len, flags, fwd_cnt, buf_alloc, ours)| Header {
                src_port: guest,
                dst_port: if host == 2 { 1 << 30 } else { host },
                len,
                flags,
                fwd_cnt,
                buf_alloc,
                dst_cid: if ours { HOST_CID } else { 1 },
                ..packet(op)
            },
        );
    prop_oneof![
        8 => (header, len.clone()).prop_map(|(header, extra)| {
            Step::Packet(header, if extra % 4 == 0 { extra } else { header.len })
        }),
        1 => (0..4u32).prop_map(Step::Request),
        1 => (any::<usize>(), 0..4u32).prop_map(|(n, halves)| Step::Done(n, halves)),
        2 => any::<usize>().prop_map(Step::Readable),
        2 => (any::<usize>(), len.clone()).prop_map(|(n, len)| Step::Forward(n, len)),
        4 => (any::<u8>(), len).prop_map(|(count, len)| Step::Next(count, len)),
    ]
}

/// The handler's side of the bargain: which ends it has, and what each of them holds.
#[derive(Default)]
struct Ends {
    open: HashMap<u32, (u32, u32)>,
    next: u32,
}

impl Ends {
    fn nth(&self, n: usize) -> Option<(u32, u32)> {
        let mut all: Vec<_> = self.open.iter().map(|(host, end)| (*host, end.0)).collect();
        all.sort_unstable();
        (!all.is_empty()).then(|| all[n % all.len()])
    }

    fn close(&mut self, host: u32) {
        assert!(self.open.remove(&host).is_some(), "end {host} is none");
    }
}

fn run(steps: &[Step]) {
    let mut muxer = Muxer::new(CID);
    let mut ends = Ends::default();
    for step in steps {
        match step {
            Step::Packet(header, payload) if muxer.takes_packets() => {
                match muxer.packet(header, *payload) {
                    Action::None => {}
                    Action::Connect { ports } if ports.host == 0 => muxer.refuse(header),
                    Action::Connect { ports } => {
                        let host = ends.next;
                        ends.next += 1;
                        if let Some(stream) = muxer.grant(header, ports, host) {
                            ends.open.insert(host, (stream, 0));
                        }
                    }
                    Action::Deliver { stream, host, len } => {
                        let end = ends.open.get_mut(&host).expect("an end");
                        assert_eq!(end.0, stream);
                        assert!(len <= *payload);
                        end.1 += len;
                        assert!(end.1 <= BUFFER, "more is held than may be");
                    }
                    Action::Granted { host, .. } | Action::Halves { host, .. } => {
                        assert!(ends.open.contains_key(&host));
                    }
                    Action::Finish { host } | Action::Abort { host } => ends.close(host),
                }
            }
            Step::Packet(..) => {}
            Step::Request(guest) => {
                let host = ends.next;
                ends.next += 1;
                if let Some(stream) = muxer.request(*guest, host) {
                    ends.open.insert(host, (stream, 0));
                }
            }
            Step::Done(n, halves) => {
                if let Some((host, stream)) = ends.nth(*n)
                    && muxer.host_done(stream, *halves)
                {
                    ends.close(host);
                }
            }
            Step::Readable(n) => {
                if let Some((_, stream)) = ends.nth(*n) {
                    muxer.readable(stream);
                }
            }
            Step::Forward(n, len) => {
                if let Some((host, stream)) = ends.nth(*n) {
                    let held = &mut ends.open.get_mut(&host).unwrap().1;
                    let len = (*len).min(*held);
                    *held -= len;
                    muxer.forwarded(stream, len);
                }
            }
            Step::Next(count, len) => {
                for _ in 0..*count {
                    match muxer.next(4096) {
                        Some(Next::Packet(header)) => {
                            assert_eq!(header.len, 0);
                            assert!(header.kind == STREAM && header.op != op::RW);
                        }
                        Some(Next::Bytes { stream, host, most }) => {
                            assert!((1..=4096).contains(&most));
                            assert_eq!(ends.open.get(&host).expect("an end").0, stream);
                            match (*len).min(most) {
                                0 => muxer.dry(stream),
                                len => assert_eq!(muxer.sent(stream, len).unwrap().len, len),
                            }
                        }
                        None => break,
                    }
                }
            }
        }
    }
    // All that is left to say has an end.
    let mut said = 0;
    while let Some(next) = muxer.next(4096) {
        if let Next::Bytes { stream, .. } = next {
            muxer.dry(stream);
        }
        said += 1;
        assert!(said < 4 * MOST_STREAMS, "it says more and more");
    }
    // Ends that the muxer forgot would stay for ever.
    for (host, (stream, _)) in std::mem::take(&mut ends.open) {
        assert!(muxer.host_done(stream, NOTHING), "end {host}");
    }
}

proptest! {
    #[test]
    fn hostile_ends_do_no_harm(steps in prop::collection::vec(step(), 1..200)) {
        run(&steps);
    }
}
