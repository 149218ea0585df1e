//! poll(2), with an end in time.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

/// Waits for `events` of `fd`; poll skips negative descriptors.
pub(crate) fn watch(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits until one of `fds` is ready, or until `end`.
#[allow(unsafe_code)]
pub(crate) fn poll(fds: &mut [libc::pollfd], end: Option<Instant>) -> io::Result<()> {
    loop {
        let timeout = end.map_or(-1, |end| {
            let left = end.saturating_duration_since(Instant::now());
            // Rounded up, so as not to wake just before it.
            i32::try_from(left.as_millis()).map_or(i32::MAX, |ms| ms.saturating_add(1))
        });
        // SAFETY: the pointer and count are of one slice of pollfd.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if n >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
