//! Two devices on taps in two network namespaces, and a driver that hands packets from one to the other, with their headers: what the
//! kernels' network stacks at both ends say to each other goes through both devices, checksums and segments left undone. Needs root, or
//! CAP_SYS_ADMIN and CAP_NET_ADMIN.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use net_util::{MAX_PACKET_LEN, TapOptions};
use vm_memory::{Bytes, GuestAddress};

use super::*;

/// The two ends.
const ENDS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 7, 1), Ipv4Addr::new(10, 9, 7, 2)];

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// A thread in a namespace with a tap, which does what it is told.
struct Host(Sender<Box<dyn FnOnce() + Send>>);

impl Host {
    fn new(address: Ipv4Addr, queues: usize) -> (Self, Tap) {
        let (jobs, todo): (_, Receiver<Box<dyn FnOnce() + Send>>) = channel();
        let host = Self(jobs);
        thread::spawn(move || {
            // SAFETY: no pointers are passed; only this thread, which does nothing else, is moved.
            let alone = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            let error = io::Error::last_os_error();
            assert_eq!(alone, 0, "a network namespace is not permitted: {error}");
            todo.into_iter().for_each(|job| job());
        });
        let tap = host.run(move || {
            let options = TapOptions { name: None, queues };
            let tap = Tap::open(&options).unwrap();
            let interface = tap.interface();
            interface.add_address(address.into(), 24).unwrap();
            interface.set_up(true).unwrap();
            tap
        });
        (host, tap)
    }

    /// Starts `job` there; where its result will be.
    fn start<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
        let (result, there) = channel();
        let job = Box::new(move || {
            // Nobody hears of it if the test failed meanwhile.
            let _ = result.send(job());
        });
        self.0.send(job).unwrap();
        there
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(job).recv_timeout(PATIENCE).expect("a job ended")
    }
}

/// Bytes of a buffer to receive into.
const PIECE: u32 = 4096;
/// Buffers to receive into, of a device.
const PIECES: u16 = 128;
/// Places for packets to send, of a device.
const PLACES: usize = 8;

/// A device, and its driver's buffers.
struct Port {
    guest: Guest,
    /// Of the queue that receives, by head.
    pieces: Vec<u64>,
    /// Where packets to send may be.
    free: Vec<u64>,
    /// Where those are that are sent, by head.
    sending: Vec<u64>,
    /// The most buffers of a packet so far.
    most: u16,
}

impl Port {
    fn new(tap: Tap) -> Self {
        let net = Net::new(config(u16::try_from(tap.queues().len()).unwrap(), 256), tap).unwrap();
        let mut guest = Guest::running(Box::new(net));
        let mut port_pieces = vec![0; 256];
        for _ in 0..PIECES {
            let at = guest.room(PIECE as usize);
            let head = guest.queues[0].add(&[Descriptor::writable(at, PIECE)]);
            port_pieces[usize::from(head.unwrap())] = at;
        }
        guest.kick(RECEIVE);
        let free = (0..PLACES).map(|_| guest.room(MAX_PACKET_LEN)).collect();
        Self {
            guest,
            pieces: port_pieces,
            free,
            sending: vec![0; 256],
            most: 0,
        }
    }

    /// The next packet that came, if there is one. Its buffers are the device's again.
    fn take(&mut self) -> Option<Vec<u8>> {
        let queue = &mut self.guest.queues[usize::from(RECEIVE)];
        let mut packet: Vec<u8> = Vec::new();
        let mut count = 1;
        let mut taken = 0;
        while taken < count {
            let used = match queue.take_used() {
                Some(used) => used,
                None => {
                    assert_eq!(taken, 0, "a part is not there");
                    return None;
                }
            };
            let at = self.pieces[used.head as usize];
            let mut part = vec![0; used.len as usize];
            let memory = &self.guest.memory;
            memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            packet.extend(part);
            count = u16::from_le_bytes([packet[10], packet[11]]);
            taken += 1;
            let head = queue.add(&[Descriptor::writable(at, PIECE)]).unwrap();
            self.pieces[usize::from(head)] = at;
        }
        self.most = self.most.max(count);
        if queue.wants_kick(count) {
            self.guest.kick(RECEIVE);
        }
        Some(packet)
    }

    /// Whether another packet can be sent.
    fn has_place(&mut self) -> bool {
        while let Some(used) = self.guest.queues[usize::from(TRANSMIT)].take_used() {
            self.free.push(self.sending[used.head as usize]);
        }
        !self.free.is_empty()
    }

    fn send(&mut self, packet: &[u8]) {
        let at = self.free.pop().unwrap();
        self.guest
            .memory
            .write_slice(packet, GuestAddress(at))
            .unwrap();
        let queue = &mut self.guest.queues[usize::from(TRANSMIT)];
        let buffer = Descriptor::readable(at, u32::try_from(packet.len()).unwrap());
        let head = queue.add(&[buffer]).unwrap();
        self.sending[usize::from(head)] = at;
        if queue.wants_kick(1) {
            self.guest.kick(TRANSMIT);
        }
    }
}

/// Hands packets on between two hosts while `test` runs. The most buffers that a packet took.
fn between(test: impl FnOnce(&[Host; 2])) -> u16 {
    let (hosts, taps): (Vec<_>, Vec<_>) = ENDS
        .map(|address| Host::new(address, 1))
        .into_iter()
        .unzip();
    let hosts: [Host; 2] = hosts.try_into().ok().unwrap();
    let mut ports: Vec<Port> = taps.into_iter().map(Port::new).collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let bridge = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let mut idle = true;
                for (from, to) in [(0, 1), (1, 0)] {
                    if !ports[to].has_place() {
                        continue;
                    }
                    if let Some(packet) = ports[from].take() {
                        ports[to].send(&packet);
                        idle = false;
                    }
                }
                if idle {
                    thread::yield_now();
                }
            }
            ports.iter().map(|port| port.most).max().unwrap()
        });
        /// Ends the bridge, also where the test fails.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let end = End(&done);
        test(&hosts);
        drop(end);
        bridge.join().unwrap()
    })
}

