//! A program for the Linux guest: `AF_VSOCK` sockets against programs of the host. `tests/integration/vsock.rs` builds it, packs it
//! into the initramfs as `/tests/vsock`, and is its peer. Says a line `CH-VSOCK: ...` for each thing that works; ends with 0 if all does.

mod pattern;

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::os::fd::FromRawFd;

use pattern::pattern;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
const SHUT_WR: i32 = 1;
const F_SETFL: i32 = 4;
const O_NONBLOCK: i32 = 0o4000;

/// `struct sockaddr_vm` of Linux.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(fd: i32, address: *const Address, len: u32) -> i32;
    fn bind(fd: i32, address: *const Address, len: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut Address, len: *mut u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
    fn fcntl(fd: i32, command: i32, ...) -> i32;
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

struct Socket {
    fd: i32,
    file: File,
}

impl Socket {
    fn new(fd: i32) -> Self {
        // SAFETY: it is new and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        Self { fd, file }
    }

    fn connect(port: u32) -> io::Result<Self> {
        // SAFETY: it makes a descriptor.
        let this = Self::new(checked(unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) })?);
        let address = address(HOST, port);
        // SAFETY: the address is ours, of the size told.
        checked(unsafe { connect(this.fd, &address, mem::size_of::<Address>() as u32) })?;
        Ok(this)
    }

    fn listen(port: u32) -> io::Result<Self> {
        // SAFETY: as above.
        unsafe {
            let this = Self::new(checked(socket(AF_VSOCK, SOCK_STREAM, 0))?);
            let address = address(ANY, port);
            checked(bind(this.fd, &address, mem::size_of::<Address>() as u32))?;
            checked(listen(this.fd, 8))?;
            Ok(this)
        }
    }

    fn accept(&self) -> io::Result<Self> {
        let mut address = Address::default();
        let mut len = mem::size_of::<Address>() as u32;
        // SAFETY: both are ours.
        let fd = checked(unsafe { accept(self.fd, &mut address, &mut len) })?;
        assert_eq!(address.cid, HOST);
        Ok(Self::new(fd))
    }

    fn end(&self) -> io::Result<()> {
        // SAFETY: it is open.
        checked(unsafe { shutdown(self.fd, SHUT_WR) }).map(drop)
    }
}

fn address(cid: u32, port: u32) -> Address {
    Address {
        family: AF_VSOCK as u16,
        port,
        cid,
        ..Address::default()
    }
}

fn say(what: &str) {
    println!("CH-VSOCK: {what}");
}

fn echo() -> io::Result<()> {
    let mut socket = Socket::connect(7000)?;
    let sent = pattern(0, 20_000);
    socket.file.write_all(&sent)?;
    let mut back = vec![0; sent.len()];
    socket.file.read_exact(&mut back)?;
    assert!(back == sent, "other bytes came back");
    say("echo");
    Ok(())
}

/// A program of the host connects, and gets back what it sends.
fn serve() -> io::Result<()> {
    let listener = Socket::listen(7100)?;
    say("listening");
    let mut socket = listener.accept()?;
    let mut all = Vec::new();
    socket.file.read_to_end(&mut all)?;
    socket.file.write_all(&all)?;
    say(&format!("served {} bytes", all.len()));
    Ok(())
}

/// Streams that are all open at once, with bytes both ways.
fn many() -> io::Result<()> {
    const STREAMS: u32 = 64;
    const LEN: usize = 8 << 10;
    const PIECE: usize = 4 << 10;
    let mut sockets = (0..STREAMS)
        .map(|_| Socket::connect(7001))
        .collect::<io::Result<Vec<_>>>()?;
    for (id, socket) in (0..).zip(&mut sockets) {
        let id: u32 = id;
        socket.file.write_all(&id.to_le_bytes())?;
    }
    for at in (0..LEN).step_by(PIECE) {
        for (id, socket) in (0..).zip(&mut sockets) {
            socket.file.write_all(&pattern(id, LEN)[at..at + PIECE])?;
        }
    }
    let mut got = vec![Vec::new(); sockets.len()];
    for _ in (0..LEN).step_by(PIECE) {
        for (got, socket) in got.iter_mut().zip(&mut sockets) {
            let mut piece = vec![0; PIECE];
            socket.file.read_exact(&mut piece)?;
            got.extend(piece);
        }
    }
    for (id, got) in (0u32..).zip(&got) {
        assert!(*got == pattern(!id, LEN), "stream {id} brought other bytes");
    }
    for socket in &mut sockets {
        // The host says so if what it got is right.
        let mut right = [0];
        socket.file.read_exact(&mut right)?;
        assert_eq!(right, [b'+']);
    }
    say(&format!("{STREAMS} streams"));
    Ok(())
}

fn halves() -> io::Result<()> {
    let mut socket = Socket::connect(7002)?;
    socket.file.write_all(b"question")?;
    socket.end()?;
    let mut answer = Vec::new();
    socket.file.read_to_end(&mut answer)?;
    assert_eq!(answer, b"answer to question");
    say("halves");
    Ok(())
}

fn resets() -> io::Result<()> {
    let refused = Socket::connect(7009).err().expect("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionReset, "{refused}");
    // The host closes at once.
    let mut socket = Socket::connect(7003)?;
    let written = loop {
        if let Err(e) = socket.file.write_all(&[0; 4096]) {
            break e;
        }
    };
    let gone = [
        ErrorKind::BrokenPipe,
        ErrorKind::ConnectionReset,
        ErrorKind::NotConnected,
    ];
    assert!(gone.contains(&written.kind()), "{written}");
    say("resets");
    Ok(())
}

/// A program of the host that never reads, and another stream that does not mind.
fn stuck() -> io::Result<()> {
    let mut socket = Socket::connect(7004)?;
    // SAFETY: it is open.
    checked(unsafe { fcntl(socket.fd, F_SETFL, O_NONBLOCK) })?;
    let mut sent = 0;
    let piece = vec![0; 16 << 10];
    let full = loop {
        match socket.file.write(&piece) {
            Ok(count) => sent += count,
            Err(e) => break e,
        }
        assert!(sent < 16 << 20, "somebody takes all");
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock, "{full}");
    echo()?;
    say("stuck");
    Ok(())
}

fn main() -> io::Result<()> {
    echo()?;
    many()?;
    halves()?;
    resets()?;
    stuck()?;
    serve()
}
