//! Taps and macvtaps in a network namespace of each test's own, with the kernel's network stack at the other end. They
//! need root, or CAP_SYS_ADMIN and CAP_NET_ADMIN.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use net_util::{
    Interface, InterfaceError, LinkMonitor, MAX_PACKET_LEN, MacAddr, Offloads, ReceiveBatch,
    SendBatch, Tap, TapError, TapOptions, TapQueue, VNET_HEADER_LEN,
};

/// Runs a test on a thread with its own interfaces, and its own view of them in /sys.
fn in_namespace(test: fn()) {
    let alone = thread::spawn(move || {
        // SAFETY: no pointers are passed; only this thread, which does nothing else, is moved.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) };
        assert_eq!(
            result,
            0,
            "this test makes a network namespace, which is not permitted here: {}",
            io::Error::last_os_error()
        );
        run("mount", &["--make-rprivate", "/"]);
        run("mount", &["-t", "sysfs", "sysfs", "/sys"]);
        test();
    });
    if let Err(panic) = alone.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What a command of the host prints; children of this thread are in its namespaces.
fn run(command: &str, args: &[&str]) -> String {
    let output = Command::new(command)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("this test runs {command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn open(name: &str, queues: usize) -> Result<Tap, TapError> {
    Tap::open(&TapOptions {
        name: Some(name.to_owned()),
        queues,
    })
}

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GUEST_MAC: MacAddr = MacAddr::new([0x02, 1, 2, 3, 4, 5]);

/// Up, with an address, and the guest's known, so that no ARP is needed. IPv6 stays silent.
fn ready(tap: &Tap) {
    let interface = tap.interface();
    run(
        "sysctl",
        &[
            "-qw",
            &format!("net.ipv6.conf.{}.disable_ipv6=1", interface.name()),
        ],
    );
    interface.add_address(HOST.into(), 24).unwrap();
    interface.set_up(true).unwrap();
    let (guest, mac) = (GUEST.to_string(), GUEST_MAC.to_string());
    run(
        "ip",
        &[
            "neigh",
            "add",
            &guest,
            "lladdr",
            &mac,
            "dev",
            interface.name(),
        ],
    );
}

fn is_readable(queues: &[TapQueue], milliseconds: i32) -> bool {
    let mut fds: Vec<libc::pollfd> = queues
        .iter()
        .map(|q| libc::pollfd {
            fd: q.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: the array has as many entries as are told, and lives through the call.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) > 0 }
}

fn wait_readable(queues: &[TapQueue]) {
    assert!(is_readable(queues, 20_000), "no packet came in 20 s");
}

/// The next packet of any queue.
fn receive(queues: &[TapQueue]) -> Vec<u8> {
    let mut packet = vec![0; MAX_PACKET_LEN];
    loop {
        for mut queue in queues {
            match queue.read(&mut packet) {
                Ok(len) => {
                    packet.truncate(len);
                    return packet;
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        wait_readable(queues);
    }
}

/// Waits for a tap to go away: a command that another test starts has its descriptors, too, until it is loaded.
fn wait_gone(interface: &Interface) {
    let start = Instant::now();
    while interface.index().is_ok() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{interface:?} stays"
        );
        thread::yield_now();
    }
}

/// Header, Ethernet, IPv4 and UDP without a checksum, from the guest to the host.
fn packet_from_guest(host_mac: MacAddr, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; VNET_HEADER_LEN];
    packet.extend(host_mac.bytes());
    packet.extend(GUEST_MAC.bytes());
    packet.extend([0x08, 0x00]);
    let mut ip = vec![0x45, 0];
    ip.extend((28 + payload.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(HOST.octets());
    let sum: u32 = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(ip);
    packet.extend(4321u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend((8 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

/// Where UDP's data is in a packet.
const PAYLOAD: usize = VNET_HEADER_LEN + 14 + 20 + 8;

#[test]
fn a_new_tap_is_configured_and_goes_away() {
    in_namespace(|| {
        for name in [None, Some(String::new())] {
            let tap = Tap::open(&TapOptions { name, queues: 1 }).unwrap();
            let interface = tap.interface().clone();
            assert_eq!(interface.name(), "vmtap0");
            assert!(interface.index().unwrap() > 0);
            assert!(!interface.is_up().unwrap());
            let mac = MacAddr::random().unwrap();
            interface.set_mac(mac).unwrap();
            assert_eq!(interface.mac().unwrap(), mac);
            interface.set_mtu(9000).unwrap();
            assert_eq!(interface.mtu().unwrap(), 9000);
            assert!(interface.set_mtu(u32::MAX).is_err());
            assert!(interface.ipv4().is_err());
            interface.add_address(HOST.into(), 24).unwrap();
            assert_eq!(interface.ipv4().unwrap(), (HOST, MASK));
            // Told again it is the same one; others stand beside it.
            for (address, prefix) in [("10.9.8.1", 24), ("10.9.9.1", 16), ("fd00:8::1", 48)] {
                let address = address.parse().unwrap();
                interface.add_address(address, prefix).unwrap();
            }
            let told = run("ip", &["-o", "addr", "show", "dev", interface.name()]);
            for address in ["10.9.8.1/24 brd 10.9.8.255", "10.9.9.1/16", "fd00:8::1/48"] {
                assert_eq!(told.matches(address).count(), 1, "{told}");
            }
            let error = interface.add_address(HOST.into(), 33).unwrap_err();
            assert!(
                error.to_string().starts_with("setting the address"),
                "{error}"
            );
            interface.set_up(true).unwrap();
            assert!(interface.is_up().unwrap());
            interface.set_up(false).unwrap();
            assert!(!interface.is_up().unwrap());
            let group = MacAddr::new([1, 0, 0x5e, 0, 0, 1]);
            let error = interface.set_mac(group).unwrap_err();
            assert_eq!(
                error.to_string(),
                "setting the MAC address of network interface \"vmtap0\""
            );

            let other = Tap::open(&TapOptions {
                name: None,
                queues: 1,
            })
            .unwrap();
            assert_eq!(other.interface().name(), "vmtap1");
            // A queue alone keeps it.
            let queues = tap.into_queues();
            assert!(interface.index().is_ok());
            drop(queues);
            wait_gone(&interface);
            let interface = other.interface().clone();
            drop(other);
            wait_gone(&interface);
        }
    });
}

#[test]
fn packets_go_both_ways_whole_and_in_pieces() {
    in_namespace(|| {
        let tap = open("guest0", 1).unwrap();
        ready(&tap);
        let mut queue = &tap.queues()[0];
        let error = queue.read(&mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);

        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.connect((GUEST, 4321)).unwrap();
        socket.send(b"to the guest").unwrap();
        let packet = receive(tap.queues());
        assert_eq!(&packet[PAYLOAD..], b"to the guest");
        assert_eq!(packet[VNET_HEADER_LEN..][..6], GUEST_MAC.bytes());
        // Nothing is left for the reader to do, and one buffer is in use.
        assert_eq!(packet[..2], [0, 0]);

        // Scattered over pieces, the last of them larger than needed.
        socket.send(b"in pieces").unwrap();
        wait_readable(tap.queues());
        let (mut header, mut start, mut rest) = ([0; VNET_HEADER_LEN], [0; 30], [0; 1000]);
        let len = queue
            .read_vectored(&mut [
                IoSliceMut::new(&mut header),
                IoSliceMut::new(&mut start),
                IoSliceMut::new(&mut rest),
            ])
            .unwrap();
        assert_eq!(len, PAYLOAD + 9);
        assert_eq!(&rest[PAYLOAD - VNET_HEADER_LEN - 30..][..9], b"in pieces");

        // Too small a buffer: the rest is lost, and the next packet is another.
        socket.send(&[7; 500]).unwrap();
        socket.send(b"next").unwrap();
        wait_readable(tap.queues());
        assert_eq!(queue.read(&mut [0; 100]).unwrap(), 100);
        assert_eq!(&receive(tap.queues())[PAYLOAD..], b"next");

        let port = socket.local_addr().unwrap().port();
        let packet = packet_from_guest(tap.interface().mac().unwrap(), port, b"to the host");
        assert_eq!(queue.write(&packet).unwrap(), packet.len());
        let (first, last) = packet.split_at(21);
        let len = queue
            .write_vectored(&[IoSlice::new(first), IoSlice::new(last)])
            .unwrap();
        assert_eq!(len, packet.len());
        let mut buffer = [0; 100];
        for _ in 0..2 {
            let len = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"to the host");
        }

        // A guest's memory, by address, is the same to the kernel.
        let mut memory = packet.clone();
        let (head, tail) = memory.split_at_mut(5);
        let pieces = [head, tail].map(|piece| libc::iovec {
            iov_base: piece.as_mut_ptr().cast(),
            iov_len: piece.len(),
        });
        // SAFETY: the pieces are of `memory`, which is not used until the call returns.
        let len = unsafe { queue.write_packet(&pieces) }.unwrap();
        assert_eq!(len, packet.len());
        let len = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"to the host");

        // What is no packet is refused, and harms nothing.
        for bad in [&[0; 1][..], &[0; VNET_HEADER_LEN - 1], &[0xff; 40]] {
            assert!(queue.write(bad).is_err());
        }
        let many = vec![IoSlice::new(b"x"); 2000];
        let error = queue.write_vectored(&many).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    });
}

#[test]
fn a_batch_is_as_many_packets_by_themselves() {
    in_namespace(|| {
        let tap = open("guest0", 1).unwrap();
        ready(&tap);
        let queue = &tap.queues()[0];
        assert!(queue.takes_batches(), "by this kernel a tap takes batches");
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        let mac = tap.interface().mac().unwrap();
        let mut packets: Vec<Vec<u8>> = (0..20)
            .map(|n| packet_from_guest(mac, port, format!("packet {n}").as_bytes()))
            .collect();
        // What is no packet does not harm those after it.
        packets[7] = vec![0xff; 40];
        let mut batch = SendBatch::new().unwrap();
        for _ in 0..3 {
            let pieces: Vec<[libc::iovec; 2]> = packets
                .iter_mut()
                .map(|packet| {
                    let (header, rest) = packet.split_at_mut(VNET_HEADER_LEN);
                    [header, rest].map(|piece| libc::iovec {
                        iov_base: piece.as_mut_ptr().cast(),
                        iov_len: piece.len(),
                    })
                })
                .collect();
            let mut sent = Vec::new();
            let all = pieces.iter().map(|packet| &packet[..]);
            // SAFETY: the pieces are of `packets`, which are not used until the call returns.
            unsafe { batch.write_packets(queue.as_raw_fd(), all, |result| sent.push(result)) }
                .unwrap();
            assert_eq!(sent.len(), 20);
            for (n, (packet, result)) in packets.iter().zip(sent).enumerate() {
                match n {
                    7 => assert!(result.is_err()),
                    _ => assert_eq!(result.unwrap(), packet.len()),
                }
            }
            let mut buffer = [0; 100];
            for n in (0..20).filter(|n| *n != 7) {
                let len = socket.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..len], format!("packet {n}").as_bytes());
            }
        }

        // With a limit to what waits in the kernel, a packet may have to wait.
        let limit: libc::c_int = 100_000;
        // SAFETY: TUNSETSNDBUF reads one int.
        let set = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETSNDBUF, &limit) };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
        assert!(!queue.takes_batches());
    });
}

#[test]
fn a_batch_of_packets_comes_in_one_system_call() {
    in_namespace(|| {
        let tap = open("guest0", 1).unwrap();
        ready(&tap);
        let queue = &tap.queues()[0];
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        let mut batch = ReceiveBatch::new().unwrap();
        // As many as there are places for, fewer, none.
        for count in [8, 5, 0, 1] {
            for n in 0..count {
                let text = format!("packet {n}");
                socket.send_to(text.as_bytes(), (GUEST, 1000)).unwrap();
            }
            if count > 0 {
                wait_readable(tap.queues());
            }
            let mut places = vec![[0; 100]; 8];
            let pieces: Vec<[libc::iovec; 2]> = places
                .iter_mut()
                .map(|place| {
                    let (header, rest) = place.split_at_mut(VNET_HEADER_LEN);
                    [header, rest].map(|piece| libc::iovec {
                        iov_base: piece.as_mut_ptr().cast(),
                        iov_len: piece.len(),
                    })
                })
                .collect();
            let mut came = Vec::new();
            let all = pieces.iter().map(|place| &place[..]);
            // SAFETY: the pieces are of `places`, which are not used until the call returns.
            unsafe { batch.read_packets(queue.as_raw_fd(), all, |result| came.push(result)) }
                .unwrap();
            assert_eq!(came.len(), 8);
            for (n, (place, result)) in places.iter().zip(came).enumerate() {
                if n < count {
                    let text = format!("packet {n}");
                    assert_eq!(result.unwrap(), PAYLOAD + text.len());
                    assert_eq!(&place[PAYLOAD..][..text.len()], text.as_bytes());
                } else {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::WouldBlock);
                }
            }
        }
    });
}

#[test]
fn offloads_leave_checksums_to_the_reader() {
    in_namespace(|| {
        let tap = open("guest0", 1).unwrap();
        ready(&tap);
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.connect((GUEST, 4321)).unwrap();
        let tso = Offloads::TSO4 | Offloads::TSO6 | Offloads::TSO_ECN;
        let supported = tap.supported_offloads(Offloads::all());
        assert!(supported.contains(Offloads::CSUM | tso), "{supported:?}");
        tap.set_offloads(supported).unwrap();
        socket.send(b"x").unwrap();
        // VIRTIO_NET_HDR_F_NEEDS_CSUM, from byte 34 of the packet on, to be put 6 further.
        let packet = receive(tap.queues());
        assert_eq!((packet[0], &packet[6..10]), (1, &[34, 0, 6, 0][..]));
        tap.queues()[0].set_offloads(Offloads::empty()).unwrap();
        socket.send(b"x").unwrap();
        assert_eq!(receive(tap.queues())[0], 0);

        let error = tap.set_offloads(Offloads::TSO4).err();
        // Segments without checksums: kernels differ in whether they refuse that or take it for none.
        if let Some(error) = error {
            assert!(matches!(error, TapError::Feature { .. }), "{error}");
        }
        assert_eq!(tap.supported_offloads(tso), Offloads::empty());
    });
}

#[test]
fn many_queues_share_the_packets() {
    in_namespace(|| {
        let tap = open("guest0", 4).unwrap();
        assert_eq!(tap.queues().len(), 4);
        ready(&tap);
        let mut seen = Vec::new();
        for index in 0..64u8 {
            let socket = UdpSocket::bind((HOST, 0)).unwrap();
            socket.connect((GUEST, 4321)).unwrap();
            socket.send(&[index; 3]).unwrap();
        }
        for _ in 0..64 {
            let packet = receive(tap.queues());
            let payload = &packet[PAYLOAD..];
            assert!(payload.len() == 3 && payload[0] == payload[2]);
            seen.push(payload[0]);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..64).collect::<Vec<u8>>());
        // Any queue sends.
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        for (index, mut queue) in tap.queues().iter().enumerate() {
            let packet = packet_from_guest(tap.interface().mac().unwrap(), port, &[index as u8; 2]);
            queue.write_all(&packet).unwrap();
            let mut buffer = [0; 10];
            assert_eq!(socket.recv(&mut buffer).unwrap(), 2);
            assert_eq!(buffer[..2], [index as u8; 2]);
        }
        for queues in [0, 257] {
            let error = open("guest0", queues).unwrap_err();
            assert!(matches!(error, TapError::Queues(_)), "{error}");
        }
    });
}

