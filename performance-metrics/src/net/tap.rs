//! A tap of our own, as a VMM has one, with one system call a packet.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use super::station::Station;
use super::{ETHERTYPE, HEADER, LONGEST};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

const NAME: &str = "bench0";

/// A tap with headers; it goes when this does.
pub struct Tap(File);

/// A request about the interface of this name.
pub fn ifreq(name: &str) -> libc::ifreq {
    // SAFETY: plain numbers.
    let mut wish: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = wish.ifr_name.len() - 1;
    for (to, from) in wish.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *to = from as libc::c_char;
    }
    wish
}

/// A header and a frame of `size` bytes; past 1514 bytes it is TCP over IPv4, to be cut into segments.
pub fn packet(size: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER + size];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(room) = packet.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    };
    // From one station to another, neither of which is the host.
    put(HEADER, &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    if size <= LONGEST {
        put(HEADER + 12, &ETHERTYPE.to_be_bytes());
        return packet;
    }
    // NEEDS_CSUM, TCPv4, 54 bytes of headers, segments of 1448, checksum at 34 + 16 (virtio 1.2 §5.1.6).
    put(0, &[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    let length = ((size - 14) as u16).to_be_bytes();
    put(HEADER + 12, &[8, 0, 0x45, 0, length[0], length[1]]);
    put(HEADER + 22, &[64, 6]);
    put(HEADER + 26, &[192, 168, 249, 2, 192, 168, 249, 3]);
    put(HEADER + 34, &[0x13, 0x89, 0x13, 0x89]);
    put(HEADER + 46, &[0x50, 0x10, 0xff, 0xff]);
    packet
}

impl Tap {
    /// Makes one and switches it on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("opening /dev/net/tun")?;
        let mut wish = ifreq(NAME);
        wish.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        let length = HEADER as i32;
        // SAFETY: both requests take what they are given: an ifreq, an int.
        let failed = unsafe {
            libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut wish) < 0
                || libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const length) < 0
        };
        if failed {
            return Err(io::Error::last_os_error()).context("making a tap");
        }
        Station::open(NAME)?.up()?;
        Ok(Self(file))
    }

    /// Its interface's name.
    pub fn name(&self) -> &'static str {
        NAME
    }

    /// Whether TCP segments over IPv4 come uncut (TUN_F_CSUM, TUN_F_TSO4).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take_segments(&self, whole: bool) -> Result<()> {
        let offloads: libc::c_ulong = if whole { 3 } else { 0 };
        // SAFETY: the request takes a number.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD as _, offloads) } < 0 {
            return Err(io::Error::last_os_error()).context("the offloads of a tap");
        }
        Ok(())
    }

    /// Sends a packet, by one system call.
    ///
    /// # Errors
    /// When the kernel doesn't take it.
    pub fn write(&self, packet: &[u8]) -> Result<()> {
        let written = (&self.0).write(packet).context("writing to a tap")?;
        anyhow::ensure!(written == packet.len(), "a tap takes a part of a packet");
        Ok(())
    }

    /// Takes a packet, by one system call; none when none waits.
    ///
    /// # Errors
    /// When the tap fails.
    pub fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match (&self.0).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e).context("reading from a tap"),
        }
    }

    /// Sends every frame of ours back until it is told to stop.
    ///
    /// # Errors
    /// When the tap fails.
    pub fn echo(&self, stop: &AtomicBool) -> Result<()> {
        let mut buffer = [0; 2048];
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        while !stop.load(Ordering::Relaxed) {
            // SAFETY: one pollfd of ours.
            unsafe { libc::poll(&raw mut poll, 1, 20) };
            while let Some(length) = self.read(&mut buffer)? {
                let packet = buffer.get_mut(..length).unwrap_or_default();
                let kind = packet.get(HEADER + 12..HEADER + 14);
                if kind == Some(&ETHERTYPE.to_be_bytes()) {
                    let (to, from) = packet[HEADER..].split_at_mut(6);
                    to.swap_with_slice(&mut from[..6]);
                    self.write(packet)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_as_long_as_they_say() {
        for size in [60, 1514, 65_000] {
            assert_eq!(packet(size).len(), HEADER + size);
        }
        let small = packet(60);
        assert_eq!(small[..HEADER], [0; HEADER]);
        assert_eq!(small[HEADER + 12..HEADER + 14], [0x88, 0xb5]);
        let large = packet(4014);
        assert_eq!(large[..2], [1, 1]);
        assert_eq!(large[HEADER + 16..HEADER + 18], 4000u16.to_be_bytes());
    }

    #[test]
    fn names_end() {
        let long = ifreq("an-interface-with-a-long-name");
        assert_eq!(long.ifr_name.last(), Some(&0));
    }
}
