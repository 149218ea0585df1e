//! HTTP/1.1 over a UNIX socket: as much of it as an API for one machine needs (RFC 9110, RFC 9112).
//!
//! One thread serves all connections and never waits for one of them: a client that is slow, silent or hostile takes nothing from
//! the others, and from the VM nothing at all.

mod connection;
mod parse;
mod server;

pub use parse::{HttpRequest, Parsed, parse};
pub use server::Server;

/// Status codes that are given (RFC 9110 §15).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// 200: done, and there is something to read.
    Ok,
    /// 204: done.
    NoContent,
    /// 400: the request cannot be.
    BadRequest,
    /// 404: no such path, or no VM.
    NotFound,
    /// 405: not in this state of the VM.
    WrongState,
    /// 500: it failed.
    Failed,
}

impl Status {
    /// Number and words.
    #[must_use]
    pub fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::NoContent => "204 No Content",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::WrongState => "405 Method Not Allowed",
            Self::Failed => "500 Internal Server Error",
        }
    }
}

/// A request that is no request, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refused {
    /// For the status line.
    pub status: Status,
    /// For the person.
    pub why: String,
}

impl Refused {
    fn new(status: Status, why: impl Into<String>) -> Self {
        Self {
            status,
            why: why.into(),
        }
    }
}

/// An answer: a status, and JSON or nothing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Response {
    /// For the status line.
    pub status: Status,
    /// JSON; empty for none.
    pub body: Vec<u8>,
}

impl Response {
    fn bytes(&self, keep_alive: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {}\r\nServer: cloud-hypervisor\r\nConnection: {connection}\r\n",
            self.status.line()
        );
        // A 204 has no length (RFC 9110 §8.6).
        if self.status != Status::NoContent {
            head.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                self.body.len()
            ));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if self.status != Status::NoContent {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}