#[test]
fn a_tap_that_is_there_is_used_and_stays() {
    in_namespace(|| {
        run(
            "ip",
            &["tuntap", "add", "single", "mode", "tap", "vnet_hdr"],
        );
        let many = [
            "tuntap",
            "add",
            "many",
            "mode",
            "tap",
            "vnet_hdr",
            "multi_queue",
        ];
        run("ip", &many);
        let one = open("single", 1).unwrap();
        let error = open("single", 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attaching to tap \"single\" with 1 queues (another process uses it)"
        );
        // One queue is not many, and the other way round.
        let error = open("single", 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attaching to tap \"single\" with 2 queues (was it made with one queue, or with more?)"
        );
        drop(one);
        assert!(open("single", 2).is_err());
        assert!(open("many", 1).is_err());
        let many = open("many", 3).unwrap();
        assert_eq!(many.queues().len(), 3);
        assert!(matches!(open("many", 1), Err(TapError::Attach { .. })));
        drop(many);
        for name in ["single", "many"] {
            assert!(Interface::new(name).unwrap().index().is_ok());
        }
        // What is no tap at all.
        assert!(matches!(open("lo", 1), Err(TapError::Attach { .. })));
        let error = open("much-too-long-a-name", 1).unwrap_err();
        assert!(
            matches!(error, TapError::Interface(InterfaceError::Name(_))),
            "{error}"
        );
    });
}

