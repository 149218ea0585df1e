//! `--api-socket`: where the API listens.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use option_parser::{OptionError, OptionText};
use thiserror::Error;

use crate::socket_file::SocketFile;

const OPTION: &str = "--api-socket";

/// Why there can be no API.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The option's text is wrong.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Neither path nor descriptor, or both.
    #[error("--api-socket: {0:?} is wrong; a path, path=PATH or fd=N is allowed")]
    Text(String),
    /// Somebody serves it.
    #[error("--api-socket: {0:?} is in use by another process")]
    InUse(PathBuf),
    /// A socket that nobody serves any more, or another file.
    #[error("--api-socket: {0:?} is there already; remove it if nobody needs it")]
    There(PathBuf),
    /// It cannot be made.
    #[error("--api-socket: making {path:?}")]
    Bind {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not a descriptor of a listening socket.
    #[error("--api-socket: descriptor {fd} is no listening UNIX socket")]
    Descriptor {
        /// The descriptor.
        fd: RawFd,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Where to listen.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ApiSocket {
    /// A socket to make.
    Path(PathBuf),
    /// A listening socket that was inherited.
    Descriptor(RawFd),
}

/// A listener, and the socket file that goes when it is dropped.
#[derive(Debug)]
pub struct Listening {
    /// Connections come here.
    pub listener: UnixListener,
    /// Removes the socket's file, if we made it.
    pub file: Option<SocketFile>,
}

impl ApiSocket {
    /// Reads `PATH`, `path=PATH` or `fd=N`.
    pub fn parse(text: &str) -> Result<Self, SocketError> {
        let wrong = || SocketError::Text(text.to_owned());
        let keys = ["path=", "fd="];
        if !keys.iter().any(|key| text.starts_with(key)) {
            return if text.is_empty() {
                Err(wrong())
            } else {
                Ok(Self::Path(text.into()))
            };
        }
        let text_of = OptionText::parse(OPTION, &["path", "fd"], text)?;
        match (text_of.text("path"), text_of.text("fd")) {
            (Some(path), None) => Ok(Self::Path(path.into())),
            (None, Some(fd)) => match fd.parse::<RawFd>() {
                Ok(fd) if fd > 2 => Ok(Self::Descriptor(fd)),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }

    /// Where this process listens if it is not told: a name that no other process has.
    #[must_use]
    pub fn default_path() -> PathBuf {
        // SAFETY: it only reads this process's user id.
        #[allow(unsafe_code)]
        let user = unsafe { libc::geteuid() };
        let directory = match user {
            0 => "/run".to_owned(),
            user => format!("/run/user/{user}"),
        };
        Path::new(&directory).join(format!("cloud-hypervisor.{}", std::process::id()))
    }

    /// Listens at [`default_path`](Self::default_path). A file there is of an earlier process with our number, and replaced.
    pub fn listen_at_default() -> Result<Listening, SocketError> {
        let path = Self::default_path();
        if fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_socket()) {
            // If this fails, so does what follows, and says why.
            let _ = fs::remove_file(&path);
        }
        Self::Path(path).listen()
    }

    /// Listens. The file of a new socket is for its owner alone if the umask says so.
    pub fn listen(&self) -> Result<Listening, SocketError> {
        match self {
            Self::Path(path) => bind(path),
            Self::Descriptor(fd) => Ok(Listening {
                listener: adopt(*fd)
                    .map_err(|source| SocketError::Descriptor { fd: *fd, source })?,
                file: None,
            }),
        }
    }
}

fn bind(path: &Path) -> Result<Listening, SocketError> {
    let error = |source| SocketError::Bind {
        path: path.into(),
        source,
    };
    let listener = UnixListener::bind(path).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse if UnixStream::connect(path).is_ok() => {
            SocketError::InUse(path.into())
        }
        io::ErrorKind::AddrInUse => SocketError::There(path.into()),
        _ => error(e),
    })?;
    let file = SocketFile::of(path).map_err(error)?;
    Ok(Listening {
        listener,
        file: Some(file),
    })
}

/// Takes over an inherited descriptor, if it is what it should be.
#[allow(unsafe_code)]
fn adopt(fd: RawFd) -> io::Result<UnixListener> {
    for (option, wanted) in [
        (libc::SO_DOMAIN, libc::AF_UNIX),
        (libc::SO_TYPE, libc::SOCK_STREAM),
        (libc::SO_ACCEPTCONN, 1),
    ] {
        let mut value: libc::c_int = 0;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: value and length are ours and have the size that the kernel is told.
        let result = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                option,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        if value != wanted {
            return Err(io::Error::from_raw_os_error(libc::ENOTSOCK));
        }
    }
    // SAFETY: the kernel sets a flag of a descriptor that exists, as the calls above showed.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the user gives us this descriptor, a listening socket that nothing else in this process has opened: what we open
    // ourselves comes later.
    Ok(unsafe { UnixListener::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        let path = |text: &str| ApiSocket::Path(text.into());
        assert_eq!(ApiSocket::parse("/run/a b").unwrap(), path("/run/a b"));
        assert_eq!(ApiSocket::parse("path=/run/x").unwrap(), path("/run/x"));
        assert_eq!(ApiSocket::parse("fd=7").unwrap(), ApiSocket::Descriptor(7));
        for wrong in [
            "",
            "fd=",
            "fd=x",
            "fd=1",
            "path=",
            "fd=3,path=/x",
            "path=/x,colour=red",
        ] {
            let error = ApiSocket::parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("--api-socket: "), "{error}");
        }
    }

    #[test]
    fn a_socket_is_removed_and_anothers_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = ApiSocket::Path(path.clone()).listen().unwrap();
        let error = ApiSocket::Path(path.clone()).listen().unwrap_err();
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        drop(first.listener);
        let error = ApiSocket::Path(path.clone()).listen().unwrap_err();
        assert!(matches!(error, SocketError::There(_)), "{error}");
        drop(first.file);
        assert!(!path.exists());

        let mine = ApiSocket::Path(path.clone()).listen().unwrap();
        fs::remove_file(&path).unwrap();
        let theirs = ApiSocket::Path(path.clone()).listen().unwrap();
        drop(mine);
        assert!(path.exists());
        drop(theirs);
        assert!(!path.exists());
    }

    #[test]
    fn only_listening_sockets_are_adopted() {
        use std::os::fd::AsRawFd;
        let (a, _b) = UnixStream::pair().unwrap();
        for fd in [a.as_raw_fd(), 999] {
            let error = ApiSocket::Descriptor(fd).listen().unwrap_err();
            assert!(matches!(error, SocketError::Descriptor { .. }), "{error}");
        }
    }
}
