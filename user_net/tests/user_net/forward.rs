//! Ports of the host that lead into the guest.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use smoltcp::socket::tcp::State;
use user_net::{HostForward, UserNet, UserNetConfig, UserNetError};

use crate::guest::{GATEWAY, Guest, config, pattern};

fn forward(text: &str) -> UserNetConfig {
    let mut forward: HostForward = text.parse().unwrap();
    forward.host.set_port(0);
    UserNetConfig {
        host_loopback: false,
        hostfwd: vec![forward],
        ..config()
    }
}

#[test]
fn a_client_of_the_host_reaches_the_guest() {
    let mut guest = Guest::new(&forward("tcp::1-:22"));
    let server = guest.tcp();
    guest.socket(server).listen(22).unwrap();
    let mut client = TcpStream::connect(guest.network.forwards[0]).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    guest.until("the client", |guest| guest.socket(server).may_send());
    let remote = guest.socket(server).remote_endpoint().unwrap();
    assert_eq!(remote.addr, GATEWAY.into());
    client.write_all(b"hello").unwrap();
    assert_eq!(guest.read(server, 5), b"hello");
    guest.write(server, &pattern(5, 100_000));
    guest.socket(server).close();
    guest.poll();
    // Both are done here at once, since what is written fits into the buffers between them.
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert!(all == pattern(5, 100_000));
    drop(client);
    guest.until("the end", |guest| {
        guest.socket(server).state() == State::TimeWait
    });
    guest.end();
}

#[test]
fn a_client_waits_for_a_guest_that_is_not_there_yet() {
    let mut guest = Guest::without_address(&forward("tcp::1-:22"), false);
    let server = guest.tcp();
    guest.socket(server).listen(22).unwrap();
    let mut client = TcpStream::connect(guest.network.forwards[0]).unwrap();
    client.write_all(b"early").unwrap();
    // The network looks for the guest, and finds nobody.
    let mut question = None;
    while question.is_none() {
        guest.wire.wait(20);
        question = guest.wire.receive_frame();
    }
    assert_eq!(question.unwrap()[12..14], [8, 6], "not ARP");
    guest.set_address();
    guest.until("the client", |guest| guest.socket(server).may_recv());
    assert_eq!(guest.read(server, 5), b"early");
}

#[test]
fn a_port_that_the_guest_does_not_have_is_reset() {
    let mut guest = Guest::new(&forward("tcp::1-:22"));
    let mut client = TcpStream::connect(guest.network.forwards[0]).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut end = None;
    guest.until("the reset", |_| {
        end = match client.read(&mut [0; 1]) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => None,
            other => Some(other),
        };
        end.is_some()
    });
    let error = end.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn datagrams_reach_the_guest_and_each_client_gets_its_own_answer() {
    let mut guest = Guest::new(&forward("udp::1-:53"));
    let server = guest.udp(53);
    let clients: Vec<UdpSocket> = (0..3)
        .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
        .collect();
    for (n, client) in clients.iter().enumerate() {
        client
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        client
            .send_to(&[n as u8; 10], guest.network.forwards[0])
            .unwrap();
    }
    for _ in 0..3 {
        let (payload, from) = guest.receive_udp(server);
        assert_eq!(*from.ip(), GATEWAY);
        guest.send_udp(server, from, &[&payload[..], b"!"].concat());
    }
    for (n, client) in clients.iter().enumerate() {
        let mut buffer = [0; 100];
        let (len, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], [&[n as u8; 10][..], b"!"].concat());
        assert_eq!(from, guest.network.forwards[0].into());
    }
}

#[test]
fn a_port_that_is_taken_is_told_at_the_start() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let taken = UserNetConfig {
        hostfwd: vec![format!("tcp::{port}-:22").parse().unwrap()],
        ..config()
    };
    let error = UserNet::new(&taken).err().unwrap();
    let UserNetError::Listen { source, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}-:22")));
}

#[test]
fn a_forward_to_another_address_and_a_wrong_mtu_are_refused() {
    let other = UserNetConfig {
        hostfwd: vec!["tcp::2222-10.0.2.16:22".parse().unwrap()],
        ..config()
    };
    let error = UserNet::new(&other).err().unwrap().to_string();
    assert!(
        error.contains("10.0.2.16") && error.contains("10.0.2.15"),
        "{error}"
    );
    let mtu = UserNetConfig {
        mtu: 575,
        ..config()
    };
    assert!(matches!(UserNet::new(&mtu), Err(UserNetError::Mtu(575))));
    let own: SocketAddrV4 = "127.0.0.1:0".parse().unwrap();
    let mut fine: HostForward = "tcp::1-10.0.2.15:22".parse().unwrap();
    fine.host = own;
    let fine = UserNetConfig {
        hostfwd: vec![fine],
        ..config()
    };
    assert!(UserNet::new(&fine).is_ok());
}