fn duplicate(queue: &TapQueue) -> OwnedFd {
    use std::os::fd::AsFd;
    queue.as_fd().try_clone_to_owned().unwrap()
}

#[test]
fn descriptors_handed_over_are_looked_at() {
    in_namespace(|| {
        let tap = open("guest0", 2).unwrap();
        ready(&tap);
        let fds = tap.queues().iter().map(duplicate).collect();
        let again = Tap::from_fds(fds).unwrap();
        assert_eq!(again.interface().name(), "guest0");
        drop(tap);
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.connect((GUEST, 4321)).unwrap();
        socket.send(b"still here").unwrap();
        assert_eq!(&receive(again.queues())[PAYLOAD..], b"still here");

        let other = open("guest1", 1).unwrap();
        let fds = vec![duplicate(&again.queues()[0]), duplicate(&other.queues()[0])];
        let error = Tap::from_fds(fds).unwrap_err();
        assert_eq!(
            error.to_string(),
            "descriptors of different taps, \"guest0\" and \"guest1\""
        );
        assert!(matches!(Tap::from_fds(vec![]), Err(TapError::Queues(0))));
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = Tap::from_fds(vec![null.into()]).unwrap_err();
        assert!(matches!(error, TapError::NotATap { .. }), "{error}");
        // A descriptor of the tun driver that is attached to nothing.
        let tun = std::fs::File::open("/dev/net/tun").unwrap();
        let error = Tap::from_fds(vec![tun.into()]).unwrap_err();
        assert!(matches!(error, TapError::NotATap { .. }), "{error}");
    });
}

