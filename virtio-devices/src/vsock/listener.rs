//! The host's side of the sockets: a listening UNIX socket for programs of the host, and connections to theirs.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::unix::connect;

/// Most bytes of the path of a UNIX socket of Linux, without the 0 at its end.
const MOST_PATH: usize = 107;
/// Bytes that follow a listener's path in those of the host's ports: `_4294967295`.
const PORT_SUFFIX: usize = 11;

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The path is too long.
    #[error("the path of socket {path:?} is too long; up to {} bytes are allowed", MOST_PATH - PORT_SUFFIX)]
    TooLong {
        /// Path of the listener.
        path: PathBuf,
    },
    /// Something is there already.
    #[error("{path:?} exists; remove it if nothing uses it, or name another path")]
    Exists {
        /// Path of the listener.
        path: PathBuf,
    },
    /// The socket cannot be there.
    #[error("making socket {path:?}")]
    Bind {
        /// Path of the listener.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The guest cannot have this context id.
    #[error("context id {0} is wrong; 3 to 4294967294 are allowed")]
    Cid(u64),
}

/// A listening socket at a path, and the place of the host's own listeners beside it. Clones are the same one; the socket's file goes
/// with the last of them.
///
/// A program of the host connects to it, writes `CONNECT port` and a line feed, and reads `OK hostport` and a line feed once the guest
/// has taken the connection. A guest that connects to port P of the host gets the listener at the path with `_P` appended.
#[derive(Clone, Debug)]
pub struct VsockListener(Arc<Bound>);

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of the socket's file.
    file: Option<(u64, u64)>,
}

impl VsockListener {
    /// Listens at `path`, where nothing may be.
    ///
    /// # Errors
    /// [`VsockError::TooLong`], [`VsockError::Exists`] and [`VsockError::Bind`].
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let owned = || path.to_owned();
        if path.as_os_str().len() > MOST_PATH - PORT_SUFFIX {
            return Err(VsockError::TooLong { path: owned() });
        }
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => VsockError::Exists { path: owned() },
            _ => VsockError::Bind {
                path: owned(),
                source,
            },
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        let bound = Bound {
            path: owned(),
            listener,
            file: identity(path),
        };
        bound.listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self(Arc::new(bound)))
    }

    /// The next connection of a program of the host.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.0.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connects to the host's port `port`, without waiting: a listener whose backlog is full refuses.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.0.path);
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

impl AsRawFd for VsockListener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.listener.as_raw_fd()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // What somebody else put there since is theirs.
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = VsockListener::bind(&path).unwrap();
        let other = listener.clone();
        let again = VsockListener::bind(&path).unwrap_err().to_string();
        assert!(again.contains("exists; remove it"), "{again}");
        drop(listener);
        UnixStream::connect(&path).unwrap();
        drop(other);
        assert!(!path.exists());
        // A socket that nobody listens at is the user's to remove.
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(
            VsockListener::bind(&path),
            Err(VsockError::Exists { .. })
        ));
    }

    #[test]
    fn what_others_put_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = VsockListener::bind(&path).unwrap();
        // While it is there, so that the new file cannot get the old one's number.
        fs::rename(&path, dir.path().join("away")).unwrap();
        fs::write(&path, b"mine").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn paths_that_cannot_be() {
        let long = VsockListener::bind(Path::new(&"x".repeat(97))).unwrap_err();
        assert!(long.to_string().contains("up to 96 bytes"), "{long}");
        let missing = VsockListener::bind(Path::new("/no/such/socket")).unwrap_err();
        assert_eq!(missing.to_string(), r#"making socket "/no/such/socket""#);
    }

    #[test]
    fn a_listener_that_takes_nobody_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = VsockListener::bind(&path).unwrap();
        let missing = listener.connect(7).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let host = UnixListener::bind(dir.path().join("s_7")).unwrap();
        // SAFETY: it is open; the backlog becomes the least there is.
        assert_eq!(unsafe { libc::listen(host.as_raw_fd(), 0) }, 0);
        let _first = listener.connect(7).unwrap();
        let refused = (0..8).find_map(|_| listener.connect(7).err()).unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
