//! Linux and the host move streams and datagrams through a tap with several pairs of queues, large packets, and a link that goes
//! away and comes back. `guest/traffic.rs` is the guest's side.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::linux::Linux;
use crate::net::listen;
use crate::support::sniffer::{Frame, Sniffer};
use crate::support::{Kvm, initramfs};

const HOST: &str = "192.168.249.1";
const GUEST: &str = "192.168.249.2";
const TAP: &str = "vmtap0";
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Linux uses as many pairs of queues as it has processors. With more than two it sends IPIs to several at once by a hypercall,
/// which on a KVM that emulates kernel code is repeated for ever.
const CPUS: u64 = 2;
/// Bytes each way in a stream.
const STREAM: usize = 1 << 20;
/// Bytes of a frame as long as the MTU of the test allows, which is 9000.
const FULL: usize = 9014;
/// Bytes of datagrams; the last is more than one packet takes.
const DATAGRAMS: [usize; 5] = [1, 100, 1472, 8972, 30_000];

/// The bytes of stream or datagram `seed`.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let words = std::iter::from_fn(|| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        Some(x.to_le_bytes())
    });
    words.flatten().take(len).collect()
}

fn accept(listener: &TcpListener) -> TcpStream {
    listener.accept().unwrap().0
}

/// Sends the bytes of stream `id + 100` while those of `id` come.
fn both_ways(mut stream: TcpStream, id: u32) {
    thread::scope(|scope| {
        let mut sender = stream.try_clone().unwrap();
        scope.spawn(move || {
            sender.write_all(&pattern(id + 100, STREAM)).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::with_capacity(STREAM);
        stream.read_to_end(&mut got).unwrap();
        let len = got.len();
        assert!(got == pattern(id, STREAM), "stream {id}: {len} bytes came");
    });
}

/// Four streams to the guest at once.
fn four_streams() {
    thread::scope(|scope| {
        for id in 0..4u8 {
            scope.spawn(move || {
                let mut stream = TcpStream::connect((GUEST, 7000)).unwrap();
                stream.write_all(&[id]).unwrap();
                both_ways(stream, id.into());
            });
        }
    });
}

/// Sends back what the guest sends, until there was a datagram of each size.
fn echo(socket: &UdpSocket) {
    let mut buffer = vec![0; 1 << 16];
    let mut missing = DATAGRAMS.to_vec();
    while !missing.is_empty() {
        let (size, from) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(&buffer[..size], from).unwrap();
        missing.retain(|s| *s != size);
    }
}

/// Datagrams to the guest, which sends each back, and an empty one as the last. One that gets lost is sent again.
fn datagrams(socket: &UdpSocket) {
    let mut buffer = vec![0; 1 << 16];
    for (seed, size) in (300..).zip(DATAGRAMS.into_iter().chain([0])) {
        let bytes = pattern(seed, size);
        loop {
            socket.send_to(&bytes, (GUEST, 7001)).unwrap();
            match socket.recv(&mut buffer) {
                Ok(count) if buffer[..count] == bytes => break,
                // What was sent twice comes back twice.
                Ok(count) => assert!(DATAGRAMS.contains(&count) && count != size, "{count}"),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock, "{e}"),
            }
        }
    }
}

/// The tap goes up or down.
fn set_tap(state: &str) {
    let output = Command::new("ip")
        .args(["link", "set", TAP, state])
        .output()
        .unwrap_or_else(|e| panic!("ip: {e}; the package iproute2 has it"));
    assert!(output.status.success(), "{output:?}");
}

/// The longest frames of a protocol: from the guest, and to it.
fn longest(frames: &[Frame], protocol: u8) -> [usize; 2] {
    [false, true].map(|outgoing| {
        let all = frames
            .iter()
            .filter(|f| f.outgoing == outgoing && f.protocol == protocol);
        all.map(|f| f.len).max().unwrap_or(0)
    })
}

/// Everything in one boot.
#[test]
fn linux_moves_streams_and_datagrams_through_several_queues() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let program = initramfs::program("traffic", dir.path());
    let files = dir.path().join("initramfs");
    initramfs::with_files(&files, &[("tests/traffic", &program)]);
    let mut vmm = Linux::new(kvm)
        .cpus(CPUS)
        .initramfs(&files)
        .net("tap=vmtap0,mtu=9000,num_queues=8")
        .start("ch.test=traffic");
    // From here on, this thread and its children are at the tap.
    let control = listen(vmm.pid(), 5000);
    let streams = TcpListener::bind((HOST, 5001)).unwrap();
    let server = UdpSocket::bind((HOST, 5002)).unwrap();
    let client = UdpSocket::bind((HOST, 0)).unwrap();
    let patience = Some(Duration::from_secs(5));
    client.set_read_timeout(patience).unwrap();
    vmm.wait_for("CH-NET: pinged");

    let sniffer = Sniffer::new(TAP);
    let mut control = accept(&control);
    four_streams();
    both_ways(accept(&streams), 10);
    vmm.wait_for("CH-NET: stream to the host");
    // Each side sends segments longer than the MTU allows, for the other to cut.
    let [from_guest, to_guest] = longest(&sniffer.frames(), TCP);
    println!("TCP in frames of up to {from_guest} bytes from the guest, {to_guest} to it");
    assert!(from_guest > FULL && to_guest > FULL);

    let sniffer = Sniffer::new(TAP);
    echo(&server);
    vmm.wait_for("CH-NET: datagrams to the host");
    datagrams(&client);
    vmm.wait_for("CH-NET: datagrams from the host");
    let [from_guest, to_guest] = longest(&sniffer.frames(), UDP);
    println!("UDP in frames of up to {from_guest} bytes from the guest, {to_guest} to it");
    assert!(from_guest >= FULL && to_guest >= FULL);

    vmm.wait_for("CH-NET: take the link away");
    server.set_nonblocking(true).unwrap();
    // What the guest sent twice.
    while server.recv(&mut [0]).is_ok() {}
    set_tap("down");
    vmm.send("away\r");
    vmm.wait_for("CH-NET: bring it back");
    let error = server.recv(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    server.set_nonblocking(false).unwrap();
    set_tap("up");
    vmm.send("back\r");
    let mut words = [0; 10];
    control.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"still here");
    control.write_all(b"so am I").unwrap();
    control.shutdown(Shutdown::Write).unwrap();
    both_ways(accept(&streams), 11);
    echo(&server);

    let ended = Linux::finish(vmm, "traffic");
    let said: Vec<_> = ended
        .out
        .lines()
        .filter_map(|l| l.strip_prefix("CH-NET: "))
        .collect();
    assert!(said.contains(&"mtu 9000 queues 4"), "{said:?}");
    // Each pair that is used has received: the threads of the four streams were on both processors.
    let busy = said
        .iter()
        .filter(|l| l.starts_with("interrupts ") && !l.ends_with(" 0"));
    assert_eq!(busy.count() as u64, CPUS, "{said:?}");
}