fn body(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(len).collect()
}

/// Sends `ours` and receives all of the other's, at once.
fn exchange(mut stream: TcpStream, ours: Vec<u8>) -> Vec<u8> {
    let mut sender = stream.try_clone().unwrap();
    let sending = thread::spawn(move || {
        sender.write_all(&ours).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let mut theirs = Vec::new();
    stream.read_to_end(&mut theirs).unwrap();
    sending.join().unwrap();
    theirs
}

#[test]
fn tcp_goes_both_ways_in_segments_longer_than_the_mtu() {
    const LEN: usize = 16 << 20;
    let most = between(|[left, right]| {
        let address = SocketAddr::from((ENDS[0], 7000));
        let listener = left.run(move || TcpListener::bind(address).unwrap());
        let one = left.start(move || exchange(listener.accept().unwrap().0, body(1, LEN)));
        let other =
            right.start(move || exchange(TcpStream::connect(address).unwrap(), body(2, LEN)));
        assert!(one.recv_timeout(PATIENCE).unwrap() == body(2, LEN));
        assert!(other.recv_timeout(PATIENCE).unwrap() == body(1, LEN));
    });
    assert!(most > 1, "no packet was longer than {PIECE} bytes");
}

#[test]
fn datagrams_come_whole() {
    between(|[left, right]| {
        let [here, there] = ENDS.map(|end| SocketAddr::from((end, 7001)));
        let bound = |at| move || UdpSocket::bind(at).unwrap();
        let (one, other) = (left.run(bound(here)), right.run(bound(there)));
        one.set_read_timeout(Some(PATIENCE)).unwrap();
        other.set_read_timeout(Some(PATIENCE)).unwrap();
        for len in [0, 1, 1472, 1473, 9000, 30_000] {
            let sent = body(len as u64, len);
            let mut got = vec![0; len + 1];
            one.send_to(&sent, there).unwrap();
            assert_eq!(other.recv_from(&mut got).unwrap(), (len, here));
            assert!(got[..len] == sent);
            other.send_to(&sent, here).unwrap();
            assert_eq!(one.recv_from(&mut got).unwrap(), (len, there));
            assert!(got[..len] == sent);
        }
    });
}

#[test]
fn an_interface_that_is_down_loses_packets_and_no_more() {
    let (host, tap) = Host::new(ENDS[0], 1);
    let interface = tap.interface().clone();
    let set_up = |up| {
        let interface = interface.clone();
        host.run(move || interface.set_up(up).unwrap());
    };
    let mut guest = Guest::running(Box::new(
        Net::<TestMemory>::new(config(1, 256), tap).unwrap(),
    ));
    // Of ARP, "who has the address?": the host answers.
    let mut question = vec![0; VNET_HEADER_LEN];
    question.extend([0xff; 6].iter().chain(&MAC.bytes()).chain(&[8, 6]));
    question.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    question.extend(MAC.bytes().iter().chain(&ENDS[1].octets()));
    question.extend([0; 6].iter().chain(&ENDS[0].octets()));
    for _ in 0..3 {
        for _ in 0..16 {
            guest.offer(RECEIVE, &room(2000));
        }
        guest.kick(RECEIVE);
        guest.ask(TRANSMIT, &readable(question.clone()));
        // Others than the answer may come.
        while guest.wait_used(RECEIVE).1[24..26] != [8, 6] {}
        set_up(false);
        guest.ask(TRANSMIT, &readable(question.clone()));
        set_up(true);
    }
}

#[test]
fn a_tap_of_several_queues_uses_those_of_the_driver() {
    let (host, tap) = Host::new(ENDS[0], 3);
    let net = Net::<TestMemory>::new(config(3, 64), tap).unwrap();
    let mut guest = Guest::running(Box::new(net));
    let control = 6;
    // A broadcast to any of the queues that are in use.
    let beacon = host.run(|| {
        let socket = UdpSocket::bind((ENDS[0], 0)).unwrap();
        socket.set_broadcast(true).unwrap();
        socket
    });
    let mut offered = [0_usize; 3];
    for used in [1_u16, 3, 2, 3, 1] {
        let command = Request {
            readable: [&[4, 0][..], &used.to_le_bytes()].concat(),
            writable: 1,
        };
        assert_eq!(guest.ask(control, &command), [0]);
        for (pair, offered) in (0..).zip(&mut offered) {
            while *offered < 32 {
                guest.offer(2 * pair, &room(2000));
                *offered += 1;
            }
            guest.kick(2 * pair);
        }
        let text = format!("there are {used}");
        beacon
            .send_to(text.as_bytes(), (Ipv4Addr::new(10, 9, 7, 255), 7002))
            .unwrap();
        // Others come as well: of IPv6, and of what is before.
        let interrupt = guest.interrupt.clone();
        let found = interrupt.wait_for("the beacon", || {
            (0..3).find(|pair: &u16| {
                let taken = std::iter::from_fn(|| guest.take_used(2 * pair));
                let packets: Vec<_> = taken.map(|(_, packet)| packet).collect();
                offered[usize::from(*pair)] -= packets.len();
                packets
                    .iter()
                    .any(|packet| packet.ends_with(text.as_bytes()))
            })
        });
        assert!(found < used, "it came to pair {found} of {used}");
    }
}
