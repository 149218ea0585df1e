//! A VMM at a pseudo-terminal, as a person has it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;

use super::Vmm;
use super::process::{Builder, Stream};

/// Both ends of a pseudo-terminal. The test keeps `terminal` open to look at its settings.
pub struct Pty {
    controller: File,
    terminal: File,
}

/// What of a terminal's settings a raw mode changes.
#[derive(Debug, Eq, PartialEq)]
pub struct Settings {
    input: u32,
    output: u32,
    control: u32,
    pub local: u32,
    window: (u16, u16),
}

impl Settings {
    /// Characters pass as they are typed: no echo, no lines, no signals.
    pub fn is_raw(&self) -> bool {
        self.local & (libc::ECHO | libc::ICANON | libc::ISIG) == 0
    }
}

impl Pty {
    /// A terminal of 132 by 43.
    pub fn new() -> Self {
        let window = libc::winsize {
            ws_row: 43,
            ws_col: 132,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let (mut controller, mut terminal) = (0, 0);
        // SAFETY: both descriptors and the window size are ours; no name and no settings are asked for.
        let result = unsafe {
            libc::openpty(
                &raw mut controller,
                &raw mut terminal,
                std::ptr::null_mut(),
                std::ptr::null(),
                &raw const window,
            )
        };
        assert_eq!(result, 0, "openpty: {}", io::Error::last_os_error());
        // SAFETY: both are new and owned by nobody else.
        unsafe {
            for fd in [controller, terminal] {
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
            Self {
                controller: File::from_raw_fd(controller),
                terminal: File::from_raw_fd(terminal),
            }
        }
    }

    /// The terminal's settings now.
    pub fn settings(&self) -> Settings {
        let fd = self.terminal.as_raw_fd();
        // SAFETY: both structures are plain numbers, valid as zeros, and filled by the calls.
        unsafe {
            let mut t: libc::termios = std::mem::zeroed();
            let mut w: libc::winsize = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(fd, &raw mut t), 0);
            assert_eq!(libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut w), 0);
            Settings {
                input: t.c_iflag,
                output: t.c_oflag,
                control: t.c_cflag,
                local: t.c_lflag,
                window: (w.ws_col, w.ws_row),
            }
        }
    }

    /// Closes the terminal's own end, so that what reads the other one comes to its end.
    pub fn close(self) {
        drop(self);
    }

    /// Starts a VMM whose controlling terminal this is.
    pub fn start(&self, builder: &Builder) -> Vmm {
        let end = || self.terminal.try_clone().expect("a descriptor");
        let mut command = builder.command();
        command.stdin(end()).stdout(end());
        // SAFETY: setsid and ioctl are async-signal-safe, and descriptor 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut vmm = builder.spawn(command);
        let controller = || self.controller.try_clone().expect("a descriptor");
        vmm.listen(controller(), Stream::Out);
        vmm.attach(controller());
        vmm
    }
}
