//! Connections that the guest makes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::thread;

use smoltcp::socket::tcp::State;
use user_net::UserNetConfig;

use crate::guest::{DNS, GATEWAY, Guest, config, pattern};

/// A server on the host's loopback, and what the guest calls it.
fn listen() -> (TcpListener, SocketAddrV4) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, SocketAddrV4::new(GATEWAY, port))
}

/// Sends back what comes, until it ends.
fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = stream.read(&mut buffer).unwrap();
        if len == 0 {
            return;
        }
        stream.write_all(&buffer[..len]).unwrap();
    }
}

fn echo_of(len: usize, mut guest: Guest) -> Guest {
    let (listener, server) = listen();
    let thread = thread::spawn(move || echo(listener.accept().unwrap().0));
    let handle = guest.connect(server);
    let bytes = pattern(1, len);
    let (mut sent, mut received) = (0, Vec::new());
    guest.until("the echo", |guest| {
        let socket = guest.socket(handle);
        sent += socket.send_slice(&bytes[sent..]).unwrap();
        while socket.can_recv() {
            let part = socket.recv(|b| (b.len(), b.to_vec())).unwrap();
            received.extend(part);
        }
        received.len() == len
    });
    assert!(received == bytes, "what came back is not what went");
    guest.socket(handle).close();
    guest.until("the end", |guest| {
        guest.socket(handle).state() == State::TimeWait
    });
    thread.join().unwrap();
    guest
}

#[test]
fn eight_mib_go_there_and_back() {
    echo_of(8 << 20, Guest::new(&config())).end();
}

#[test]
fn eight_mib_go_there_and_back_in_large_segments() {
    let guest = echo_of(8 << 20, Guest::with_offloads(&config(), true));
    assert!(guest.wire.large > 100, "{} large frames", guest.wire.large);
    guest.end();
}

#[test]
fn offloads_may_change_while_connections_are_open() {
    let mut guest = Guest::with_offloads(&config(), true);
    let (listener, server) = listen();
    let thread = thread::spawn(move || echo(listener.accept().unwrap().0));
    let handle = guest.connect(server);
    let bytes = pattern(2, 1 << 20);
    for (checksum, tso) in [(true, true), (true, false), (false, true), (true, true)] {
        guest.network.offloads.set(checksum, tso);
        // The engine looks once a round.
        guest.write(handle, b"x");
        assert_eq!(guest.read(handle, 1), b"x");
        let large = guest.wire.large;
        let (mut sent, mut received) = (0, Vec::new());
        guest.until("the echo", |guest| {
            let socket = guest.socket(handle);
            sent += socket.send_slice(&bytes[sent..]).unwrap();
            received.extend(socket.recv(|b| (b.len(), b.to_vec())).unwrap());
            received.len() == bytes.len()
        });
        assert!(received == bytes);
        assert_eq!(guest.wire.large > large, checksum && tso);
    }
    guest.socket(handle).close();
    guest.poll();
    thread.join().unwrap();
}

#[test]
fn a_small_mtu_is_kept_to() {
    let small = UserNetConfig {
        mtu: 576,
        ..config()
    };
    echo_of(1 << 20, Guest::new(&small));
}

#[test]
fn each_side_can_end_and_still_listen() {
    let mut guest = Guest::new(&config());
    // The guest ends first.
    let (listener, server) = listen();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        // It has ended, and hears this yet.
        stream.write_all(&pattern(3, 300_000)).unwrap();
        all
    });
    let handle = guest.connect(server);
    guest.write(handle, b"question");
    guest.socket(handle).close();
    assert!(guest.read(handle, 300_000) == pattern(3, 300_000));
    assert_eq!(thread.join().unwrap(), b"question");
    guest.until("the end", |guest| {
        guest.socket(handle).state() == State::TimeWait
    });

    // The host does.
    let (listener, server) = listen();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"greeting").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let handle = guest.connect(server);
    assert_eq!(guest.read(handle, 8), b"greeting");
    guest.until("the host's end", |guest| {
        guest.socket(handle).state() == State::CloseWait
    });
    guest.write(handle, &pattern(4, 300_000));
    guest.socket(handle).close();
    guest.until("the end", |guest| {
        guest.socket(handle).state() == State::Closed
    });
    assert!(thread.join().unwrap() == pattern(4, 300_000));
}

