//! Host's ends that a test holds the other end of.
#![allow(unsafe_code)]

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use net_util::{MAX_PACKET_LEN, Offloads, VNET_HEADER_LEN};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::PacketQueue;

/// What a device told its end.
#[derive(Debug, Default)]
pub struct Told {
    pub offloads: Vec<Offloads>,
    pub attached: Vec<bool>,
    /// Refuses what it is told next.
    pub refuse: bool,
}

/// An end, as a device has it.
struct End {
    fd: OwnedFd,
    batches: bool,
    told: Arc<Mutex<Told>>,
}

/// The other end: packets are the messages of a socket.
pub struct Wire {
    ours: OwnedFd,
    /// To give away.
    theirs: OwnedFd,
    pub told: Arc<Mutex<Told>>,
}

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Wire {
    pub fn new() -> Self {
        let mut fds = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: the kernel writes two descriptors to the array, which are nobody else's.
        let [ours, theirs] = unsafe {
            let made = libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr());
            assert_eq!(made, 0, "{}", io::Error::last_os_error());
            fds.map(|fd| OwnedFd::from_raw_fd(fd))
        };
        Self {
            ours,
            theirs,
            told: Arc::default(),
        }
    }

    /// The end for a device. Several devices may have it, one after the other.
    pub fn end(&self) -> Box<dyn PacketQueue> {
        self.end_with(false)
    }

    /// One to which packets may go in batches.
    pub fn batch_end(&self) -> Box<dyn PacketQueue> {
        self.end_with(true)
    }

    fn end_with(&self, batches: bool) -> Box<dyn PacketQueue> {
        Box::new(End {
            fd: self.theirs.try_clone().unwrap(),
            batches,
            told: self.told.clone(),
        })
    }

    /// Sends the device a packet.
    pub fn send(&self, packet: &[u8]) {
        // SAFETY: the kernel reads the slice.
        let sent =
            unsafe { libc::write(self.ours.as_raw_fd(), packet.as_ptr().cast(), packet.len()) };
        assert_eq!(checked(sent).unwrap(), packet.len());
    }

    /// What the device sent, if there is something.
    pub fn try_receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; MAX_PACKET_LEN];
        // SAFETY: the kernel writes to the vector no more than it has.
        let len = unsafe {
            libc::read(
                self.ours.as_raw_fd(),
                packet.as_mut_ptr().cast(),
                packet.len(),
            )
        };
        match checked(len) {
            Ok(len) => {
                packet.truncate(len);
                Some(packet)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// What the device sends.
    pub fn receive(&self) -> Vec<u8> {
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            wait(&self.ours, libc::POLLIN);
        }
    }

    /// Waits until the device has taken all packets.
    pub fn wait_taken(&self) {
        let mut left: libc::c_int = 1;
        while left > 0 {
            std::thread::yield_now();
            // SAFETY: SIOCOUTQ writes one int.
            let asked =
                unsafe { libc::ioctl(self.ours.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
            assert_eq!(asked, 0, "{}", io::Error::last_os_error());
        }
    }
}

/// Waits for `events` of a descriptor.
pub fn wait(fd: &impl AsRawFd, events: i16) {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry is told, and there is one.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 60_000) };
    assert!(ready > 0, "waited in vain");
}

impl AsRawFd for End {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl End {
    fn tell(&self, tell: impl FnOnce(&mut Told)) -> io::Result<()> {
        let mut told = self.told.lock().unwrap();
        if std::mem::take(&mut told.refuse) {
            return Err(ErrorKind::Unsupported.into());
        }
        tell(&mut told);
        Ok(())
    }
}

impl PacketQueue for End {
    unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let count = i32::try_from(pieces.len()).unwrap();
        // SAFETY: the pieces are good by the caller's word.
        checked(unsafe { libc::readv(self.as_raw_fd(), pieces.as_ptr(), count) })
    }

    unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let count = i32::try_from(pieces.len()).unwrap();
        // SAFETY: the pieces are good by the caller's word.
        checked(unsafe { libc::writev(self.as_raw_fd(), pieces.as_ptr(), count) })
    }

    fn takes_batches(&self) -> bool {
        self.batches
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.tell(|told| told.offloads.push(offloads))
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.tell(|told| told.attached.push(attached))
    }
}

/// Bytes of an [`Endless`] end's packets.
pub const ENDLESS_LEN: usize = 48;

/// An end whose packets have no end: each is [`ENDLESS_LEN`] bytes of its number after the header.
pub struct Endless {
    ready: EventFd,
    next: AtomicU32,
}

impl Endless {
    pub fn new() -> Self {
        let ready = EventFd::new(EFD_NONBLOCK).unwrap();
        ready.write(1).unwrap();
        Self {
            ready,
            next: AtomicU32::new(0),
        }
    }
}

impl AsRawFd for Endless {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

impl PacketQueue for Endless {
    unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let number = self.next.fetch_add(1, Ordering::Relaxed) as u8;
        let packet = [&[0xee; VNET_HEADER_LEN][..], &[number; ENDLESS_LEN]].concat();
        let mut left = &packet[..];
        for piece in pieces {
            let (now, later) = left.split_at(piece.iov_len.min(left.len()));
            // SAFETY: the piece has room for as many bytes, by the caller's word.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len());
            }
            left = later;
        }
        Ok(packet.len())
    }

    unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        Ok(pieces.iter().map(|piece| piece.iov_len).sum())
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}
