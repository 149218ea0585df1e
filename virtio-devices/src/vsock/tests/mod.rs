//! The device between a driver and sockets that a test holds.

mod driver;
mod rules;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_virtio::VirtioDevice;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Request, TestMemory};

use super::handler::{EVENT, RECEIVE, TRANSMIT};
use super::packet::{HEADER_LEN, Header, NO_RECEIVE, NO_SEND, NOTHING, op};
use super::stream::BUFFER;
use super::*;
use driver::{CID, Driver, GUEST_BUFFER, Place, line, packet, request};

/// The device, asked for streams by the guest.
struct Sending {
    place: Place,
    host: UnixListener,
    checked: AtomicUsize,
    connected: AtomicUsize,
}

impl Sending {
    fn new() -> Self {
        let place = Place::new();
        let host = place.listen(80);
        host.set_nonblocking(true).unwrap();
        Self {
            place,
            host,
            checked: AtomicUsize::new(0),
            connected: AtomicUsize::new(0),
        }
    }
}

impl Subject for Sending {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        self.place.device()
    }

    fn queue(&self) -> u16 {
        TRANSMIT
    }

    fn request(&self, n: u32) -> Request {
        // Ports are used once, so that no request is refused for the one before; bytes of a request mean nothing.
        let mut asked = request(&packet((n, 80), op::REQUEST, b""));
        asked.readable.extend(vec![0; n as usize % 50]);
        asked
    }

    fn check(&self, _n: u32, answer: &[u8]) {
        assert!(answer.is_empty());
        while let Ok((mut stream, _)) = self.host.accept() {
            // What is open at the end of a test is not read to its end.
            stream.write_all(b"x").unwrap_or_default();
            self.connected.fetch_add(1, Ordering::Relaxed);
        }
        let checked = self.checked.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(self.connected.load(Ordering::Relaxed) >= checked);
    }
}

vm_virtio::conformance!(conformance_transmit, Sending::new());

/// The device, given room for packets, while programs of the host ask for streams.
struct Receiving {
    place: Place,
    clients: Mutex<Vec<UnixStream>>,
}

impl Subject for Receiving {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        self.place.device()
    }

    fn queue(&self) -> u16 {
        RECEIVE
    }

    fn request(&self, _n: u32) -> Request {
        self.clients.lock().unwrap().push(self.place.connect(99));
        Request {
            readable: Vec::new(),
            // What is cut to half of it has room as well.
            writable: 2 * HEADER_LEN as u32,
        }
    }

    fn check(&self, _n: u32, answer: &[u8]) {
        let header = Header::decode(answer.try_into().unwrap());
        assert_eq!(
            (header.op, header.dst_port, header.dst_cid),
            (op::REQUEST, 99, CID)
        );
    }
}

vm_virtio::conformance!(
    conformance_receive,
    Receiving {
        place: Place::new(),
        clients: Mutex::default()
    }
);

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(31).wrapping_add(seed) >> 3) as u8)
        .collect()
}

#[test]
fn the_driver_finds_its_context_id() {
    let place = Place::new();
    let driver = Driver::without_buffers(&place);
    let mut id = [0; 8];
    driver.guest.core.read_config(0, &mut id);
    assert_eq!(u64::from_le_bytes(id), CID);
    assert_eq!(driver.guest.core.device_type(), 19);
    let features = driver.guest.core.registers().features();
    assert_eq!(features, RING_FEATURES | F_STREAM);
    for wrong in [0, 2, 0xffff_ffff, 1 << 32] {
        let place = Place::new();
        let listener = VsockListener::bind(&place.path()).unwrap();
        let refused = Vsock::<TestMemory>::new("v", wrong, listener)
            .err()
            .unwrap();
        assert!(matches!(refused, VsockError::Cid(cid) if cid == wrong));
    }
}

#[test]
fn a_guest_talks_with_a_program_of_the_host() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let ports = (1024, 80);
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    driver.send(ports, op::RW, b"hello, host");
    let mut heard = [0; 11];
    peer.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello, host");
    peer.write_all(b"hello, guest").unwrap();
    assert_eq!(driver.expect(op::RW).1, b"hello, guest");
    // It closes; the guest lets go.
    drop(peer);
    assert_eq!(driver.expect(op::SHUTDOWN).0.flags, NOTHING);
    driver.send(ports, op::RST, b"");
    driver.open(ports);
}

