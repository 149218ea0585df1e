//! A hostile guest and hostile peers: nothing grows without end, nothing breaks.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::time::Duration;

use proptest::prelude::*;
use smoltcp::wire::{TcpPacket, TcpSeqNumber};
use user_net::testing::Harness;
use user_net::{MAX_CONNECTIONS, MAX_FLOWS, UserNetConfig};

use crate::guest::{GATEWAY, Guest, config, pattern, tcp_frame};

/// What two buffers, two sockets of the host and the link can hold, roundly.
const HELD: usize = 16 << 20;

#[test]
fn a_peer_that_never_reads_holds_the_guest_up() {
    let mut guest = Guest::new(&config());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let stalled = guest.connect(SocketAddrV4::new(GATEWAY, port));
    let (mut peer, _) = listener.accept().unwrap();
    let other = guest.connect(SocketAddrV4::new(GATEWAY, port));
    let (mut other_peer, _) = listener.accept().unwrap();
    // As much as it takes until nothing goes any more: another connection goes on meanwhile, and sees that rounds pass.
    let block = pattern(6, 64 << 10);
    let (mut sent, mut idle) = (0, 0);
    while idle < 200 {
        let went = guest.socket(stalled).send_slice(&block).unwrap();
        sent += went;
        assert!(sent < HELD, "{sent} bytes, and no end");
        idle = if went == 0 { idle + 1 } else { 0 };
        guest.write(other, b"tick");
        other_peer.read_exact(&mut [0; 4]).unwrap();
        other_peer.write_all(b"tock").unwrap();
        assert_eq!(guest.read(other, 4), b"tock");
    }
    // Nothing of it is lost.
    peer.set_nonblocking(true).unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 64 << 10];
    guest.until("what was held", |_| {
        match peer.read(&mut buffer) {
            Ok(len) => got += len,
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        got == sent
    });
}

#[test]
fn a_guest_that_never_reads_holds_the_host_up() {
    let mut guest = Guest::new(&config());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let handle = guest.connect(SocketAddrV4::new(GATEWAY, port));
    let (peer, _) = listener.accept().unwrap();
    peer.set_nonblocking(true).unwrap();
    let block = pattern(7, 64 << 10);
    let (mut sent, mut idle) = (0, 0);
    guest.until("the peer to be held up", |_| {
        match (&peer).write(&block) {
            Ok(len) => {
                sent += len;
                idle = 0;
            }
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                idle += 1;
            }
        }
        assert!(sent < HELD, "{sent} bytes, and no end");
        idle == 20
    });
    assert_eq!(guest.read(handle, sent).len(), sent);
}

fn harness() -> Harness {
    Harness::new(&UserNetConfig::default()).unwrap()
}

fn syn(port: u16, to: SocketAddrV4) -> Vec<u8> {
    tcp_frame(to, port, |tcp| tcp.set_syn(true))
}

/// Answers that the guest gets, and how many of them are resets.
fn answers(harness: &mut Harness) -> (usize, usize) {
    let (mut all, mut resets) = (0, 0);
    while let Some(frame) = harness.receive() {
        all += 1;
        if frame[12 + 14 + 9] == 6 && frame[12 + 14 + 20 + 13] & 4 != 0 {
            resets += 1;
        }
    }
    (all, resets)
}

#[test]
fn a_flood_of_syns_stays_bounded() {
    // Connections that are never answered, and such that are.
    for port in [3, 80] {
        let mut harness = harness();
        let mut resets = 0;
        for n in 0..2000u16 {
            let to = SocketAddrV4::new([192, 0, 2, 1].into(), port);
            harness.send(&syn(1024 + n, to)).unwrap();
            assert!(harness.connections() <= MAX_CONNECTIONS);
            resets += answers(&mut harness).1;
        }
        let kept = harness.connections();
        assert!(kept > 0);
        assert_eq!(resets, 2000 - kept, "the others are refused");
        // Nor do they stay.
        harness.advance(Duration::from_secs(241));
        harness.turn().unwrap();
        assert_eq!(harness.connections(), 0);
    }
}

