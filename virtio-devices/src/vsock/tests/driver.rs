//! A guest's driver that speaks the protocol, and the programs of its host.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Descriptor, Guest, Request, TestMemory};

use super::super::handler::{RECEIVE, TRANSMIT};
use super::super::packet::{HEADER_LEN, HOST_CID, Header, STREAM, op};
use super::super::{Vsock, VsockListener};

pub const CID: u64 = 3;
/// Room for bytes in each buffer that takes packets.
const ROOM: usize = 4096;
/// Most bytes in a packet of the guest's.
const MOST_SENT: usize = 64 << 10;
/// Buffers that take packets.
const BUFFERS: usize = 32;
/// Bytes that the guest takes of a stream.
pub const GUEST_BUFFER: u32 = 16 << 10;

/// Where the sockets of a test are.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("vsock")
    }

    /// A program of the host that listens at `port`.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.0.path().join(format!("vsock_{port}"))).unwrap()
    }

    pub fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        let listener = VsockListener::bind(&self.path()).unwrap();
        Box::new(Vsock::new("_vsock", CID, listener).unwrap())
    }

    /// A program of the host that wants the guest's port `port`.
    pub fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }
}

/// A packet of the guest's.
pub fn packet(ports: (u32, u32), op: u16, bytes: &[u8]) -> (Header, Vec<u8>) {
    let header = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: ports.0,
        dst_port: ports.1,
        len: bytes.len() as u32,
        kind: STREAM,
        op,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    };
    (header, bytes.to_vec())
}

pub fn request(packet: &(Header, Vec<u8>)) -> Request {
    Request {
        readable: [packet.0.encode().as_slice(), &packet.1].concat(),
        writable: 0,
    }
}

/// A guest with buffers for packets.
pub struct Driver {
    pub guest: Guest,
    /// Where the buffer of each chain is.
    buffers: HashMap<u16, u64>,
    /// Where packets of the guest's are.
    outgoing: u64,
}

impl Driver {
    pub fn new(place: &Place) -> Self {
        let mut driver = Self::without_buffers(place);
        driver.post(BUFFERS);
        driver
    }

    /// A guest that takes no packets yet.
    pub fn without_buffers(place: &Place) -> Self {
        let mut guest = Guest::running(place.device());
        let outgoing = guest.room(HEADER_LEN + MOST_SENT);
        Self {
            guest,
            buffers: HashMap::new(),
            outgoing,
        }
    }

    /// Gives the device `count` buffers more for packets.
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = self.guest.room(HEADER_LEN + ROOM);
            self.post_at(buffer);
        }
        self.guest.kick(RECEIVE);
    }

    fn post_at(&mut self, buffer: u64) {
        // In pieces, as drivers have it.
        let pieces = [
            Descriptor::writable(buffer, HEADER_LEN as u32),
            Descriptor::writable(buffer + HEADER_LEN as u64, ROOM as u32),
        ];
        let head = self.guest.queues[usize::from(RECEIVE)]
            .add(&pieces)
            .unwrap();
        self.guest.expect_answer(RECEIVE, head, buffer);
        self.buffers.insert(head, buffer);
    }

    pub fn send(&mut self, ports: (u32, u32), op: u16, bytes: &[u8]) {
        self.send_packet(&packet(ports, op, bytes));
    }

    /// Returns once the device has used it.
    pub fn send_packet(&mut self, (header, bytes): &(Header, Vec<u8>)) {
        let memory = &self.guest.memory;
        let all = [header.encode().as_slice(), bytes].concat();
        memory
            .write_slice(&all, GuestAddress(self.outgoing))
            .unwrap();
        let whole = Descriptor::readable(self.outgoing, all.len() as u32);
        let queue = &mut self.guest.queues[usize::from(TRANSMIT)];
        queue.add(&[whole]).unwrap();
        self.guest.kick(TRANSMIT);
        let (used, _) = self.guest.wait_used(TRANSMIT);
        assert_eq!(used.len, 0);
    }

    /// The next packet for the guest.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let (used, bytes) = self.guest.wait_used(RECEIVE);
        self.repost(used.head as u16);
        decode(&bytes)
    }

    /// The next packet for the guest, if there is one.
    pub fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (used, bytes) = self.guest.take_used(RECEIVE)?;
        self.repost(used.head as u16);
        Some(decode(&bytes))
    }

    /// Gives the device the buffer of a packet again.
    fn repost(&mut self, head: u16) {
        let buffer = self.buffers.remove(&head).unwrap();
        self.post_at(buffer);
        self.guest.kick(RECEIVE);
    }

    /// The next packet, which is of this kind.
    pub fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.receive();
        assert_eq!(packet.0.op, op, "{:?}", packet.0);
        packet
    }

    /// After a reset and a new start: with buffers again.
    pub fn again(mut self) -> Self {
        self.outgoing = self.guest.room(HEADER_LEN + MOST_SENT);
        self.buffers.clear();
        self.post(BUFFERS);
        self
    }

    /// Goes on, paused, with another device that was restored.
    pub fn moved(mut self, place: &Place) -> Self {
        self.guest = self.guest.moved_to(|| place.device());
        self
    }

    /// A stream that the guest asks for.
    pub fn open(&mut self, ports: (u32, u32)) {
        self.send(ports, op::REQUEST, b"");
        let (response, _) = self.expect(op::RESPONSE);
        assert_eq!((response.dst_port, response.src_port), ports);
    }

    /// A stream that a program of the host asks for: its ports.
    pub fn accept(&mut self) -> (u32, u32) {
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, CID));
        let ports = (request.dst_port, request.src_port);
        self.send(ports, op::RESPONSE, b"");
        ports
    }
}

fn decode(bytes: &[u8]) -> (Header, Vec<u8>) {
    let (header, payload) = bytes.split_first_chunk().unwrap();
    let header = Header::decode(header);
    assert_eq!(payload.len(), header.len as usize);
    (header, payload.to_vec())
}

/// Reads up to the line feed.
pub fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}
