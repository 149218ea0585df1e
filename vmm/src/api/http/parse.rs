//! One request out of what a connection sent so far (RFC 9112), within limits that are known in advance.

use super::{Refused, Status};

/// Most bytes of request line and headers.
pub const MAX_HEAD: usize = 8 << 10;
/// Most bytes of a body: a configuration with a command line of 64 KiB and some hundred devices.
pub const MAX_BODY: usize = 1 << 20;
const MAX_HEADERS: usize = 64;

/// A whole request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HttpRequest {
    /// `GET`, `PUT` and so on.
    pub method: String,
    /// Its target, up to a `?`.
    pub path: String,
    /// Its body; empty where there is none.
    pub body: Vec<u8>,
    /// The client wants to send another one after it.
    pub keep_alive: bool,
}

/// What a buffer holds.
#[derive(Debug, Eq, PartialEq)]
pub enum Parsed {
    /// The beginning of a request.
    Incomplete {
        /// The client waits to hear that it may send the body.
        wants_continue: bool,
    },
    /// A request.
    Complete {
        /// The request.
        request: HttpRequest,
        /// Its bytes in the buffer.
        length: usize,
    },
}

/// Looks for a request at the start of `buffer`.
///
/// # Errors
/// What can be no request, or a larger one than allowed. Nothing that follows it can be understood.
pub fn parse(buffer: &[u8]) -> Result<Parsed, Refused> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let refuse = |why: String| Refused::new(Status::BadRequest, why);
    let status = head
        .parse(buffer.get(..MAX_HEAD).unwrap_or(buffer))
        .map_err(|e| refuse(format!("this is no HTTP request: {e}")))?;
    let httparse::Status::Complete(body_at) = status else {
        if buffer.len() >= MAX_HEAD {
            return Err(refuse(format!(
                "the request's line and headers are longer than {MAX_HEAD} bytes"
            )));
        }
        return Ok(Parsed::Incomplete {
            wants_continue: false,
        });
    };
    let framing = Framing::read(&head)?;
    let length = body_at + framing.body;
    let Some(body) = buffer.get(body_at..length) else {
        return Ok(Parsed::Incomplete {
            wants_continue: framing.wants_continue && buffer.len() == body_at,
        });
    };
    let target = head.path.unwrap_or_default();
    Ok(Parsed::Complete {
        request: HttpRequest {
            method: head.method.unwrap_or_default().to_owned(),
            path: target.split('?').next().unwrap_or_default().to_owned(),
            body: body.to_vec(),
            keep_alive: framing.keep_alive,
        },
        length,
    })
}

/// What the headers say of the message around the request.
struct Framing {
    body: usize,
    keep_alive: bool,
    wants_continue: bool,
}

impl Framing {
    fn read(head: &httparse::Request<'_, '_>) -> Result<Self, Refused> {
        let refuse = |why: String| Err(Refused::new(Status::BadRequest, why));
        let mut length = None;
        let mut this = Self {
            body: 0,
            keep_alive: head.version == Some(1),
            wants_continue: false,
        };
        for header in head.headers.iter() {
            let value = String::from_utf8_lossy(header.value);
            let value = value.trim();
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                // Two that differ are a way to smuggle requests (RFC 9112 §6.3).
                let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
                match value.parse::<usize>() {
                    Ok(n) if digits && length.is_none_or(|known| known == n) => length = Some(n),
                    _ => return refuse(format!("Content-Length: {value:?} cannot be")),
                }
            } else if is("transfer-encoding") {
                return refuse(format!(
                    "Transfer-Encoding: {value} is not understood; send a Content-Length"
                ));
            } else if is("expect") {
                this.wants_continue = value.eq_ignore_ascii_case("100-continue");
            } else if is("connection") {
                for word in value.split(',').map(str::trim) {
                    if word.eq_ignore_ascii_case("close") {
                        this.keep_alive = false;
                    } else if word.eq_ignore_ascii_case("keep-alive") {
                        this.keep_alive = true;
                    }
                }
            }
        }
        this.body = length.unwrap_or(0);
        if this.body > MAX_BODY {
            return refuse(format!(
                "a body of {} bytes is more than {MAX_BODY}",
                this.body
            ));
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(text: &str) -> (HttpRequest, usize) {
        match parse(text.as_bytes()) {
            Ok(Parsed::Complete { request, length }) => (request, length),
            other => panic!("{text:?}: {other:?}"),
        }
    }

    fn refused(text: &[u8]) -> String {
        parse(text).expect_err("refused").why
    }

    #[test]
    fn a_request_and_the_start_of_another() {
        let text =
            "PUT /api/v1/vm.resize?x=1 HTTP/1.1\r\nHost: x\r\nCONTENT-LENGTH: 2\r\n\r\n{}GET /";
        let (request, length) = complete(text);
        assert_eq!(request.method, "PUT");
        assert_eq!(request.path, "/api/v1/vm.resize");
        assert_eq!(request.body, b"{}");
        assert!(request.keep_alive);
        assert_eq!(&text[length..], "GET /");
    }

    #[test]
    fn every_cut_of_a_request_is_incomplete() {
        let text = b"PUT /a HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody";
        for cut in 0..text.len() {
            assert!(
                matches!(parse(&text[..cut]), Ok(Parsed::Incomplete { .. })),
                "{cut}"
            );
        }
        assert_eq!(complete(std::str::from_utf8(text).unwrap()).1, text.len());
    }

    #[test]
    fn who_keeps_the_connection() {
        for (head, keep) in [
            ("GET / HTTP/1.1\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: Close\r\n", false),
            ("GET / HTTP/1.0\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: x, Keep-Alive\r\n", true),
        ] {
            assert_eq!(
                complete(&format!("{head}\r\n")).0.keep_alive,
                keep,
                "{head}"
            );
        }
    }

    #[test]
    fn a_client_may_wait_for_a_continue() {
        let head = "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        let waits = |text: &str| parse(text.as_bytes()).unwrap();
        let incomplete = |wants_continue| Parsed::Incomplete { wants_continue };
        assert_eq!(waits(head), incomplete(true));
        assert_eq!(waits(&format!("{head}a")), incomplete(false));
    }

    #[test]
    fn hostile_framing_is_refused() {
        for (headers, word) in [
            ("Content-Length: -1", "Content-Length"),
            ("Content-Length: +1", "Content-Length"),
            ("Content-Length: ", "Content-Length"),
            ("Content-Length: 99999999999999999999", "Content-Length"),
            ("Content-Length: 1\r\nContent-Length: 2", "Content-Length"),
            ("Content-Length: 1048577", "more than 1048576"),
            ("Transfer-Encoding: chunked", "Transfer-Encoding"),
            ("no colon", "no HTTP request"),
        ] {
            let why = refused(format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\n").as_bytes());
            assert!(why.contains(word), "{headers}: {why}");
        }
        refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
        refused(b"GET / HTTP/3.0\r\n\r\n");
        refused("GET / HTTP/1.1\r\n".repeat(9).as_bytes());
        refused(format!("GET / HTTP/1.1\r\n{}", "A: b\r\n".repeat(65)).as_bytes());
    }

    #[test]
    fn a_head_without_end_is_refused_at_its_limit() {
        let long = format!("GET /{}", "a".repeat(MAX_HEAD));
        assert!(matches!(
            parse(&long.as_bytes()[..MAX_HEAD - 1]),
            Ok(Parsed::Incomplete { .. })
        ));
        assert!(refused(long.as_bytes()).contains("longer than 8192"));
    }
}
