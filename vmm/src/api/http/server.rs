//! The thread `api`: one poll loop around the listener, the connections and the answers.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::connection::{Connection, Turn};
use super::{HttpRequest, Response};
use crate::api::call::{AnswerReceiver, CallSender};
use crate::api::{Failure, route};
use crate::event::EventSender;
use crate::poll::{poll, watch};
use crate::threads;

/// Most connections; when one more comes, an idle one has to go.
const MAX_CONNECTIONS: usize = 32;
/// How long the end waits for clients to take their last answers.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// The running server.
pub struct Server {
    thread: JoinHandle<Option<()>>,
    answers: AnswerReceiver,
}

impl Server {
    /// Serves `listener`; requests go to `calls`.
    ///
    /// # Errors
    /// A descriptor or thread that the host refuses.
    pub fn start(
        listener: UnixListener,
        calls: CallSender,
        events: EventSender,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let answers = AnswerReceiver::new()?;
        let state = Loop {
            listener,
            calls,
            answers: answers.share(),
            connections: Vec::new(),
            next: 0,
        };
        let thread = threads::spawn("api".into(), events, move || state.run())?;
        Ok(Self { thread, answers })
    }

    /// Sends the answers that wait, and ends. The caller has dropped the requests that it will not answer.
    pub fn finish(self) {
        self.answers.stop();
        if self.thread.join().is_err() {
            log::warn!("the API thread panicked");
        }
    }
}

struct Loop {
    listener: UnixListener,
    calls: CallSender,
    answers: AnswerReceiver,
    /// In the order in which they were last used.
    connections: Vec<(u64, Connection)>,
    next: u64,
}

impl Loop {
    fn run(mut self) {
        let mut end: Option<Instant> = None;
        loop {
            if end.is_none() && self.answers.stopped() {
                end = Some(Instant::now() + LAST_ANSWERS);
            }
            // The answers are all here by now: who waits for none has nothing to wait for.
            if end.is_some_and(|end| self.all_sent() || end <= Instant::now()) {
                return;
            }
            if let Err(e) = self.turn(end) {
                log::error!("the API ends here: {e}");
                return;
            }
        }
    }

    fn all_sent(&self) -> bool {
        self.answers.is_empty() && !self.connections.iter().any(|(_, c)| c.is_sending())
    }

    /// Waits for something to do and does it. `end` is when to return at the latest.
    fn turn(&mut self, end: Option<Instant>) -> io::Result<()> {
        let open = end.is_none()
            && (self.connections.len() < MAX_CONNECTIONS
                || self.connections.iter().any(|(_, c)| c.is_idle()));
        let listener = if open { self.listener.as_raw_fd() } else { -1 };
        let mut fds = vec![
            watch(self.answers.wake_fd().as_raw_fd(), libc::POLLIN),
            watch(listener, libc::POLLIN),
        ];
        let sockets = self.connections.iter();
        fds.extend(sockets.map(|(_, c)| watch(c.as_raw_fd(), c.interest())));
        let deadlines = self.connections.iter().filter_map(|(_, c)| c.deadline());
        poll(&mut fds, deadlines.chain(end).min())?;

        let events: Vec<i16> = fds.iter().map(|fd| fd.revents).collect();
        let now = Instant::now();
        let ready: Vec<(u64, i16)> = self
            .connections
            .iter()
            .zip(events.iter().skip(2))
            .filter(|((_, c), events)| **events != 0 || c.deadline().is_some_and(|d| d <= now))
            .map(|((id, _), events)| (*id, *events))
            .collect();
        for (id, events) in ready {
            if events == 0 {
                log::debug!("an API client was too slow");
                self.connections.retain(|(other, _)| *other != id);
            } else {
                self.with(id, |connection| connection.turn(events));
            }
        }
        if events.first().is_some_and(|e| *e != 0) {
            self.answers.clear();
            for (id, response) in self.answers.take() {
                self.with(id, |connection| connection.answer(&response));
            }
        }
        if events.get(1).is_some_and(|e| *e != 0) {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        let connection = match self.listener.accept() {
            Ok((stream, _)) => Connection::new(stream),
            Err(e) => Err(e),
        };
        match connection {
            Ok(connection) => {
                if self.connections.len() >= MAX_CONNECTIONS
                    && let Some(idle) = self.connections.iter().position(|(_, c)| c.is_idle())
                {
                    self.connections.remove(idle);
                }
                self.connections.push((self.next, connection));
                self.next += 1;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => log::debug!("accepting an API client: {e}"),
        }
    }

    /// Lets connection `id` do something, if it is still there, and sees to what comes of it.
    fn with(&mut self, id: u64, act: impl FnOnce(&mut Connection) -> Turn) {
        let Some(at) = self.connections.iter().position(|(other, _)| *other == id) else {
            return;
        };
        let (id, mut connection) = self.connections.remove(at);
        let mut turn = act(&mut connection);
        loop {
            turn = match turn {
                Turn::More => break,
                Turn::Close => return,
                Turn::Refuse(refused) => {
                    connection.answer(&Failure::new(refused.status, refused.why).response())
                }
                Turn::Answer(request) => match self.call(id, &request) {
                    None => break,
                    Some(response) => connection.answer(&response),
                },
            };
        }
        self.connections.push((id, connection));
    }

    /// Passes a request on, or answers it here where it cannot be.
    fn call(&self, id: u64, request: &HttpRequest) -> Option<Response> {
        log::debug!("API: {} {}", request.method, request.path);
        match route::route(request) {
            Ok(request) => {
                self.calls.send(request, self.answers.for_connection(id));
                None
            }
            Err(failure) => Some(failure.response()),
        }
    }
}