#[test]
fn a_program_of_the_host_talks_with_the_guest() {
    let place = Place::new();
    let mut driver = Driver::new(&place);
    let mut peer = UnixStream::connect(place.path()).unwrap();
    // The line comes in parts, and bytes after it at once.
    peer.write_all(b"CONN").unwrap();
    peer.write_all(b"ECT 99\nearly").unwrap();
    let ports = driver.accept();
    assert_eq!(ports.0, 99);
    assert_eq!(line(&mut peer), format!("OK {}", ports.1));
    assert_eq!(driver.expect(op::RW).1, b"early");
    driver.send(ports, op::RW, b"answer");
    let mut heard = [0; 6];
    peer.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"answer");
    // The guest closes.
    let (mut closing, none) = packet(ports, op::SHUTDOWN, b"");
    closing.flags = NOTHING;
    driver.send_packet(&(closing, none));
    driver.expect(op::RST);
    assert_eq!(peer.read(&mut heard).unwrap(), 0);
}

#[test]
fn a_guest_that_refuses_closes_the_programs_connection() {
    let place = Place::new();
    let mut driver = Driver::new(&place);
    let mut peer = place.connect(99);
    let (asked, _) = driver.expect(op::REQUEST);
    driver.send((asked.dst_port, asked.src_port), op::RST, b"");
    assert_eq!(line(&mut peer), "");
}

#[test]
fn nobody_listens_or_knows_the_way() {
    let place = Place::new();
    let mut driver = Driver::new(&place);
    driver.send((1024, 81), op::REQUEST, b"");
    let (refusal, _) = driver.expect(op::RST);
    assert_eq!((refusal.src_port, refusal.dst_port), (81, 1024));
    // A socket that nobody listens at.
    drop(place.listen(82));
    driver.send((1024, 82), op::REQUEST, b"");
    driver.expect(op::RST);
    for wrong in [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "HELLO 1\n",
        "\n",
        "CONNECT 11111111111111111111111111111111",
    ] {
        let mut peer = UnixStream::connect(place.path()).unwrap();
        peer.write_all(wrong.as_bytes()).unwrap();
        // Closed without a word; with bytes left unread, as an error.
        match peer.read(&mut [0; 8]) {
            Ok(count) => assert_eq!(count, 0, "{wrong}"),
            Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{wrong}"),
        }
    }
    assert_eq!(driver.try_receive(), None);
}

#[test]
fn halves_close_one_by_one() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let ports = (1024, 80);
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    // The program has said all, and still hears.
    peer.write_all(b"question").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    assert_eq!(driver.expect(op::RW).1, b"question");
    assert_eq!(driver.expect(op::SHUTDOWN).0.flags, NO_SEND);
    driver.send(ports, op::RW, b"answer");
    let mut heard = [0; 6];
    peer.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"answer");
    // So has the guest: the program's socket is done both ways.
    let (mut done, none) = packet(ports, op::SHUTDOWN, b"");
    done.flags = NO_SEND;
    driver.send_packet(&(done, none));
    assert_eq!(peer.read(&mut heard).unwrap(), 0);
    assert_eq!(driver.expect(op::SHUTDOWN).0.flags, NOTHING);
    driver.send(ports, op::RST, b"");

    // The other way round.
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    let (mut deaf, none) = packet(ports, op::SHUTDOWN, b"");
    deaf.flags = NO_RECEIVE;
    driver.send_packet(&(deaf, none));
    driver.send(ports, op::RW, b"still");
    let mut heard = [0; 5];
    peer.read_exact(&mut heard).unwrap();
    let refused = peer.write_all(b"x").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::BrokenPipe);
    drop(peer);
    assert_eq!(driver.expect(op::SHUTDOWN).0.flags, NOTHING);
}

#[test]
fn a_program_that_hears_no_more_is_told_of() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let ports = (1024, 80);
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    peer.shutdown(Shutdown::Read).unwrap();
    driver.send(ports, op::RW, b"lost");
    assert_eq!(driver.expect(op::SHUTDOWN).0.flags, NO_RECEIVE);
    peer.write_all(b"but speaks").unwrap();
    assert_eq!(driver.expect(op::RW).1, b"but speaks");
}

