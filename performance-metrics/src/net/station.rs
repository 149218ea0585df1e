//! The host's end of a tap: a packet socket on the interface (packet(7)), in a network namespace of our own.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

use super::{ETHERTYPE, HEADER, LONGEST, tap};

/// Option of packet(7) that libc doesn't know: frames have a virtio-net header of 10 bytes.
const PACKET_VNET_HDR: libc::c_int = 15;

/// Proof that this thread is in a network namespace of its own.
#[derive(Clone, Copy, Debug)]
pub struct Isolated(());

/// Moves this thread, and what it starts, into a new network namespace, where nobody else sends anything.
///
/// # Errors
/// Without the right to do so.
pub fn isolate() -> Result<Isolated> {
    // SAFETY: it changes the namespace of this thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error())
            .context("a network namespace, which needs root (--filter leaves benchmarks out)");
    }
    // The host would send words of its own over a new interface. Where there is no IPv6, it cannot.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    Ok(Isolated(()))
}

/// Names of the interfaces in this thread's namespace.
///
/// # Errors
/// When the kernel doesn't tell.
pub fn interfaces() -> Result<Vec<String>> {
    let path = "/proc/thread-self/net/dev";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let name = |line: &str| Some(line.split_once(':')?.0.trim().to_owned());
    Ok(text.lines().filter_map(name).collect())
}

/// An interface, and a socket on it.
pub struct Station {
    name: String,
    socket: OwnedFd,
    index: i32,
}

impl Station {
    /// On the interface of this name.
    ///
    /// # Errors
    /// When there is none, or no right to it.
    pub fn open(name: &str) -> Result<Self> {
        let failed = || format!("a packet socket on {name}");
        // SAFETY: a new descriptor, or a failure.
        let socket = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(ETHERTYPE.to_be()));
            if fd < 0 {
                return Err(io::Error::last_os_error()).with_context(failed);
            }
            OwnedFd::from_raw_fd(fd)
        };
        let mut station = Self {
            name: name.to_owned(),
            socket,
            index: 0,
        };
        let index = station
            .ioctl(libc::SIOCGIFINDEX, |_| {})
            .with_context(failed)?;
        // SAFETY: the request has filled in the index.
        station.index = unsafe { index.ifr_ifru.ifru_ifindex };
        let (address, size) = station.address(ETHERTYPE);
        // SAFETY: the address is of the size that is told.
        let result = unsafe {
            libc::bind(
                station.socket.as_raw_fd(),
                (&raw const address).cast(),
                size,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).with_context(failed);
        }
        // Straight to the tap, past its queueing discipline, which drops what it cannot hold.
        station.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &1i32)?;
        let patience = libc::timeval {
            tv_sec: 2,
            tv_usec: 0,
        };
        station.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
        Ok(station)
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> Result<()> {
        // SAFETY: the value is of the size that is told.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("setting up a packet socket");
        }
        Ok(())
    }

    /// The interface, for frames of this type; and the structure's size.
    fn address(&self, ethertype: u16) -> (libc::sockaddr_ll, u32) {
        // SAFETY: plain numbers.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = self.index;
        (address, size_of::<libc::sockaddr_ll>() as u32)
    }

    fn ioctl(
        &self,
        request: libc::c_ulong,
        fill: impl FnOnce(&mut libc::ifreq),
    ) -> io::Result<libc::ifreq> {
        let mut wish = tap::ifreq(&self.name);
        fill(&mut wish);
        // SAFETY: each of the requests used here takes an ifreq.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), request as _, &raw mut wish) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(wish)
    }

    /// Switches the interface on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn up(&self) -> Result<()> {
        let fill = |wish: &mut libc::ifreq| {
            wish.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        };
        self.ioctl(libc::SIOCSIFFLAGS, fill)
            .with_context(|| format!("switching {} on", self.name))?;
        Ok(())
    }

    /// Lets the tap hold `count` packets that nobody has read yet.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn make_room(&self, count: u32) -> Result<()> {
        // ifr_qlen shares its place with ifr_ifindex.
        let fill = |wish: &mut libc::ifreq| wish.ifr_ifru.ifru_ifindex = count as i32 + 64;
        self.ioctl(libc::SIOCSIFTXQLEN, fill)
            .with_context(|| format!("the length of {}'s queue", self.name))?;
        Ok(())
    }

    /// Sends frames of `size` bytes to the other end; past 1514 bytes they are TCP segments that are not cut where the other end takes them
    /// so.
    ///
    /// # Errors
    /// When the kernel doesn't take them.
    pub fn send(&self, size: usize, count: u32) -> Result<()> {
        let mut packet = tap::packet(size);
        let segments = size > LONGEST;
        // From now on a header comes before a frame, or none.
        self.set(libc::SOL_PACKET, PACKET_VNET_HDR, &i32::from(segments))?;
        if segments {
            // It is without the number of buffers.
            packet.drain(HEADER - 2..HEADER);
        } else {
            packet.drain(..HEADER);
        }
        let frame = &*packet;
        // The kernel wants to know what it is to cut.
        let ethertype = if segments { 0x0800 } else { ETHERTYPE };
        let (address, address_size) = self.address(ethertype);
        for _ in 0..count {
            // SAFETY: frame and address are as long as is told.
            let sent = unsafe {
                libc::sendto(
                    self.socket.as_raw_fd(),
                    frame.as_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw const address).cast(),
                    address_size,
                )
            };
            if sent < 0 {
                return Err(io::Error::last_os_error())
                    .with_context(|| format!("sending over {}", self.name));
            }
        }
        Ok(())
    }

    /// Waits for a frame of ours.
    ///
    /// # Errors
    /// When none comes.
    pub fn receive(&self) -> Result<()> {
        let mut frame = [0u8; 2048];
        // SAFETY: the buffer is as long as is told.
        let got = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("waiting for a frame from {}", self.name));
        }
        Ok(())
    }

    /// How many packets came out of the interface so far.
    ///
    /// # Errors
    /// When the kernel doesn't tell.
    pub fn received(&self) -> Result<u64> {
        let path = "/proc/thread-self/net/dev";
        let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        // Name, bytes, packets; of those received first.
        let count = text.lines().find_map(|line| {
            let (name, counts) = line.split_once(':')?;
            (name.trim() == self.name).then(|| counts.split_whitespace().nth(1)?.parse().ok())?
        });
        count.with_context(|| format!("{} is gone", self.name))
    }
}