#[test]
fn an_idle_connection_gives_way_to_a_new_one() {
    let mut harness = harness();
    let to = SocketAddrV4::new([192, 0, 2, 1].into(), 80);
    let open = |harness: &mut Harness, port: u16| {
        harness.send(&syn(port, to)).unwrap();
        let reply = harness.receive().unwrap();
        let tcp = TcpPacket::new_unchecked(&reply[12 + 14 + 20..]);
        if tcp.rst() {
            return false;
        }
        let seq = tcp.seq_number();
        let ack = tcp_frame(to, port, |tcp| {
            tcp.set_ack(true);
            tcp.set_seq_number(TcpSeqNumber(1));
            tcp.set_ack_number(seq + 1);
        });
        harness.send(&ack).unwrap();
        true
    };
    let mut port = 1024;
    while open(&mut harness, port) {
        port += 1;
    }
    let most = harness.connections();
    assert_eq!(most, usize::from(port - 1024));
    harness.advance(Duration::from_secs(301));
    assert!(open(&mut harness, port), "the oldest has to go");
    assert_eq!(harness.connections(), most);
}

#[test]
fn the_harness_carries_bytes() {
    let mut harness = harness();
    let to = SocketAddrV4::new([192, 0, 2, 1].into(), 80);
    harness.send(&syn(1024, to)).unwrap();
    let reply = harness.receive().unwrap();
    let seq = TcpPacket::new_unchecked(&reply[12 + 14 + 20..]).seq_number();
    let ack = tcp_frame(to, 1024, |tcp| {
        tcp.set_ack(true);
        tcp.set_seq_number(TcpSeqNumber(1));
        tcp.set_ack_number(seq + 1);
    });
    harness.send(&ack).unwrap();
    harness.serve(0, 0, 500);
    harness.turn().unwrap();
    let data = harness.receive().unwrap();
    let data = TcpPacket::new_unchecked(&data[12 + 14 + 20..]);
    assert_eq!(data.payload(), [b'x'; 500]);
}

#[test]
fn a_guest_that_sends_more_than_the_first_window_is_cut_off() {
    let mut harness = harness();
    let to = SocketAddrV4::new([192, 0, 2, 1].into(), 80);
    // With a window scale.
    let mut message = syn(1024, to);
    message.extend([3, 3, 7, 0]);
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut message[26..]);
    ip.set_total_len(44);
    ip.fill_checksum();
    TcpPacket::new_unchecked(ip.payload_mut()).set_header_len(24);
    message[0] = 1;
    harness.send(&message).unwrap();
    let reply = harness.receive().unwrap();
    let seq = TcpPacket::new_unchecked(&reply[12 + 14 + 20..]).seq_number();
    for offset in [262_000, 300_000, 400_000, 524_000] {
        let mut message = tcp_frame(to, 1024, |tcp| {
            tcp.set_ack(true);
            tcp.set_seq_number(TcpSeqNumber(1) + offset);
            tcp.set_ack_number(seq + 1);
        });
        message.resize(message.len() + 1000, b'g');
        message[0] = 1;
        let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut message[26..]);
        ip.set_total_len(1040);
        ip.fill_checksum();
        harness.send(&message).unwrap();
    }
    assert_eq!(harness.connections(), 1);
}

#[test]
fn refusals_are_told_as_what_they_are() {
    let mut harness = harness();
    let host = Ipv4Addr::new(192, 0, 2, 1);
    harness
        .send(&syn(1024, SocketAddrV4::new(host, 1)))
        .unwrap();
    let refused = harness.receive().unwrap();
    assert_eq!(refused[12 + 14 + 20 + 13] & 0x17, 0x14, "RST and ACK");
    harness
        .send(&syn(1025, SocketAddrV4::new(host, 2)))
        .unwrap();
    let icmp = harness.receive().unwrap();
    assert_eq!(icmp[12 + 14 + 9], 1, "ICMP");
    assert_eq!(icmp[12 + 14 + 20..][..2], [3, 1], "host unreachable");
    // One that nobody answers is given up, and told so.
    harness
        .send(&syn(1026, SocketAddrV4::new(host, 3)))
        .unwrap();
    assert!(harness.receive().is_none());
    harness
        .send(&syn(1026, SocketAddrV4::new(host, 3)))
        .unwrap();
    assert_eq!(harness.connections(), 1, "asked again for the same");
    harness.advance(Duration::from_secs(76));
    harness.turn().unwrap();
    assert_eq!(harness.receive().unwrap()[12 + 14 + 20..][..2], [3, 1]);
    assert_eq!(harness.connections(), 0);
}

