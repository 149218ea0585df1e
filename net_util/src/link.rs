//! Hears of interfaces that go up or down, come or go (rtnetlink(7), `RTNLGRP_LINK`).

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// RTMGRP_LINK of linux/rtnetlink.h.
const LINKS: u32 = 1;
/// Messages taken in a turn. Where more have come, the descriptor stays readable.
const TURN: usize = 64;

/// Tells that something about an interface of this network namespace has changed. What it is, [`Interface`](crate::Interface) says.
///
/// Its descriptor polls readable when there is something to tell.
///
/// ```no_run
/// use net_util::{Interface, LinkMonitor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let monitor = LinkMonitor::new()?;
/// let interface = Interface::new("vmtap0")?;
/// // Once its descriptor is readable:
/// if monitor.take_changes()? {
///     println!("there is a link: {}", interface.has_link()?);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct LinkMonitor(Socket);

impl LinkMonitor {
    /// Listens from now on. Needs no privilege.
    ///
    /// # Errors
    ///
    /// The kernel gives no socket.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, LINKS))?;
        Ok(Self(socket))
    }

    /// Whether anything has changed since the last call.
    ///
    /// # Errors
    ///
    /// The socket is broken.
    pub fn take_changes(&self) -> io::Result<bool> {
        let mut changed = false;
        for _ in 0..TURN {
            // What does not fit is lost, and not missed.
            let mut byte = [0; 1];
            match self.0.recv(&mut &mut byte[..], 0) {
                Ok(_) => changed = true,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // There were more than the kernel kept.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => changed = true,
                Err(e) => return Err(e),
            }
        }
        Ok(changed)
    }
}

impl AsRawFd for LinkMonitor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