#[test]
fn a_macvtap_is_opened_by_its_name() {
    in_namespace(|| {
        run(
            "ip",
            &[
                "link", "add", "wire0", "type", "veth", "peer", "name", "wire1",
            ],
        );
        // Device nodes go by number, whatever the namespace: one that no other has.
        let index = (70_000 + std::process::id() % 10_000).to_string();
        run(
            "ip",
            &[
                "link", "add", "link", "wire0", "name", "mac0", "index", &index, "type", "macvtap",
                "mode", "bridge",
            ],
        );
        for name in ["wire0", "wire1", "mac0"] {
            let disable = format!("net.ipv6.conf.{name}.disable_ipv6=1");
            run("sysctl", &["-qw", &disable]);
            Interface::new(name).unwrap().set_up(true).unwrap();
        }
        let far = Interface::new("wire1").unwrap();
        far.add_address(HOST.into(), 24).unwrap();
        let tap = open("mac0", 2).unwrap();
        assert_eq!(tap.interface().name(), "mac0");
        let mac = tap.interface().mac().unwrap().to_string();
        let guest = GUEST.to_string();
        run(
            "ip",
            &["neigh", "add", &guest, "lladdr", &mac, "dev", "wire1"],
        );
        tap.set_offloads(Offloads::CSUM).unwrap();

        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.connect((GUEST, 4321)).unwrap();
        // The kernel tells the two links of each other's carrier when it comes to that, and drops what is sent before.
        let sent = |data| {
            (0..100).any(|_| {
                socket.send(data).unwrap();
                is_readable(tap.queues(), 200)
            })
        };
        assert!(sent(b"over the wire"), "nothing came over the wire");
        assert_eq!(&receive(tap.queues())[PAYLOAD..], b"over the wire");
        let port = socket.local_addr().unwrap().port();
        let packet = packet_from_guest(far.mac().unwrap(), port, b"and back");
        let mut queue = &tap.queues()[1];
        let mut buffer = [0; 100];
        let wait = Some(Duration::from_millis(200));
        socket.set_read_timeout(wait).unwrap();
        let back = (0..100).find_map(|_| {
            queue.write_all(&packet).unwrap();
            socket.recv(&mut buffer).ok()
        });
        assert_eq!(back.map(|len| &buffer[..len]), Some(&b"and back"[..]));

        // As a descriptor without its flags, as a manager hands it over.
        drop(tap);
        let fd = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/tap{index}"))
            .unwrap();
        let tap = Tap::from_fds(vec![fd.into()]).unwrap();
        // A command that another test starts may have the first queues a while longer, and get packets.
        let found = (0..100).any(|_| {
            socket.send(b"again").unwrap();
            is_readable(tap.queues(), 200) && &receive(tap.queues())[PAYLOAD..] == b"again"
        });
        assert!(found);
    });
}

