//! The client's side of the API: one request, one answer. For `ch-remote` and for tests.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::route::ROOT;

/// Most bytes of an answer.
const MOST: u64 = 64 << 20;
const MAX_HEADERS: usize = 64;

/// Why a request did not succeed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("connecting to {path:?}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("talking to the VMM")]
    Io(#[source] io::Error),
    /// It is not an HTTP server.
    #[error("the answer is not HTTP")]
    NotHttp,
    /// The server refused, or failed.
    #[error("{}", chain.join(": "))]
    Server {
        /// HTTP's number.
        status: u16,
        /// Its error and the causes.
        chain: Vec<String>,
    },
}

/// Asks the server at `socket`: `command` is the path after `/api/v1/`. Gives the answer's body, which is JSON or empty.
///
/// # Errors
/// See [`ClientError`].
pub fn request(
    socket: &Path,
    method: &str,
    command: &str,
    body: Option<&[u8]>,
) -> Result<Vec<u8>, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        path: socket.into(),
        source,
    })?;
    let mut message = format!(
        "{method} {ROOT}{command} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: application/json\r\n"
    );
    if let Some(body) = body {
        message.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        ));
    }
    message.push_str("\r\n");
    let mut bytes = message.into_bytes();
    bytes.extend_from_slice(body.unwrap_or_default());
    // A server that refuses early stops reading; its answer says why.
    let sent = stream.write_all(&bytes);
    let mut answer = Vec::new();
    let read = stream.take(MOST).read_to_end(&mut answer);
    if answer.is_empty() {
        sent.and(read).map_err(ClientError::Io)?;
    }
    let (status, body) = parse(&answer).ok_or(ClientError::NotHttp)?;
    if (200..300).contains(&status) {
        return Ok(body.to_vec());
    }
    let chain = serde_json::from_slice(body)
        .unwrap_or_else(|_| vec![String::from_utf8_lossy(body).trim().to_owned()]);
    Err(ClientError::Server { status, chain })
}

/// Status and body of an answer that ended with its connection.
fn parse(answer: &[u8]) -> Option<(u16, &[u8])> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(body_at) = head.parse(answer).ok()? else {
        return None;
    };
    let length = head
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse().ok());
    let body = answer.get(body_at..)?;
    let body = match length {
        // Cut off.
        Some(length) => body.get(..length)?,
        None => body,
    };
    Some((head.code?, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let empty: &[u8] = b"";
        assert_eq!(
            parse(b"HTTP/1.1 204 No Content\r\n\r\n"),
            Some((204, empty))
        );
        assert_eq!(
            parse(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"),
            Some((200, &b"{}"[..]))
        );
        for broken in [
            "",
            "HTTP/1.1 200",
            "SSH-2.0-OpenSSH\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}",
        ] {
            assert_eq!(parse(broken.as_bytes()), None, "{broken}");
        }
    }
}