/// Sends as the guest, with credit, until the device has told of no more room: how many bytes.
fn fill(driver: &mut Driver, ports: (u32, u32)) -> usize {
    let mut sent = 0u32;
    let mut forwarded = 0;
    loop {
        while let Some((header, _)) = driver.try_receive() {
            if (header.dst_port, header.src_port) == ports {
                forwarded = header.fwd_cnt;
            }
        }
        let room = BUFFER - (sent - forwarded);
        if room < 4096 {
            // It tells how it is, when asked.
            driver.send(ports, op::CREDIT_REQUEST, b"");
            let update = driver.expect(op::CREDIT_UPDATE).0;
            if BUFFER - (sent - update.fwd_cnt) < 4096 {
                return sent as usize;
            }
            forwarded = update.fwd_cnt;
            continue;
        }
        driver.send(ports, op::RW, &pattern(4096, sent));
        sent += 4096;
    }
}

#[test]
fn a_program_that_reads_nothing_holds_nobody_up() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let (slow, quick) = ((1024, 80), (1025, 80));
    driver.open(slow);
    let (mut sleeper, _) = host.accept().unwrap();
    driver.open(quick);
    let (mut peer, _) = host.accept().unwrap();
    let sent = fill(&mut driver, slow);
    assert!(sent >= BUFFER as usize);
    driver.send(quick, op::RW, b"quick");
    let mut heard = [0; 5];
    peer.read_exact(&mut heard).unwrap();
    // The guest closes; the sleeper still gets all when it wakes.
    let (mut closing, none) = packet(slow, op::SHUTDOWN, b"");
    closing.flags = NOTHING;
    driver.send_packet(&(closing, none));
    driver.expect(op::RST);
    let mut all = Vec::new();
    sleeper.read_to_end(&mut all).unwrap();
    let wanted: Vec<u8> = (0..sent as u32)
        .step_by(4096)
        .flat_map(|n| pattern(4096, n))
        .collect();
    assert!(all == wanted, "{} of {sent} bytes", all.len());
    drop(sleeper);
    driver.open(slow);
}

#[test]
fn what_waits_for_a_program_goes_out_as_it_reads() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let ports = (1024, 80);
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    let sent = fill(&mut driver, ports);
    let mut all = vec![0; sent];
    peer.read_exact(&mut all).unwrap();
    let update = driver.expect(op::CREDIT_UPDATE).0;
    assert!(update.fwd_cnt as usize > sent - BUFFER as usize);
    let wanted: Vec<u8> = (0..sent as u32)
        .step_by(4096)
        .flat_map(|n| pattern(4096, n))
        .collect();
    assert!(all == wanted);
}

#[test]
fn a_guest_without_room_is_sent_no_more() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let (slow, quick) = ((1024, 80), (1025, 80));
    driver.open(slow);
    let (mut peer, _) = host.accept().unwrap();
    let bytes = pattern(2 * GUEST_BUFFER as usize, 1);
    peer.write_all(&bytes).unwrap();
    let mut got = Vec::new();
    while got.len() < GUEST_BUFFER as usize {
        got.extend(driver.expect(op::RW).1);
    }
    driver.expect(op::CREDIT_REQUEST);
    // Another stream does not mind.
    driver.open(quick);
    let (mut other, _) = host.accept().unwrap();
    other.write_all(b"quick").unwrap();
    assert_eq!(driver.expect(op::RW).1, b"quick");
    let (mut update, none) = packet(slow, op::CREDIT_UPDATE, b"");
    update.fwd_cnt = GUEST_BUFFER;
    driver.send_packet(&(update, none));
    while got.len() < bytes.len() {
        got.extend(driver.expect(op::RW).1);
    }
    assert!(got == bytes);
}

