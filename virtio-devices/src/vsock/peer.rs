//! The host's end of one stream: a connected UNIX socket, and what of the guest's bytes it did not take yet.
#![allow(unsafe_code)]

use std::io;
use std::io::ErrorKind;
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemory;
use vm_memory::bitmap::Bitmap;
use vm_virtio::{Fault, Reader, Writer};

use super::packet::{NO_RECEIVE, NO_SEND};
use crate::pieces::{MOST, Pieces};

/// Most bytes of the line that a program of the host begins with: `CONNECT 4294967295` and two ends of line.
const MOST_LINE: usize = 32;

/// Where a connection with the host is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// A program of the host connected, and has not said where to.
    Greeting,
    /// It is this stream of the muxer.
    Stream(u32),
    /// The guest's end is gone; the host gets the rest of what it sent.
    Finishing,
}

/// What a program of the host has said.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Greeting {
    /// Not enough yet.
    Partial,
    /// `CONNECT port`.
    Connect(u32),
    /// Something else, or nothing any more.
    Wrong,
}

/// The host's end of a stream.
#[derive(Debug)]
pub struct Peer {
    socket: UnixStream,
    pub stage: Stage,
    /// What the host did not take yet is from `start` on.
    backlog: Vec<u8>,
    start: usize,
    /// The guest sends no more after the backlog.
    last: bool,
    /// The host sends no more, or nobody wants it.
    pub ended: bool,
}

impl Peer {
    pub fn new(socket: UnixStream, stage: Stage) -> Self {
        Self {
            socket,
            stage,
            backlog: Vec::new(),
            start: 0,
            last: false,
            ended: false,
        }
    }

    /// Bytes that the host did not take yet.
    pub fn waiting(&self) -> usize {
        self.backlog.len() - self.start
    }

