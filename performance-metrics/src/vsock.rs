//! Sockets between guest and host: bytes of one stream either way, and the same between two threads over a UNIX socket, which is the
//! least that a VMM's stream goes through.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::counters::{Plain, own_time};
use crate::vmm::{Measured, Vmm, limits};

/// Bytes of a read or a write, and of what costs are told for.
pub const CHUNK: usize = 64 << 10;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// From the guest.
    Transmit,
    /// To the guest.
    Receive,
}

impl Way {
    /// By a VMM with the bare-metal guest: operations are bytes.
    ///
    /// # Errors
    /// What the VMM or the guest says; or bytes that got lost.
    pub fn in_guest(
        self,
        binary: &Path,
        guest: &Path,
        time: Duration,
        tracing: bool,
    ) -> Result<Measured> {
        let dir = tempfile::tempdir().context("a directory for sockets")?;
        let socket = dir.path().join("vsock");
        let (test, port) = match self {
            Self::Transmit => ("bench_vsock_tx", 5001),
            Self::Receive => ("bench_vsock_rx", 5002),
        };
        let path = dir.path().join(format!("vsock_{port}"));
        let listener = UnixListener::bind(&path).context("listening for the guest")?;
        let peer = thread::spawn(move || self.serve(listener.accept()?.0));
        let mut vsock = OsString::from("cid=3,socket=");
        vsock.push(&socket);
        let options = ["--vsock".into(), vsock];
        let words = format!("test={test} {}", limits(time));
        let mut vmm = Vmm::start(binary, guest, &words, &options, tracing)?;
        let measured = vmm.measured()?;
        vmm.finish()?;
        let moved = joined(peer)?;
        let bytes = measured.operations;
        match self {
            Self::Transmit => ensure!(
                moved >= bytes,
                "the guest sent {bytes} bytes, of which {moved} came"
            ),
            Self::Receive => ensure!(
                moved >= bytes,
                "the guest received {bytes} bytes, and {moved} were sent"
            ),
        }
        Ok(measured)
    }

    /// The host's end: how many bytes went through it until the guest ended the stream.
    fn serve(self, mut stream: UnixStream) -> std::io::Result<u64> {
        let mut chunk = vec![0x5a; CHUNK];
        let mut bytes = 0;
        loop {
            let moved = match self {
                Self::Transmit => stream.read(&mut chunk),
                Self::Receive => stream.write(&chunk),
            };
            match moved {
                Ok(0) => return Ok(bytes),
                Ok(count) => bytes += count as u64,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e)
                    if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) =>
                {
                    return Ok(bytes);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Bytes a second from one thread to another, which is the same either way.
    ///
    /// # Errors
    /// When sockets fail.
    pub fn on_host(self, time: Duration) -> Result<Plain> {
        let (ours, theirs) = UnixStream::pair().context("a pair of sockets")?;
        let peer = thread::spawn(move || Self::Transmit.serve(theirs));
        let (before, start) = (own_time(), Instant::now());
        let mut stream = ours;
        let chunk = vec![0x5a; CHUNK];
        while start.elapsed() < time {
            stream.write_all(&chunk).context("writing to a socket")?;
        }
        drop(stream);
        let bytes = joined(peer)? as f64;
        Ok(Plain {
            value: bytes / start.elapsed().as_secs_f64(),
            cpu_us: own_time().saturating_sub(before) as f64 / 1e3 / (bytes / CHUNK as f64),
        })
    }
}

fn joined(peer: JoinHandle<std::io::Result<u64>>) -> Result<u64> {
    match peer.join() {
        Ok(moved) => moved.context("the host's end of the stream"),
        Err(_) => bail!("the host's end of the stream has panicked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_are_counted() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || Way::Transmit.serve(theirs));
        ours.write_all(&[1; 100_000]).unwrap();
        drop(ours);
        assert_eq!(joined(peer).unwrap(), 100_000);
    }

    #[test]
    fn a_writer_ends_with_its_reader() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || Way::Receive.serve(theirs));
        ours.read_exact(&mut [0; 1000]).unwrap();
        drop(ours);
        assert!(joined(peer).unwrap() >= 1000);
    }
}