#[test]
fn a_reset_goes_through() {
    let mut guest = Guest::new(&config());
    // The guest resets.
    let (listener, server) = listen();
    let handle = guest.connect(server);
    let (mut stream, _) = listener.accept().unwrap();
    guest.socket(handle).abort();
    guest.poll();
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    // The host does: what is closed with bytes that nobody has read is reset.
    let (listener, server) = listen();
    let handle = guest.connect(server);
    let (stream, _) = listener.accept().unwrap();
    guest.write(handle, b"nobody reads this");
    let mut byte = [0];
    assert_eq!(stream.peek(&mut byte).unwrap(), 1);
    drop(stream);
    guest.until("the reset", |guest| {
        guest.socket(handle).state() == State::Closed
    });
}

#[test]
fn what_the_host_refuses_is_refused() {
    let mut guest = Guest::new(&config());
    let (listener, server) = listen();
    drop(listener);
    assert!(guest.is_refused(server));
}

#[test]
fn the_hosts_loopback_is_closed_unless_asked_for() {
    let (listener, server) = listen();
    let closed = UserNetConfig {
        host_loopback: false,
        ..config()
    };
    let mut guest = Guest::new(&closed);
    assert!(guest.is_refused(server));
    for address in [
        [127, 0, 0, 1],
        [127, 1, 2, 3],
        [0, 0, 0, 1],
        [169, 254, 169, 254],
    ] {
        let port = server.port();
        assert!(guest.is_refused(SocketAddrV4::new(address.into(), port)));
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "somebody has come through");
}

#[test]
fn dns_over_tcp_reaches_the_resolver() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let resolved = UserNetConfig {
        host_loopback: false,
        resolver: user_net::Resolver::Address(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)),
        ..config()
    };
    let mut guest = Guest::new(&resolved);
    let thread = thread::spawn(move || echo(listener.accept().unwrap().0));
    let handle = guest.connect(SocketAddrV4::new(DNS, 53));
    guest.write(handle, b"\0\x05query");
    assert_eq!(guest.read(handle, 7), b"\0\x05query");
    guest.socket(handle).close();
    guest.poll();
    thread.join().unwrap();
    assert!(guest.is_refused(SocketAddrV4::new(DNS, port)));
}

#[test]
fn sixty_four_connections_do_not_mix() {
    const COUNT: usize = 64;
    const LEN: usize = 100_000;
    let mut guest = Guest::new(&config());
    let (listener, server) = listen();
    let thread = thread::spawn(move || {
        let echoes: Vec<_> = (0..COUNT)
            .map(|_| listener.accept().unwrap().0)
            .map(|stream| thread::spawn(move || echo(stream)))
            .collect();
        for thread in echoes {
            thread.join().unwrap();
        }
    });
    let handles: Vec<_> = (0..COUNT).map(|_| guest.start_connect(server)).collect();
    let bytes: Vec<_> = (0..COUNT).map(|n| pattern(n as u64, LEN)).collect();
    let mut sent = [0; COUNT];
    let mut received = vec![Vec::new(); COUNT];
    guest.until("all echoes", |guest| {
        for (n, handle) in handles.iter().enumerate() {
            let socket = guest.socket(*handle);
            if socket.can_send() {
                sent[n] += socket.send_slice(&bytes[n][sent[n]..]).unwrap();
            }
            if socket.can_recv() {
                received[n].extend(socket.recv(|b| (b.len(), b.to_vec())).unwrap());
            }
        }
        received.iter().all(|r| r.len() == LEN)
    });
    assert!(received == bytes);
    for handle in handles {
        guest.socket(handle).close();
    }
    guest.poll();
    thread.join().unwrap();
}
