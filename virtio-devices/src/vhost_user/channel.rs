//! The channel on which a back end speaks of its own accord ("Back-end communication"). Of what it can say, one thing is understood: that
//! its configuration changed.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// Request, flags, size of the payload: 4 bytes each, in the order of the host.
const HEADER: usize = 12;
/// Bits 0 and 1 of the flags: the version of the protocol.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Our end. It never waits.
pub(super) struct Channel {
    stream: UnixStream,
    /// What came of a message that is not complete.
    header: [u8; HEADER],
    filled: usize,
}

/// The back end said something else, or nothing more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Closed;

impl Channel {
    /// Our end, and that of the back end.
    pub fn new() -> std::io::Result<(Self, UnixStream)> {
        let (stream, theirs) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let channel = Self {
            stream,
            header: [0; HEADER],
            filled: 0,
        };
        Ok((channel, theirs))
    }

    /// Whether one more message came, that the configuration changed. Descriptors that come with it are closed by the kernel.
    pub fn changed(&mut self) -> Result<bool, Closed> {
        while let Some(room) = self.header.get_mut(self.filled..).filter(|r| !r.is_empty()) {
            match self.stream.read(room) {
                Ok(0) => return Err(Closed),
                Ok(count) => self.filled += count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(Closed),
            }
        }
        self.filled = 0;
        let [request, flags, size] = [0, 4, 8].map(|at| {
            let mut word = [0; 4];
            word.copy_from_slice(&self.header[at..at + 4]);
            u32::from_ne_bytes(word)
        });
        if request != CONFIG_CHANGE || size != 0 || flags & (REPLY | 3) != VERSION {
            return Err(Closed);
        }
        if flags & NEED_REPLY != 0 {
            let mut answer = Vec::with_capacity(HEADER + 8);
            for word in [CONFIG_CHANGE, VERSION | REPLY, 8] {
                answer.extend(word.to_ne_bytes());
            }
            answer.extend(0_u64.to_ne_bytes());
            // One that does not read its answers is not waited for.
            match self.stream.write(&answer) {
                Ok(count) if count == answer.len() => {}
                _ => return Err(Closed),
            }
        }
        Ok(true)
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, size: u32) -> Vec<u8> {
        [request, flags, size]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect()
    }

    #[test]
    fn changes_are_heard_and_answered() {
        let (mut channel, mut theirs) = Channel::new().unwrap();
        assert_eq!(channel.changed(), Ok(false));
        let plain = message(CONFIG_CHANGE, VERSION, 0);
        theirs.write_all(&plain[..5]).unwrap();
        assert_eq!(channel.changed(), Ok(false));
        theirs.write_all(&plain[5..]).unwrap();
        theirs
            .write_all(&message(CONFIG_CHANGE, VERSION | NEED_REPLY, 0))
            .unwrap();
        assert_eq!(channel.changed(), Ok(true));
        assert_eq!(channel.changed(), Ok(true));
        assert_eq!(channel.changed(), Ok(false));
        let mut answer = [0xff; 20];
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..12], message(CONFIG_CHANGE, VERSION | REPLY, 8));
        assert_eq!(answer[12..], [0; 8]);
        drop(theirs);
        assert_eq!(channel.changed(), Err(Closed));
    }

    #[test]
    fn whatever_else_it_says_ends_it() {
        for wrong in [
            message(1, VERSION, 0),
            message(CONFIG_CHANGE, VERSION, 1),
            message(CONFIG_CHANGE, VERSION, u32::MAX),
            message(CONFIG_CHANGE, VERSION | REPLY, 0),
            message(CONFIG_CHANGE, 0, 0),
            vec![0xff; 4096],
        ] {
            let (mut channel, mut theirs) = Channel::new().unwrap();
            theirs.write_all(&wrong).unwrap();
            assert_eq!(channel.changed(), Err(Closed));
        }
    }

    #[test]
    fn who_reads_no_answers_is_not_waited_for() {
        let (mut channel, mut theirs) = Channel::new().unwrap();
        let question = message(CONFIG_CHANGE, VERSION | NEED_REPLY, 0);
        let ended = (0..100_000).any(|_| {
            theirs.write_all(&question).unwrap();
            channel.changed() == Err(Closed)
        });
        assert!(ended);
    }
}
