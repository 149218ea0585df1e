//! SIGTERM, SIGINT, SIGHUP and SIGWINCH as a descriptor: blocked in every thread, read by the control thread.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Taken {
    /// To end cleanly.
    End,
    /// To look at the size of the terminal.
    Resize,
}

/// The signals that the VMM acts on.
#[derive(Debug)]
pub struct Signals {
    file: File,
}

impl Signals {
    /// Blocks the signals in this thread, and so in all that it starts later. To be called before
    /// any other thread exists.
    #[allow(unsafe_code)]
    pub fn block() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before use; results are checked.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGWINCH] {
                libc::sigaddset(&raw mut set, signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// Takes a pending signal, if there is one.
    pub fn take(&self) -> Option<Taken> {
        let mut buffer = [0; size_of::<libc::signalfd_siginfo>()];
        (&self.file).read_exact(&mut buffer).ok()?;
        // ssi_signo comes first.
        let (number, _) = buffer.split_first_chunk()?;
        match i32::try_from(u32::from_ne_bytes(*number)) {
            Ok(libc::SIGWINCH) => Some(Taken::Resize),
            _ => Some(Taken::End),
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
