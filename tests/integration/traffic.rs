//! Linux and the host move streams and datagrams through a tap with several pairs of queues, large packets, and a link that goes
//! away and comes back. `guest/traffic.rs` is the guest's side.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

#[path = "guest/pattern.rs"]
mod pattern;

pub use pattern::pattern;

use crate::linux::Linux;
use crate::net::{enter_network_of, listen};
use crate::support::report::finish;
use crate::support::sniffer::{Frame, Sniffer};
use crate::support::{BareMetal, Kvm, initramfs};

const HOST: &str = "192.168.249.1";
const GUEST: &str = "192.168.249.2";
const HOST6: &str = "fd00:249::1";
const GUEST6: &str = "fd00:249::2";
/// Whatever comes, over IPv4 or IPv6.
const ANY: &str = "::";
const TAP: &str = "vmtap0";
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_FRAGMENT: u8 = 44;
/// Linux uses as many pairs of queues as it has processors.
const CPUS: u64 = 4;
/// How long the guest may say nothing.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes each way in a stream.
const STREAM: usize = 1 << 20;
/// Bytes of a frame as long as the MTU of the test allows, which is 9000.
const FULL: usize = 9014;
/// Bytes of datagrams; the last is more than one packet takes.
const DATAGRAMS: [usize; 5] = [1, 100, 1472, 8972, 30_000];

/// Waits for a connection, and a guest that has failed is not waited for.
#[allow(unsafe_code)]
pub fn accept(listener: &TcpListener) -> TcpStream {
    let mut poll = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
    // SAFETY: one pollfd of ours.
    let ready = unsafe { libc::poll(&raw mut poll, 1, patience) };
    assert_eq!(ready, 1, "nobody connects");
    let stream = listener.accept().unwrap().0;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends the bytes of stream `id + 100` while those of `id` come.
pub fn both_ways(mut stream: TcpStream, id: u32) {
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
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(&[id]).unwrap();
                both_ways(stream, id.into());
            });
        }
    });
}

/// Sends back what the guest sends, until there was a datagram of each size. Others are what waited in the guest for the link to come back.
fn echo(socket: &UdpSocket) {
    let mut buffer = vec![0; 1 << 16];
    let mut missing = DATAGRAMS.to_vec();
    while !missing.is_empty() {
        let (size, from) = socket.recv_from(&mut buffer).unwrap();
        if !DATAGRAMS.contains(&size) {
            continue;
        }
        socket.send_to(&buffer[..size], from).unwrap();
        missing.retain(|s| *s != size);
    }
}

/// Datagrams to `guest`, which sends each back, and an empty one as the last. One that gets lost is sent again.
fn datagrams(socket: &UdpSocket, guest: &str) {
    let mut buffer = vec![0; 1 << 16];
    for (seed, size) in (300..).zip(DATAGRAMS.into_iter().chain([0])) {
        let bytes = pattern(seed, size);
        loop {
            socket.send_to(&bytes, (guest, 7001)).unwrap();
            match socket.recv(&mut buffer) {
                Ok(count) if buffer[..count] == bytes => break,
                // What was sent twice comes back twice.
                Ok(count) => assert!(DATAGRAMS.contains(&count) && count != size, "{count}"),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock, "{e}"),
            }
        }
    }
}

/// A socket for datagrams to the guest, over IPv4 or IPv6.
fn client(host: &str) -> UdpSocket {
    let client = UdpSocket::bind((host, 0)).unwrap();
    let patience = Some(Duration::from_secs(5));
    client.set_read_timeout(patience).unwrap();
    client
}

/// Runs `ip` with these words.
fn ip(words: &[&str]) {
    let output = Command::new("ip")
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("ip: {e}; the package iproute2 has it"));
    assert!(output.status.success(), "{output:?}");
}

/// The tap goes up or down.
fn set_tap(state: &str) {
    ip(&["link", "set", TAP, state]);
}

/// The longest frames of a protocol over a version of IP: from the guest, and to it.
fn longest(frames: &[Frame], version: u8, protocol: u8) -> [usize; 2] {
    let longest = [false, true].map(|outgoing| {
        let all = frames
            .iter()
            .filter(|f| f.outgoing == outgoing && f.version == version && f.protocol == protocol);
        all.map(|f| f.len).max().unwrap_or(0)
    });
    println!(
        "IPv{version}, protocol {protocol}: frames of up to {longest:?} bytes from the guest, to it"
    );
    longest
}