/// Waits until there is something to read.
fn poll_in(fd: RawFd) {
    let mut fds = [libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }];
    // SAFETY: one pollfd, as its length says.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), 1, 30_000) };
    assert_eq!(ready, 1, "nothing came");
}

/// Waits until the monitor says that an interface changed, as often as it takes for this one's link to be so.
fn wait_for_link(monitor: &LinkMonitor, interface: &Interface, wanted: bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while interface.has_link().unwrap() != wanted {
        assert!(Instant::now() < deadline, "no change was told");
        poll_in(monitor.as_raw_fd());
        monitor.take_changes().unwrap();
    }
}

#[test]
fn a_monitor_tells_when_a_link_goes_and_comes() {
    in_namespace(|| {
        let monitor = LinkMonitor::new().unwrap();
        assert!(!monitor.take_changes().unwrap());
        let tap = open("link0", 1).unwrap();
        let interface = tap.interface();
        assert!(!interface.has_link().unwrap());
        for up in [true, false, true] {
            interface.set_up(up).unwrap();
            wait_for_link(&monitor, interface, up);
        }
        // An interface that is gone is no error of the monitor.
        let interface = interface.clone();
        drop(tap);
        poll_in(monitor.as_raw_fd());
        assert!(monitor.take_changes().unwrap());
        assert!(interface.has_link().is_err());
    });
}
