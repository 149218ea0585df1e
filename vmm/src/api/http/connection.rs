//! One client's connection: what came, what is to go, and until when.
//!
//! ```text
//! idle --bytes--> receiving --whole request--> waiting for the answer --> sending --> idle, or closed
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::parse::{HttpRequest, MAX_BODY, MAX_HEAD, Parsed, parse};
use super::{Refused, Response};

/// How long a client may take to send a request, or to take its answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Read at once, so that a client with much to say takes its turn with the others.
const TURN: usize = 16 << 10;
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Receiving,
    Waiting,
    Sending,
}

/// What a connection wants after a turn.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Turn {
    /// To go on.
    More,
    /// This request answered.
    Answer(HttpRequest),
    /// This refusal told, and then to end.
    Refuse(Refused),
    /// To end.
    Close,
}

pub(super) struct Connection {
    stream: UnixStream,
    stage: Stage,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    keep_alive: bool,
    continued: bool,
    deadline: Option<Instant>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            stage: Stage::Receiving,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            keep_alive: true,
            continued: false,
            deadline: None,
        })
    }

    /// What to poll for.
    pub(super) fn interest(&self) -> i16 {
        match self.stage {
            Stage::Receiving => libc::POLLIN,
            Stage::Waiting => 0,
            Stage::Sending => libc::POLLOUT,
        }
    }

    /// When it is too slow, if it could be.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Nothing of a request has come.
    pub(super) fn is_idle(&self) -> bool {
        self.stage == Stage::Receiving && self.input.is_empty()
    }

    /// An answer is on its way.
    pub(super) fn is_sending(&self) -> bool {
        self.stage == Stage::Sending
    }

    /// Does what can be done without waiting. `events` is what poll said.
    pub(super) fn turn(&mut self, events: i16) -> Turn {
        match self.stage {
            Stage::Receiving => self.receive(),
            Stage::Sending => self.send(),
            // The client is gone; its answer goes nowhere.
            Stage::Waiting if events & (libc::POLLHUP | libc::POLLERR) != 0 => Turn::Close,
            Stage::Waiting => Turn::More,
        }
    }

    fn receive(&mut self) -> Turn {
        let mut chunk = [0; TURN];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Turn::Close,
            Ok(n) => self
                .input
                .extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(e) if would_block(&e) => return Turn::More,
            Err(_) => return Turn::Close,
        }
        self.look()
    }

    /// Looks for a request in what has come.
    fn look(&mut self) -> Turn {
        debug_assert!(self.input.len() <= MAX_HEAD + MAX_BODY + 2 * TURN);
        if self.input.is_empty() {
            self.deadline = None;
            return Turn::More;
        }
        match parse(&self.input) {
            Ok(Parsed::Incomplete { wants_continue }) => {
                self.deadline
                    .get_or_insert_with(|| Instant::now() + PATIENCE);
                if wants_continue && !std::mem::replace(&mut self.continued, true) {
                    // 25 bytes into an empty socket; a client without room for them is too slow.
                    let _ = self.stream.write(CONTINUE);
                }
                Turn::More
            }
            Ok(Parsed::Complete { request, length }) => {
                self.input.drain(..length);
                self.keep_alive = request.keep_alive;
                self.continued = false;
                self.stage = Stage::Waiting;
                self.deadline = None;
                Turn::Answer(request)
            }
            Err(refused) => {
                self.keep_alive = false;
                self.stage = Stage::Waiting;
                Turn::Refuse(refused)
            }
        }
    }

    /// Begins to send the answer to the request that was last.
    pub(super) fn answer(&mut self, response: &Response) -> Turn {
        self.output = response.bytes(self.keep_alive);
        self.sent = 0;
        self.stage = Stage::Sending;
        self.deadline = Some(Instant::now() + PATIENCE);
        self.send()
    }

    fn send(&mut self) -> Turn {
        while let Some(left) = self.output.get(self.sent..).filter(|left| !left.is_empty()) {
            match self.stream.write(left) {
                Ok(n) => self.sent += n,
                Err(e) if would_block(&e) => return Turn::More,
                Err(_) => return Turn::Close,
            }
        }
        if !self.keep_alive {
            return Turn::Close;
        }
        self.output = Vec::new();
        self.stage = Stage::Receiving;
        self.deadline = None;
        self.look()
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
