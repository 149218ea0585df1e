//! The person's terminal: raw while the guest has it, and as it was however we leave.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

static ORIGINAL: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Whether `fd` is a terminal.
#[allow(unsafe_code)]
pub fn is_terminal(fd: RawFd) -> bool {
    // SAFETY: isatty only looks at the descriptor.
    unsafe { libc::isatty(fd) == 1 }
}

/// Columns and rows of the terminal at standard output; zeros where there is none.
#[allow(unsafe_code)]
pub fn size() -> (u16, u16) {
    // SAFETY: an all-zero winsize is valid.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a winsize to the pointer, which is to one of ours, or fails.
    if unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) } != 0 {
        return (0, 0);
    }
    (size.ws_col, size.ws_row)
}

/// Restores the terminal when dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes standard input's terminal raw: no echo, no line editing, no signals from keys.
    /// Output processing and window size stay as they are.
    #[allow(unsafe_code)]
    pub fn enter() -> io::Result<Self> {
        // SAFETY: an all-zero termios is valid memory for tcgetattr to fill.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a termios of ours.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut settings) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let original = settings;
        // SAFETY: as above.
        unsafe { libc::cfmakeraw(&raw mut settings) };
        settings.c_oflag = original.c_oflag;
        // SAFETY: as above.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const settings) } != 0 {
            return Err(io::Error::last_os_error());
        }
        *ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(original);
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was found, if it was changed. For panic hooks too.
#[allow(unsafe_code)]
pub fn restore() {
    if let Some(original) = ORIGINAL
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
    {
        // SAFETY: the pointer is to a termios that tcgetattr filled.
        unsafe {
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const original);
        }
    }
}