fn udp_frame(port: u16, to: SocketAddrV4) -> Vec<u8> {
    let mut message = tcp_frame(to, port, |_| {});
    message.truncate(12 + 14 + 28);
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut message[26..]);
    ip.set_total_len(28);
    ip.set_next_header(smoltcp::wire::IpProtocol::Udp);
    ip.fill_checksum();
    let mut udp = smoltcp::wire::UdpPacket::new_unchecked(ip.payload_mut());
    udp.set_len(8);
    udp.set_checksum(0);
    message
}

#[test]
fn flows_stay_bounded_and_are_forgotten() {
    let mut harness = harness();
    for port in 1..2000 {
        let to = SocketAddrV4::new([192, 0, 2, 1].into(), 9);
        harness.send(&udp_frame(port, to)).unwrap();
        assert!(harness.flows() <= MAX_FLOWS);
    }
    assert!(harness.flows() > 0);
    harness.advance(Duration::from_secs(121));
    harness.turn().unwrap();
    assert_eq!(harness.flows(), 0);
}

#[test]
fn closed_addresses_get_no_flow() {
    let mut harness = harness();
    for to in [
        "127.0.0.1:53",
        "0.0.0.0:53",
        "169.254.169.254:53",
        "224.0.0.251:5353",
        "255.255.255.255:9",
        "10.0.2.255:9",
        "10.0.2.2:9",
        "10.0.2.3:54",
        "10.0.2.77:9",
    ] {
        harness.send(&udp_frame(1000, to.parse().unwrap())).unwrap();
        assert_eq!(harness.flows(), 0, "{to}");
    }
    harness
        .send(&udp_frame(1000, "10.0.2.3:53".parse().unwrap()))
        .unwrap();
    assert_eq!(harness.flows(), 1);
}

#[test]
fn another_source_address_is_not_taken() {
    let mut harness = harness();
    let mut message = udp_frame(1000, "192.0.2.1:9".parse().unwrap());
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut message[26..]);
    ip.set_src_addr(Ipv4Addr::new(10, 0, 2, 16));
    ip.fill_checksum();
    harness.send(&message).unwrap();
    assert_eq!(harness.flows(), 0);
}

#[test]
fn a_wrong_checksum_counts_unless_the_device_says_it_is_left_out() {
    let mut harness = harness();
    let to = SocketAddrV4::new([192, 0, 2, 1].into(), 80);
    let mut message = syn(1024, to);
    message[12 + 14 + 20 + 16] ^= 1;
    harness.send(&message).unwrap();
    assert_eq!(harness.connections(), 0);
    message[0] = 1;
    harness.send(&message).unwrap();
    assert_eq!(harness.connections(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Frames of every length, and such that are right but for some bytes.
    #[test]
    fn malformed_frames_change_nothing(
        frames in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(any::<u8>(), 1..200), prop::collection::vec((0usize..66, any::<u8>()), 1..6)),
            1..40,
        ),
    ) {
        let mut harness = harness();
        for (valid, bytes, changes) in frames {
            let mut message = bytes;
            if valid {
                message = syn(1024, SocketAddrV4::new([192, 0, 2, 1].into(), 80));
                for (at, value) in changes {
                    message[at] = value;
                }
            }
            harness.send(&message).unwrap();
            prop_assert!(harness.connections() <= MAX_CONNECTIONS);
            answers(&mut harness);
        }
        // It still works.
        harness.send(&syn(2000, SocketAddrV4::new([192, 0, 2, 1].into(), 80))).unwrap();
        let reply = harness.receive().unwrap();
        prop_assert_eq!(reply[12 + 14 + 20 + 13] & 0x12, 0x12);
    }
}