#[test]
fn refusals_wait_for_a_guest_that_takes_nothing() {
    let place = Place::new();
    let mut driver = Driver::without_buffers(&place);
    let nothing = request(&packet((1, 2), op::RW, b""));
    let mut asked = 0;
    // As many as are used without the guest taking one.
    for _ in 0..200 {
        driver.guest.offer(TRANSMIT, &nothing);
    }
    driver.guest.kick(TRANSMIT);
    for _ in 0..200 {
        driver.guest.wait_used(TRANSMIT);
        asked += 1;
    }
    for _ in 0..200 {
        driver.guest.offer(TRANSMIT, &nothing);
    }
    driver.guest.kick(TRANSMIT);
    while asked < 256 {
        driver.guest.wait_used(TRANSMIT);
        asked += 1;
    }
    driver.guest.core.pause().unwrap();
    assert_eq!(driver.guest.take_used(TRANSMIT), None);
    driver.guest.core.resume().unwrap();
    driver.post(32);
    for _ in 0..400 {
        driver.expect(op::RST);
    }
    while asked < 400 {
        driver.guest.wait_used(TRANSMIT);
        asked += 1;
    }
}

#[test]
fn a_reset_ends_streams_and_the_listener_goes_on() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    driver.open((1024, 80));
    let (mut peer, _) = host.accept().unwrap();
    let mut client = place.connect(99);
    driver.accept();
    line(&mut client);
    driver.guest.reset();
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // Comes while nobody is there to take it.
    let mut client = place.connect(99);
    driver.guest.start(u64::MAX);
    driver.guest.reuse_room();
    let mut driver = driver.again();
    let ports = driver.accept();
    assert_eq!(line(&mut client), format!("OK {}", ports.1));
}

#[test]
fn a_pause_loses_nothing() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let ports = (1024, 80);
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    driver.guest.core.pause().unwrap();
    peer.write_all(b"meanwhile").unwrap();
    let mut client = place.connect(99);
    driver.guest.core.resume().unwrap();
    let mut seen = [driver.receive(), driver.receive()];
    seen.sort_by_key(|(header, _)| header.op);
    assert_eq!(seen[0].0.op, op::REQUEST);
    assert_eq!(seen[1].1, b"meanwhile");
    let asked = seen[0].0;
    driver.send((asked.dst_port, asked.src_port), op::RESPONSE, b"");
    assert_eq!(line(&mut client), format!("OK {}", asked.src_port));
}

#[test]
fn a_restored_guest_is_told_that_its_streams_are_gone() {
    let place = Place::new();
    let host = place.listen(80);
    let mut driver = Driver::new(&place);
    let ports = (1024, 80);
    driver.open(ports);
    let (mut peer, _) = host.accept().unwrap();
    let room = Request {
        readable: Vec::new(),
        writable: 4,
    };
    driver.guest.offer(EVENT, &room);
    driver.guest.kick(EVENT);
    let mut driver = driver.moved(&place);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    driver.guest.core.resume().unwrap();
    assert_eq!(driver.guest.wait_used(EVENT).1, [0; 4]);
    // Once.
    driver.guest.offer(EVENT, &room);
    driver.guest.kick(EVENT);
    driver.send(ports, op::RW, b"x");
    driver.expect(op::RST);
    assert_eq!(driver.guest.take_used(EVENT), None);
    driver.open(ports);
}

#[test]
fn streams_beyond_the_limit_are_refused() {
    // Two descriptors a stream: this needs more than a process may have by default.
    let place = Place::new();
    let mut driver = Driver::new(&place);
    let mut clients = Vec::new();
    let limit = raise_limit(2 * MOST_VSOCK_STREAMS as u64 + 100);
    assert!(limit, "the limit of open files cannot be raised");
    for _ in 0..MOST_VSOCK_STREAMS {
        clients.push(place.connect(99));
        driver.expect(op::REQUEST);
    }
    let host = place.listen(80);
    driver.send((1024, 80), op::REQUEST, b"");
    driver.expect(op::RST);
    let mut late = UnixStream::connect(place.path()).unwrap();
    assert_eq!(late.read(&mut [0]).unwrap(), 0);
    // One that gives up makes room.
    clients.pop();
    driver.expect(op::RST);
    driver.open((1024, 80));
    host.accept().unwrap();
}

/// Whether so many files may be open.
#[allow(unsafe_code)]
fn raise_limit(count: u64) -> bool {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls take a structure of ours.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_cur.max(count.min(limit.rlim_max));
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
    limit.rlim_cur >= count
}
