//! The socket device and a driver that offers it anything, through `virtio_devices::Vsock`, with hostile programs at real UNIX sockets.
//!
//! Holds to what `fuzz::device` says. Besides: no more streams than there may be, no thread that waits for a program of the host, and
//! after a reset all programs see the end of their streams and a new stream carries bytes both ways.

#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use arbitrary::Arbitrary;
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use virtio_devices::{Vsock, VsockListener};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
const CID: u64 = 3;
/// Ports of the host from 0 on; somebody listens at all but the last.
const PORTS: u32 = 3;
/// The first port that the device gives to programs that connect.
const FIRST_PORT: u32 = 1 << 30;
/// Programs that are connected at a time.
const MOST_PROGRAMS: usize = 32;

#[derive(Arbitrary, Debug)]
enum Ask {
    Packet(Packet),
    /// Bytes that are no packet, perhaps.
    Bytes(Vec<u8>),
    Receive(u16),
    Event(u8),
}

#[derive(Arbitrary, Debug)]
struct Packet {
    op: u8,
    /// Which port of the host: small ones listen, others were given to programs.
    host: u8,
    guest: u8,
    flags: u8,
    buf_alloc: u32,
    fwd_cnt: u32,
    /// The header says another length.
    len: Option<u32>,
    /// Another type, or other context ids.
    wrong: Option<(u16, u8, u8)>,
    bytes: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
enum Event {
    Connect(Vec<u8>),
    ConnectTo(u8),
    Accept(u8),
    Write(u8, Vec<u8>),
    WriteMuch(u8),
    Read(u8, u16),
    End(u8, bool),
    Close(u8),
}

struct Host {
    dir: TempDir,
    listeners: Vec<UnixListener>,
    programs: Vec<UnixStream>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listen = |port| {
            let path = dir.path().join(format!("v_{port}"));
            let listener = UnixListener::bind(path).expect("a listener");
            listener.set_nonblocking(true).expect("a listener");
            listener
        };
        Self {
            listeners: (0..PORTS - 1).map(listen).collect(),
            dir,
            programs: Vec::new(),
        }
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket");
        if self.programs.len() < MOST_PROGRAMS {
            self.programs.push(stream);
        }
    }

    fn connect(&mut self, line: &[u8]) {
        let stream = UnixStream::connect(self.dir.path().join("v"));
        let mut stream = stream.expect("the device listens");
        // It may be closed already.
        let _ = stream.write(line);
        self.keep(stream);
    }

    fn program(&mut self, n: u8) -> Option<&mut UnixStream> {
        let n = usize::from(n).checked_rem(self.programs.len())?;
        self.programs.get_mut(n)
    }
}

fn port(host: u8) -> u32 {
    match u32::from(host) {
        host if host < 128 => host % PORTS,
        host => FIRST_PORT + host % 8,
    }
}

impl Packet {
    fn encode(&self) -> Vec<u8> {
        let (kind, src, dst) = self.wrong.unwrap_or((1, CID as u8, 2));
        let len = self.len.unwrap_or(self.bytes.len() as u32);
        let mut all = Vec::new();
        all.extend(u64::from(src).to_le_bytes());
        all.extend(u64::from(dst).to_le_bytes());
        all.extend(u32::from(self.guest % 4).to_le_bytes());
        all.extend(port(self.host).to_le_bytes());
        all.extend(len.to_le_bytes());
        all.extend(kind.to_le_bytes());
        all.extend(u16::from(self.op % 9).to_le_bytes());
        all.extend(u32::from(self.flags).to_le_bytes());
        all.extend(self.buf_alloc.to_le_bytes());
        all.extend(self.fwd_cnt.to_le_bytes());
        all.extend(&self.bytes);
        all
    }
}

fn room(writable: u32) -> Request {
    Request {
        readable: Vec::new(),
        writable,
    }
}

fn bytes(readable: Vec<u8>) -> Request {
    Request {
        readable,
        writable: 0,
    }
}