    /// Reads the first line, and no byte beyond it: what follows is the guest's.
    pub fn greeting(&mut self) -> Greeting {
        let mut line = [0; MOST_LINE];
        let Ok(seen) = receive(&self.socket, &mut line, libc::MSG_PEEK) else {
            return Greeting::Wrong;
        };
        let Some(seen) = seen else {
            return Greeting::Partial;
        };
        let line = line.get_mut(..seen).unwrap_or_default();
        let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
            let may_go_on = (1..MOST_LINE).contains(&seen);
            return if may_go_on {
                Greeting::Partial
            } else {
                Greeting::Wrong
            };
        };
        let Some(line) = line.get_mut(..=end) else {
            return Greeting::Wrong;
        };
        match receive(&self.socket, line, 0) {
            Ok(Some(count)) if count == line.len() => {
                parse(line).map_or(Greeting::Wrong, Greeting::Connect)
            }
            _ => Greeting::Wrong,
        }
    }

    /// Tells the host that the guest took the connection. Whether that went out, as it does unless the host is gone.
    pub fn welcome(&mut self, port: u32) -> bool {
        let line = format!("OK {port}\n");
        matches!(send_bytes(&self.socket, line.as_bytes()), Ok(sent) if sent == line.len())
    }

    /// Reads up to `most` bytes into the guest's memory.
    ///
    /// # Errors
    /// The first is the driver's fault; the second what the kernel says, [`ErrorKind::WouldBlock`] where there is nothing.
    pub fn read<M: GuestMemory>(
        &mut self,
        writer: &Writer<'_, M>,
        most: usize,
        pieces: &mut Pieces,
    ) -> Result<io::Result<usize>, Fault> {
        let most = most.min(writer.left());
        pieces.clear();
        writer.clone().slices(most, |slice| {
            if pieces.len() < MOST {
                pieces.push(&slice);
            }
            Ok(())
        })?;
        let mut message = message(pieces);
        // SAFETY: the pieces were found in guest memory just now, whose mapping the writer borrows; nobody makes references to them.
        let read = retry(|| unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) });
        if let Ok(count) = read {
            // The kernel wrote through pointers, which told nobody.
            writer.clone().slices(count.min(most), |slice| {
                slice.bitmap().mark_dirty(0, slice.len());
                Ok(())
            })?;
        }
        Ok(read)
    }

    /// Brings the next `len` bytes of the guest's to the host; what it does not take now waits here. How many went out at once.
    ///
    /// # Errors
    /// The first is the driver's fault; after the second the host takes no more.
    pub fn write<M: GuestMemory>(
        &mut self,
        reader: &Reader<'_, M>,
        len: usize,
        pieces: &mut Pieces,
    ) -> Result<io::Result<usize>, Fault> {
        let mut done = 0;
        if self.waiting() == 0 {
            pieces.clear();
            reader.clone().slices(len, |slice| {
                if pieces.len() < MOST {
                    pieces.push(&slice);
                }
                Ok(())
            })?;
            let message = message(pieces);
            // SAFETY: as in `read`; the kernel only reads them.
            let sent = retry(|| unsafe {
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL,
                )
            });
            done = match sent {
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
                Err(e) => return Ok(Err(e)),
            };
        }
        if done < len {
            let mut rest = reader.clone();
            rest.skip(done)?;
            if self.start > self.backlog.len() / 2 {
                self.backlog.drain(..self.start);
                self.start = 0;
            }
            let before = self.backlog.len();
            self.backlog.resize(before + len - done, 0);
            rest.read(self.backlog.get_mut(before..).unwrap_or_default())?;
        }
        Ok(Ok(done))
    }

    /// Brings what waits to the host. How many bytes went out.
    ///
    /// # Errors
    /// The host takes no more.
    pub fn flush(&mut self) -> io::Result<usize> {
        let mut done = 0;
        while self.waiting() > 0 {
            let rest = self.backlog.get(self.start..).unwrap_or_default();
            match send_bytes(&self.socket, rest) {
                Ok(count) => {
                    self.start += count;
                    done += count;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(done),
                Err(e) => return Err(e),
            }
        }
        self.backlog = Vec::new();
        self.start = 0;
        if self.last {
            // It fails only where the host is gone, which shows elsewhere.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Ok(done)
    }

    /// Forgets what waits, as the host takes no more. How many bytes that were.
    pub fn drop_backlog(&mut self) -> usize {
        let count = self.waiting();
        self.backlog = Vec::new();
        self.start = 0;
        count
    }

    /// The guest is done with `halves`: the host hears so, after all that waits for it.
    pub fn guest_done(&mut self, halves: u32) {
        if halves & NO_SEND != 0 {
            self.last = true;
            if self.waiting() == 0 {
                let _ = self.socket.shutdown(Shutdown::Write);
            }
        }
        if halves & NO_RECEIVE != 0 {
            self.ended = true;
            let _ = self.socket.shutdown(Shutdown::Read);
        }
    }

    /// Nothing can go either way any more.
    pub fn is_hung_up(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: 0,
            revents: 0,
        };
        // SAFETY: one structure of ours, and no waiting.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }
}

impl AsRawFd for Peer {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The port of `CONNECT port`.
fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let (word, port) = line.split_once(' ')?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (word.eq_ignore_ascii_case("CONNECT") && digits)
        .then(|| port.parse().ok())
        .flatten()
}

fn message(pieces: &Pieces) -> libc::msghdr {
    // SAFETY: it is plain numbers and pointers, valid as zeros.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = pieces.as_slice().as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    message
}

/// Reads into `bytes`. None where there is nothing yet.
fn receive(socket: &UnixStream, bytes: &mut [u8], flags: i32) -> io::Result<Option<usize>> {
    // SAFETY: the bytes are ours, as many as told.
    let read = retry(|| unsafe {
        libc::recv(
            socket.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            flags,
        )
    });
    match read {
        Ok(count) => Ok(Some(count)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// Unlike `write`, this never raises a signal.
fn send_bytes(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the bytes are ours, as many as told.
    retry(|| unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_NOSIGNAL,
        )
    })
}

/// The count that a system call gives, which is called again where a signal came.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
