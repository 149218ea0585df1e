//! From method, path and body to a [`Request`].

use serde::de::DeserializeOwned;

use super::http::{HttpRequest, Parsed, Status, parse};
use super::{Failure, Request, config};

/// What every path begins with.
pub(super) const ROOT: &str = "/api/v1/";

/// Reads the body of a request.
type Read = fn(&[u8]) -> Result<Request, Failure>;

/// An endpoint: its method, its path after [`ROOT`], and how its body is read.
pub(super) struct Route {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    read: Read,
}

/// One line an endpoint.
macro_rules! routes {
    ($($method:literal $path:literal => $read:expr;)*) => {
        &[$(Route { method: $method, path: $path, read: $read }),*]
    };
}

pub(super) const ROUTES: &[Route] = routes! {
    "GET" "vmm.ping" => |_| Ok(Request::Ping);
    "PUT" "vmm.shutdown" => |_| Ok(Request::VmmShutdown);
    "GET" "vm.info" => |_| Ok(Request::VmInfo);
    "GET" "vm.counters" => |_| Ok(Request::VmCounters);
    "PUT" "vm.create" => |body| Ok(Request::Create(Box::new(config::read(body)?)));
    "PUT" "vm.boot" => |_| Ok(Request::Boot);
    "PUT" "vm.delete" => |_| Ok(Request::Delete);
    "PUT" "vm.pause" => |_| Ok(Request::Pause);
    "PUT" "vm.resume" => |_| Ok(Request::Resume);
    "PUT" "vm.shutdown" => |_| Ok(Request::Shutdown);
    "PUT" "vm.reboot" => |_| Ok(Request::Reboot);
    "PUT" "vm.power-button" => |_| Ok(Request::PowerButton);
    "PUT" "vm.nmi" => |_| Ok(Request::Nmi);
    "PUT" "vm.resize" => |body| Ok(Request::Resize(json(body)?));
    "PUT" "vm.resize-disk" => |body| Ok(Request::ResizeDisk(json(body)?));
};

/// Endpoints of the surface that come later.
const NOT_BUILT: &[&str] = &[
    "vm.add-device",
    "vm.add-disk",
    "vm.add-fs",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.coredump",
    "vm.receive-migration",
    "vm.remove-device",
    "vm.resize-zone",
    "vm.restore",
    "vm.send-migration",
    "vm.snapshot",
];

/// What a client that has sent `bytes` asks for first, and how many of the bytes say so; none while they are only the beginning
/// of a request.
///
/// # Errors
/// They are no HTTP request, or not one that there is an answer to.
pub fn read_request(bytes: &[u8]) -> Result<Option<(Request, usize)>, Failure> {
    match parse(bytes) {
        Ok(Parsed::Incomplete { .. }) => Ok(None),
        Ok(Parsed::Complete { request, length }) => Ok(Some((route(&request)?, length))),
        Err(refused) => Err(Failure::new(refused.status, refused.why)),
    }
}

/// Finds out what `request` wants.
pub(super) fn route(request: &HttpRequest) -> Result<Request, Failure> {
    let unknown = || {
        Failure::new(
            Status::NotFound,
            format!("there is no {:?} here", request.path),
        )
    };
    let path = request.path.strip_prefix(ROOT).ok_or_else(unknown)?;
    if NOT_BUILT.contains(&path) {
        return Err(Failure::new(
            Status::NotFound,
            format!("{path} is not built yet in this version"),
        ));
    }
    let route = ROUTES
        .iter()
        .find(|route| route.path == path)
        .ok_or_else(unknown)?;
    if route.method != request.method {
        return Err(Failure::new(
            Status::BadRequest,
            format!("{path} takes {}, not {}", route.method, request.method),
        ));
    }
    (route.read)(&request.body)
}

/// Reads JSON.
pub(super) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|e| bad_json(&e))
}

pub(super) fn bad_json(error: &serde_json::Error) -> Failure {
    Failure::of(Status::BadRequest, "the body cannot be understood", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(method: &str, path: &str, body: &str) -> Result<Request, Failure> {
        route(&HttpRequest {
            method: method.into(),
            path: path.into(),
            body: body.into(),
            keep_alive: true,
        })
    }

    #[test]
    fn each_route_is_reached_by_its_method_alone() {
        for route in ROUTES {
            let path = format!("{ROOT}{}", route.path);
            let other = if route.method == "GET" { "PUT" } else { "GET" };
            for method in [other, "POST", "get", ""] {
                let failure = ask(method, &path, "{}").unwrap_err();
                assert_eq!(failure.status, Status::BadRequest, "{method} {path}");
                assert!(failure.chain[0].contains("takes"), "{failure:?}");
            }
            match ask(route.method, &path, "") {
                Ok(_) => {}
                Err(failure) => assert_eq!(failure.status, Status::BadRequest, "{path}"),
            }
        }
    }

    #[test]
    fn paths_that_are_not_here() {
        for path in [
            "",
            "/",
            "/api/v1",
            "/api/v1/",
            "/api/v2/vmm.ping",
            "/api/v1/vmm.ping/",
            "/api/v1/vm",
        ] {
            let failure = ask("GET", path, "").unwrap_err();
            assert_eq!(failure.status, Status::NotFound, "{path}");
        }
        for path in NOT_BUILT {
            let failure = ask("PUT", &format!("{ROOT}{path}"), "{}").unwrap_err();
            assert_eq!(failure.status, Status::NotFound);
            assert!(failure.chain[0].contains("not built yet"), "{failure:?}");
            assert!(!ROUTES.iter().any(|route| route.path == *path), "{path}");
        }
    }

    #[test]
    fn bodies() {
        let path = "/api/v1/vm.resize-disk";
        let Ok(Request::ResizeDisk(resize)) = ask("PUT", path, r#"{"id":"a","desired_size":4096}"#)
        else {
            panic!("refused");
        };
        assert_eq!((resize.id.as_str(), resize.desired_size), ("a", 4096));
        for body in [
            "",
            "{",
            "[]",
            r#"{"id":"a"}"#,
            r#"{"id":"a","desired_size":-1}"#,
        ] {
            let failure = ask("PUT", path, body).unwrap_err();
            assert_eq!(failure.status, Status::BadRequest, "{body}");
            assert_eq!(failure.chain.len(), 2, "{failure:?}");
        }
    }
}