impl Subject for Host {
    type Ask = Ask;
    type Event = Event;

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let path = self.dir.path().join("v");
        let listener = VsockListener::bind(&path).expect("the path is free");
        Box::new(Vsock::new("vsock", CID, listener).expect("a good id"))
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        match ask {
            Ask::Packet(packet) => (TRANSMIT, bytes(packet.encode())),
            Ask::Bytes(all) => {
                // A driver that does nothing wrong sends a header at least.
                let mut all = all.clone();
                all.resize(all.len().max(44), 0);
                (TRANSMIT, bytes(all))
            }
            Ask::Receive(more) => (RECEIVE, room(45 + u32::from(*more))),
            Ask::Event(more) => (EVENT, room(4 + u32::from(*more))),
        }
    }

    fn answers(&self, ask: &Ask) -> bool {
        // Packets wait for a driver that takes no refusals, but of so many as that takes an input has no room.
        matches!(ask, Ask::Packet(_) | Ask::Bytes(_))
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Connect(line) => self.connect(line),
            Event::ConnectTo(guest) => {
                let line = format!("CONNECT {}\n", guest % 4);
                self.connect(line.as_bytes());
            }
            Event::Accept(n) => {
                let n = usize::from(*n) % self.listeners.len();
                if let Ok((stream, _)) = self.listeners[n].accept() {
                    self.keep(stream);
                }
            }
            Event::Write(n, bytes) => {
                let _ = self.program(*n).map(|program| program.write(bytes));
            }
            Event::WriteMuch(n) => {
                let _ = self.program(*n).map(|program| program.write(&[7; 50_000]));
            }
            Event::Read(n, most) => {
                let mut buffer = vec![0; usize::from(*most)];
                let _ = self.program(*n).map(|program| program.read(&mut buffer));
            }
            Event::End(n, read) => {
                let how = if *read {
                    Shutdown::Read
                } else {
                    Shutdown::Write
                };
                let _ = self.program(*n).map(|program| program.shutdown(how));
            }
            Event::Close(n) => {
                if let Some(n) = usize::from(*n).checked_rem(self.programs.len()) {
                    self.programs.swap_remove(n);
                }
            }
        }
    }

    fn alive(&mut self, guest: &mut Guest) {
        for listener in &self.listeners {
            while listener.accept().is_ok() {}
        }
        // What connected meanwhile is still to be taken by the device, and may ask for streams.
        self.programs.clear();
        let ports = |op: u8, bytes: &[u8]| Packet {
            op,
            host: 0,
            guest: 1,
            flags: 0,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
            len: None,
            wrong: None,
            bytes: bytes.to_vec(),
        };
        const REQUEST: u8 = 1;
        const RW: u8 = 5;
        guest.ask(TRANSMIT, &bytes(ports(REQUEST, b"").encode()));
        let (mut program, _) = self.listeners[0].accept().expect("it connects");
        program.set_nonblocking(false).expect("a socket");
        program
            .set_read_timeout(Some(Duration::from_secs(9)))
            .expect("a socket");
        guest.ask(TRANSMIT, &bytes(ports(RW, b"still here").encode()));
        let mut heard = [0; 10];
        program.read_exact(&mut heard).expect("the bytes come");
        assert_eq!(&heard, b"still here");
        program.write_all(b"so am I").expect("there is room");
        loop {
            let packet = guest.ask(RECEIVE, &room(44 + 64));
            if packet.get(30) == Some(&RW) && packet.get(16..20) == Some(&[0; 4]) {
                assert_eq!(&packet[44..], b"so am I");
                break;
            }
        }
        // Programs that nobody answers must not be left waiting after the device is gone.
        guest.reset();
        match program.read(&mut heard) {
            Ok(count) => assert_eq!(count, 0, "bytes after the end"),
            Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{e}"),
        }
    }
}

fuzz_target!(|case: Case<Ask, Event>| run(&case, &mut Host::new()));
