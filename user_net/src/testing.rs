//! For tests and fuzzing: the engine without its thread, by hand, with a host's network that is not there.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::config::{Resolver, UserNetConfig};
use crate::engine::{Engine, Ports, UserNetError};
use crate::link::{ETHERNET_LEN, HEADER_LEN};
use crate::sys;
use crate::tcp::MAX_CONNECTIONS;

/// Ends of connections that are kept; older ones are closed.
const KEPT: usize = MAX_CONNECTIONS;

/// An engine that does a round when it is told to, and never reaches the host's network: who connects to port 1 is refused, to
/// port 2 finds no host, to port 3 waits for ever; any other port is served by this side. Datagrams go nowhere.
pub struct Harness {
    engine: Engine,
    device: File,
    served: Arc<Mutex<Served>>,
}

/// The far ends of connections.
#[derive(Default)]
struct Served {
    streams: Vec<UnixStream>,
    /// Listening, with nobody to accept: for connections that stay under way.
    pending: Vec<OwnedFd>,
}

struct Nowhere {
    served: Arc<Mutex<Served>>,
}

impl crate::shared::Outside for Nowhere {
    fn connect(&mut self, to: SocketAddrV4) -> io::Result<TcpStream> {
        match to.port() {
            1 => return Err(ErrorKind::ConnectionRefused.into()),
            2 => return Err(ErrorKind::HostUnreachable.into()),
            _ => {}
        }
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        if to.port() == 3 {
            // Never writable: its buffer is full.
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            while (&ours).write(&[0; 4096]).is_ok() {}
            served.pending.truncate(KEPT - 1);
            served.pending.insert(0, theirs.into());
            return Ok(TcpStream::from(OwnedFd::from(ours)));
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        served.streams.truncate(KEPT - 1);
        served.streams.insert(0, theirs);
        Ok(TcpStream::from(OwnedFd::from(ours)))
    }

    fn datagrams(&mut self) -> io::Result<UdpSocket> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(UdpSocket::from(OwnedFd::from(socket)))
    }

    fn pings(&mut self) -> io::Result<UdpSocket> {
        self.datagrams()
    }
}

impl Harness {
    /// An engine of this network.
    ///
    /// # Errors
    ///
    /// When the kernel is out of descriptors.
    pub fn new(config: &UserNetConfig) -> Result<Harness, UserNetError> {
        let config = UserNetConfig {
            resolver: Resolver::Address(SocketAddrV4::new([192, 0, 2, 53].into(), 53)),
            ..config.clone()
        };
        let served = Arc::<Mutex<Served>>::default();
        let (ours, device) = sys::message_pair().map_err(|source| UserNetError::System {
            what: "making a pair of sockets",
            source,
        })?;
        let mut engine = Engine::new(&config, ours, Ports::default())?;
        engine.shared.outside = Box::new(Nowhere {
            served: Arc::clone(&served),
        });
        Ok(Harness {
            engine,
            device: File::from(device),
            served,
        })
    }

    /// Gives the engine a frame, with the virtio-net header before it, and lets it do a round, and another one for what
    /// became of that.
    ///
    /// # Errors
    ///
    /// When the engine has ended, or does not take it.
    pub fn send(&mut self, message: &[u8]) -> Result<(), UserNetError> {
        // Nothing is the end.
        if !message.is_empty() {
            let _ = (&self.device).write(message);
        }
        self.turn()?;
        self.turn()
    }

    /// Lets the engine do a round.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn turn(&mut self) -> Result<(), UserNetError> {
        self.engine.turn(false).map(drop)
    }

    /// What the engine has for the device, one frame with its header; None if there is nothing.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let mut message = vec![0; HEADER_LEN + ETHERNET_LEN + 65_536];
        let len = (&self.device).read(&mut message).ok()?;
        message.truncate(len);
        Some(message)
    }

    /// What the guest's driver takes.
    pub fn set_offloads(&mut self, checksum: bool, tso4: bool) {
        self.engine.shared.link.offloads().set(checksum, tso4);
    }

    /// Lets time pass.
    pub fn advance(&mut self, time: Duration) {
        self.engine.ahead += time;
    }

    /// Has a far end of a connection, the newest first, do something: read so many bytes, write so many, or with neither close.
    pub fn serve(&mut self, which: usize, read: usize, write: usize) {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = served.streams.get_mut(which) else {
            return;
        };
        if read == 0 && write == 0 {
            served.streams.remove(which);
            return;
        }
        // Whatever comes of it: the engine is what is looked at.
        let _ = stream.read(&mut vec![0; read]);
        let _ = stream.write(&vec![b'x'; write]);
    }

    /// Connections there are.
    pub fn connections(&self) -> usize {
        self.engine.guest.connections.len()
    }

    /// Flows of datagrams there are.
    pub fn flows(&self) -> usize {
        self.engine.guest.flows.len()
    }
}
