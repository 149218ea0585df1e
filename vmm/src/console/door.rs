//! Where a client comes to a console: a UNIX socket, or a pseudo-terminal.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::poll::{poll, watch};
use crate::socket_file::SocketFile;

/// A client's bytes, both ways, never blocking.
pub enum Client {
    /// Who connected to the socket.
    Stream(UnixStream),
    /// Whoever has the pseudo-terminal open.
    Terminal(File),
}

impl Client {
    /// What the client sent. 0 when it is gone.
    pub fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.read(bytes),
            Self::Terminal(master) => match master.read(bytes) {
                // Nobody has the other side open any more.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(0),
                read => read,
            },
        }
    }

    /// Sends the client as much as it takes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::Terminal(master) => master.write(bytes),
        }
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Stream(stream) => stream.as_raw_fd(),
            Self::Terminal(master) => master.as_raw_fd(),
        }
    }
}

/// What happened at a door.
pub enum Visit {
    /// Nothing new.
    Nothing,
    /// Somebody came. Who was there before has gone.
    Came(Client),
    /// Who was there has gone.
    Left,
}

/// Lets clients in, one at a time.
pub enum Door {
    /// At a path, which is gone when this is dropped.
    Socket {
        /// Where clients connect.
        listener: UnixListener,
        /// Its place in the file system.
        file: SocketFile,
    },
    /// A pseudo-terminal.
    Terminal {
        /// Our side.
        master: File,
        /// Hears of those who open the other side, and of those who close it.
        watcher: File,
        /// How many have it open.
        openers: u32,
        /// The other side.
        path: PathBuf,
    },
}

impl Door {
    /// A socket at `path`.
    ///
    /// # Errors
    /// What the kernel says, as when there is something at `path`.
    pub fn socket(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Socket {
            listener,
            file: SocketFile::of(path)?,
        })
    }

    /// A new pseudo-terminal in raw mode (pty(7)).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn terminal() -> io::Result<Self> {
        let master = open_master()?;
        let path = other_side(&master)?;
        // Opened and closed once, it says of itself that nobody has it open.
        let other = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&path)?;
        make_raw(&other)?;
        drop(other);
        Ok(Self::Terminal {
            watcher: watch_openers(&path)?,
            openers: 0,
            master,
            path,
        })
    }

    /// Where clients find it.
    pub fn path(&self) -> &Path {
        match self {
            Self::Socket { file, .. } => file.path(),
            Self::Terminal { path, .. } => path,
        }
    }

    /// Sees who comes and goes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn look(&mut self) -> io::Result<Visit> {
        match self {
            Self::Socket { listener, .. } => match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    Ok(Visit::Came(Client::Stream(stream)))
                }
                Err(e) if nothing_now(&e) => Ok(Visit::Nothing),
                Err(e) => Err(e),
            },
            Self::Terminal {
                master,
                watcher,
                openers,
                ..
            } => {
                let (mut came, before) = (false, *openers);
                let mut events = [0; 64 * EVENT_LEN];
                loop {
                    let count = match watcher.read(&mut events) {
                        Ok(count) => count,
                        Err(e) if nothing_now(&e) => break,
                        Err(e) => return Err(e),
                    };
                    for mask in events.get(..count).unwrap_or_default().chunks(EVENT_LEN) {
                        if is_open(mask) {
                            came |= *openers == 0;
                            *openers += 1;
                        } else {
                            *openers = openers.saturating_sub(1);
                        }
                    }
                }
                // Equal events that follow each other are told as one, and an open may be told later: the number can be wrong, the
                // terminal is not.
                if !is_open_somewhere(master)? {
                    *openers = 0;
                } else if *openers == 0 {
                    *openers = 1;
                    came = true;
                }
                Ok(match *openers {
                    0 if before > 0 => Visit::Left,
                    0 => Visit::Nothing,
                    _ if came => Visit::Came(Client::Terminal(master.try_clone()?)),
                    _ => Visit::Nothing,
                })
            }
        }
    }

    /// Whether it is to be looked at while there is a client, too.
    pub fn tells_of_ends(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }
}

impl AsRawFd for Door {
    /// Readable when there is something to look at.
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Socket { listener, .. } => listener.as_raw_fd(),
            Self::Terminal { watcher, .. } => watcher.as_raw_fd(),
        }
    }
}

/// Nothing can be moved at the moment, which is no failure.
pub fn nothing_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn open_master() -> io::Result<File> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: no pointers are passed; the descriptor is new and has no other owner.
    let master = unsafe { File::from_raw_fd(checked(libc::posix_openpt(flags))?) };
    // SAFETY: the descriptor is a master.
    checked(unsafe { libc::grantpt(master.as_raw_fd()) })?;
    // SAFETY: as above.
    checked(unsafe { libc::unlockpt(master.as_raw_fd()) })?;
    Ok(master)
}

fn other_side(master: &File) -> io::Result<PathBuf> {
    let mut name = [0u8; 64];
    // SAFETY: the buffer is as long as told.
    let error =
        unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), name.len()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
    Ok(Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())).to_owned())
}

/// Bytes pass as they are.
fn make_raw(terminal: &File) -> io::Result<()> {
    // SAFETY: all zeroes is a termios, which the kernel fills in and cfmakeraw changes.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        checked(libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode))?;
        libc::cfmakeraw(&raw mut mode);
        checked(libc::tcsetattr(
            terminal.as_raw_fd(),
            libc::TCSANOW,
            &raw const mode,
        ))?;
    }
    Ok(())
}

/// Somebody has the other side of `master` open.
fn is_open_somewhere(master: &File) -> io::Result<bool> {
    let mut fds = [watch(master.as_raw_fd(), libc::POLLIN)];
    poll(&mut fds, Some(Instant::now()))?;
    Ok(fds.iter().all(|fd| fd.revents & libc::POLLHUP == 0))
}

/// Bytes of a `struct inotify_event` that names no file.
const EVENT_LEN: usize = 16;

/// An event of [`watch_openers`] tells of an open, not of a close. Events that were lost because nobody looked count as closes.
fn is_open(event: &[u8]) -> bool {
    let mask = event.get(4..8).and_then(|bytes| bytes.try_into().ok());
    mask.map_or(0, u32::from_ne_bytes) & libc::IN_OPEN != 0
}

/// Readable when somebody opens or closes `path` (inotify(7)).
fn watch_openers(path: &Path) -> io::Result<File> {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // SAFETY: no pointers are passed; the descriptor is new and has no other owner.
    let watcher = unsafe {
        OwnedFd::from_raw_fd(checked(libc::inotify_init1(
            libc::IN_NONBLOCK | libc::IN_CLOEXEC,
        ))?)
    };
    let wanted = libc::IN_OPEN | libc::IN_CLOSE;
    // SAFETY: the name is a string that ends.
    checked(unsafe { libc::inotify_add_watch(watcher.as_raw_fd(), name.as_ptr(), wanted) })?;
    Ok(File::from(watcher))
}