/// The bare-metal guest leaves it to the host to cut a datagram, which Linux guests do not do any more, and takes it back uncut.
/// Linux hosts accept that such a guest is there, and since 4.14 cut what they send to it all the same.
#[test]
fn a_datagram_that_is_not_cut_goes_out_whole() {
    let Some(kvm) = Kvm::here() else { return };
    let tests = ["virtio_net_ufo"];
    let mut vmm = BareMetal::new(kvm)
        .builder(&tests)
        .option(
            "--net",
            "tap=vmtap0,mac=2e:89:a8:e4:92:04,host_mac=02:00:00:00:00:01",
        )
        .own_network()
        .start();
    vmm.wait_for("READY virtio_net_ufo");
    enter_network_of(vmm.pid());
    let neighbor = [GUEST, "lladdr", "2e:89:a8:e4:92:04", "dev", TAP];
    ip(&[&["neighbor", "add"], &neighbor[..]].concat());
    let socket = UdpSocket::bind((HOST, 5002)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let sniffer = Sniffer::new(TAP);
    vmm.send("\n");
    let mut buffer = vec![0; 1 << 16];
    let (size, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((size, from.to_string()), (20_000, format!("{GUEST}:5003")));
    let data = (0..20_000u32).map(|i| ((i * 7) >> (i & 3)) as u8);
    assert!(data.eq(buffer[..size].iter().copied()));
    // With Ethernet, IPv4 and UDP, in one frame.
    assert_eq!(longest(&sniffer.frames(), 4, UDP)[0], 14 + 20 + 8 + 20_000);
    socket.send_to(&buffer[..size], from).unwrap();
    let report = finish(vmm.wait(), &tests);
    println!("it went back in {} frames", report.number("net_ufo_parts"));
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
    let prefix = format!("{HOST6}/64");
    ip(&["address", "add", &prefix, "dev", TAP, "nodad"]);
    let streams = TcpListener::bind((ANY, 5001)).unwrap();
    let server = UdpSocket::bind((ANY, 5002)).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let (client4, client6) = (client(HOST), client(HOST6));
    vmm.wait_for("CH-NET: pinged");

    let sniffer = Sniffer::new(TAP);
    let mut control = accept(&control);
    four_streams();
    both_ways(accept(&streams), 10);
    vmm.wait_for("CH-NET: stream to the host");
    both_ways(accept(&streams), 20);
    vmm.wait_for("CH-NET: stream over IPv6");
    // Each side sends segments longer than the MTU allows, for the other to cut.
    let frames = sniffer.frames();
    for version in [4, 6] {
        let [from_guest, to_guest] = longest(&frames, version, TCP);
        assert!(from_guest > FULL && to_guest > FULL);
    }

    let sniffer = Sniffer::new(TAP);
    for (client, guest) in [(&client4, GUEST), (&client6, GUEST6)] {
        echo(&server);
        vmm.wait_for("CH-NET: datagrams to the host");
        datagrams(client, guest);
        vmm.wait_for("CH-NET: datagrams from the host");
    }
    // A part of an IPv6 packet has the protocol of parts, and the longest datagram of one packet over IPv4 is in parts.
    let frames = sniffer.frames();
    for (version, protocol) in [(4, UDP), (6, IPV6_FRAGMENT)] {
        let [from_guest, to_guest] = longest(&frames, version, protocol);
        assert!(from_guest >= FULL && to_guest >= FULL);
    }

    vmm.wait_for("CH-NET: take the link away");
    server.set_nonblocking(true).unwrap();
    // What the guest sent twice.
    while server.recv(&mut [0]).is_ok() {}
    set_tap("down");
    vmm.send("away\r");
    vmm.wait_for("CH-NET: no carrier");
    vmm.wait_for("CH-NET: bring it back");
    let error = server.recv(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    server.set_nonblocking(false).unwrap();
    set_tap("up");
    vmm.send("back\r");
    vmm.wait_for("CH-NET: a carrier");
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
    assert!(said.contains(&"mtu 9000 queues 8"), "{said:?}");
    // Each pair that is used has received: the threads of the four streams were on all processors.
    let busy = said
        .iter()
        .filter(|l| l.starts_with("interrupts ") && !l.ends_with(" 0"));
    assert_eq!(busy.count() as u64, CPUS, "{said:?}");
}
