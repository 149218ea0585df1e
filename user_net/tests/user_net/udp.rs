//! Datagrams and echo requests of the guest.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};
use user_net::{Resolver, UserNetConfig};

use crate::guest::{DNS, GATEWAY, Guest, config, pattern};

fn server() -> (UdpSocket, SocketAddrV4) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, SocketAddrV4::new(GATEWAY, port))
}

#[test]
fn datagrams_go_both_ways() {
    let mut guest = Guest::new(&config());
    let (host, address) = server();
    let socket = guest.udp(5000);
    // None, one, as many as fit.
    for len in [0, 1, 1472] {
        let payload = pattern(len as u64, len);
        guest.send_udp(socket, address, &payload);
        let (got, from) = guest.at_host(&host);
        assert_eq!(got, payload);
        host.send_to(&payload, from).unwrap();
        assert_eq!(guest.receive_udp(socket), (payload, address));
    }
}

#[test]
fn one_port_of_the_guest_is_one_port_of_the_host_and_only_its_peers_answer() {
    let mut guest = Guest::new(&config());
    let (first, first_address) = server();
    let (second, second_address) = server();
    let (stranger, _) = server();
    let socket = guest.udp(5000);
    guest.send_udp(socket, first_address, b"one");
    let (_, from) = guest.at_host(&first);
    let port = SocketAddrV4::new(Ipv4Addr::LOCALHOST, from.port());
    stranger.send_to(b"nobody asked", port).unwrap();
    second.send_to(b"not yet", port).unwrap();
    guest.send_udp(socket, second_address, b"two");
    // What came before this came when it was a stranger's; the order of a socket is kept.
    let (_, again) = guest.at_host(&second);
    assert_eq!(again, from);
    first.send_to(b"answer", port).unwrap();
    let mut got = Vec::new();
    guest.until("the answer", |guest| {
        got.extend(guest.try_udp(socket));
        got.last().is_some_and(|(payload, _)| payload == b"answer")
    });
    assert!(got.iter().all(|(payload, _)| payload != b"nobody asked"));
    assert_eq!(got.last().unwrap().1, first_address);
}

#[test]
fn a_large_datagram_for_the_guest_comes_in_pieces() {
    let mut guest = Guest::new(&config());
    let (host, address) = server();
    let socket = guest.udp(5000);
    guest.send_udp(socket, address, b"ask");
    let (_, from) = guest.at_host(&host);
    let payload = pattern(9, 5000);
    host.send_to(&payload, from).unwrap();
    // The stack of this guest does not put pieces together: this does.
    let mut pieces = Vec::new();
    while pieces.iter().map(Vec::len).sum::<usize>() < 5008 {
        guest.wire.wait(20);
        while let Some(frame) = guest.wire.receive_frame() {
            let ip = smoltcp::wire::Ipv4Packet::new_checked(&frame[14..]).unwrap();
            assert!(ip.verify_checksum());
            let whole: usize = pieces.iter().map(Vec::len).sum();
            assert_eq!(usize::from(ip.frag_offset()), whole);
            pieces.push(ip.payload().to_vec());
            assert_eq!(ip.more_frags(), whole + ip.payload().len() < 5008);
        }
    }
    let whole = pieces.concat();
    let datagram = smoltcp::wire::UdpPacket::new_checked(&whole[..]).unwrap();
    let to = Ipv4Addr::new(10, 0, 2, 15);
    assert!(datagram.verify_checksum(&GATEWAY.into(), &to.into()));
    assert!(datagram.payload() == payload);
}

#[test]
fn dns_reaches_the_resolver_although_the_loopback_is_closed() {
    let (resolver, address) = server();
    let resolved = UserNetConfig {
        host_loopback: false,
        resolver: Resolver::Address(SocketAddrV4::new(Ipv4Addr::LOCALHOST, address.port())),
        ..config()
    };
    let mut guest = Guest::new(&resolved);
    let socket = guest.udp(5353);
    guest.send_udp(socket, SocketAddrV4::new(DNS, 53), b"question");
    let (payload, from) = guest.at_host(&resolver);
    assert_eq!(payload, b"question");
    resolver.send_to(b"answer", from).unwrap();
    let answer = (b"answer".to_vec(), SocketAddrV4::new(DNS, 53));
    assert_eq!(guest.receive_udp(socket), answer);

    // The same port of the host by another name is closed.
    guest.send_udp(socket, address, b"not this way");
    guest.send_udp(socket, SocketAddrV4::new(DNS, 53), b"last");
    let (payload, _) = guest.at_host(&resolver);
    assert_eq!(payload, b"last");
}

fn echo(guest: &mut Guest, to: Ipv4Addr) -> Vec<u8> {
    let socket = guest.ping(77);
    let request = Icmpv4Repr::EchoRequest {
        ident: 77,
        seq_no: 3,
        data: b"is anybody there?",
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(
        &mut Icmpv4Packet::new_unchecked(&mut bytes),
        &ChecksumCapabilities::default(),
    );
    guest
        .sockets
        .get_mut::<icmp::Socket<'_>>(socket)
        .send_slice(&bytes, to.into())
        .unwrap();
    let mut got = Vec::new();
    guest.until("an echo", |guest| {
        let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(socket);
        if let Ok((bytes, from)) = socket.recv() {
            assert_eq!(from, to.into());
            got = bytes.to_vec();
        }
        !got.is_empty()
    });
    got
}

#[test]
fn gateway_and_dns_server_answer_echo_requests() {
    let mut guest = Guest::new(&config());
    for address in [GATEWAY, DNS] {
        let bytes = echo(&mut guest, address);
        let packet = Icmpv4Packet::new_checked(&bytes[..]).unwrap();
        let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
        assert_eq!(
            reply,
            Icmpv4Repr::EchoReply {
                ident: 77,
                seq_no: 3,
                data: b"is anybody there?",
            }
        );
    }
}
