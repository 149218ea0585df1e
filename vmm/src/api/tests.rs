//! The server, driven by clients of all kinds; the test is the control thread. And the OpenAPI document, held against both.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::client::{self, ClientError};
use super::{
    Answer, ApiSocket, Call, CallReceiver, Failure, Request, Server, SocketFile, Status,
    call_channel,
};
use crate::event::{EventReceiver, event_channel};
use crate::poll::{poll, watch};

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";

struct Rig {
    path: PathBuf,
    server: Server,
    calls: CallReceiver,
    events: EventReceiver,
    _file: Option<SocketFile>,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let listening = ApiSocket::Path(path.clone()).listen().unwrap();
        let (sender, events) = event_channel().unwrap();
        let (to_control, calls) = call_channel(&sender).unwrap();
        Self {
            server: Server::start(listening.listener, to_control, sender).unwrap(),
            path,
            calls,
            events,
            _file: listening.file,
            _directory: directory,
        }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Waits for the next request.
    fn call(&self) -> Call {
        loop {
            if let Some(call) = self.calls.try_next() {
                return call;
            }
            poll(
                &mut [watch(self.events.wake_fd().as_raw_fd(), libc::POLLIN)],
                None,
            )
            .unwrap();
            let _ = self.events.wake_fd().read();
        }
    }

    /// Answers the next request.
    fn answer(&self, text: &str) {
        let (_, reply) = self.call().split();
        reply.send(Ok(Answer::Json(text.as_bytes().to_vec())));
    }

    /// A client of good manners is served.
    fn works(&self) {
        let mut client = self.connect();
        client.write_all(PING).unwrap();
        self.answer("[1]");
        assert_eq!(read_answer(&mut client), (200, "[1]".into()));
    }
}

/// Reads one answer and no more.
fn read_answer(stream: &mut UnixStream) -> (u16, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

fn at_end(stream: &mut UnixStream) -> bool {
    // Closed with something unread, it is a reset, and an end all the same.
    stream.read(&mut [0]).map_or(true, |n| n == 0)
}

#[test]
fn several_requests_on_a_connection_even_before_their_answers() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client.write_all(&PING.repeat(3)).unwrap();
    for text in ["1", "2", "3"] {
        rig.answer(text);
        assert_eq!(read_answer(&mut client), (200, text.into()));
    }
    client.write_all(PING).unwrap();
    let (request, reply) = rig.call().split();
    assert!(matches!(request, Request::Ping));
    reply.send(Ok(Answer::Done));
    assert_eq!(read_answer(&mut client), (204, String::new()));
}

#[test]
fn a_slow_client_holds_nobody_up() {
    let rig = Rig::new();
    let request = b"PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
    let mut slow = rig.connect();
    for byte in request {
        slow.write_all(&[*byte]).unwrap();
        if byte.is_ascii_uppercase() {
            rig.works();
        }
    }
    rig.answer("7");
    assert_eq!(read_answer(&mut slow), (200, "7".into()));
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let rig = Rig::new();
    let mut deaf = rig.connect();
    deaf.write_all(PING).unwrap();
    let long = "x".repeat(4 << 20);
    rig.answer(&long);
    rig.works();
    assert_eq!(read_answer(&mut deaf), (200, long));
}

#[test]
fn a_client_may_leave_before_its_answer() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client.write_all(PING).unwrap();
    let call = rig.call();
    drop(client);
    rig.works();
    let (_, reply) = call.split();
    reply.send(Ok(Answer::Done));
    rig.works();
}

#[test]
fn a_client_that_has_said_all_still_gets_its_answer() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client.write_all(PING).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    rig.answer("1");
    assert_eq!(read_answer(&mut client), (200, "1".into()));
    assert!(at_end(&mut client));
}

#[test]
fn idle_clients_make_room_for_others() {
    let rig = Rig::new();
    let mut first = rig.connect();
    first.write_all(PING).unwrap();
    rig.answer("1");
    read_answer(&mut first);
    let others: Vec<_> = (0..40).map(|_| rig.connect()).collect();
    rig.works();
    assert!(at_end(&mut first), "the one idle for longest had to go");
    drop(others);
    rig.works();
}

#[test]
fn what_is_no_http_is_told_so_and_left() {
    let rig = Rig::new();
    for bytes in [
        &b"\x16\x03\x01\x02\x00"[..],
        b"hello\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        &[b'A'; 9000],
    ] {
        let mut client = rig.connect();
        // It may be left before it has said all.
        let _ = client.write_all(bytes);
        let (status, body) = read_answer(&mut client);
        assert_eq!(status, 400);
        let chain: Vec<String> = serde_json::from_str(&body).unwrap();
        assert_eq!(chain.len(), 1, "{chain:?}");
        assert!(at_end(&mut client));
    }
    rig.works();
}

#[test]
fn wrong_paths_and_bodies_leave_the_connection_open() {
    let rig = Rig::new();
    let mut client = rig.connect();
    for (request, status) in [
        ("GET /api/v1/vmm.pong HTTP/1.1\r\n\r\n", 404),
        (
            "PUT /api/v1/vm.snapshot HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            404,
        ),
        ("POST /api/v1/vmm.ping HTTP/1.1\r\n\r\n", 400),
        (
            "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 1\r\n\r\n{",
            400,
        ),
    ] {
        client.write_all(request.as_bytes()).unwrap();
        assert_eq!(read_answer(&mut client).0, status, "{request}");
    }
}

#[test]
fn a_client_waits_for_continue() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client
        .write_all(
            b"PUT /api/v1/vm.resize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        )
        .unwrap();
    assert_eq!(read_answer(&mut client), (100, String::new()));
    client.write_all(b"{}").unwrap();
    rig.answer("1");
    assert_eq!(read_answer(&mut client), (200, "1".into()));
}

#[test]
fn the_end_answers_everybody() {
    let Rig {
        server,
        calls,
        events,
        path,
        _file,
        _directory,
    } = Rig::new();
    let mut answered = UnixStream::connect(&path).unwrap();
    let mut unanswered = UnixStream::connect(&path).unwrap();
    let mut unfinished = UnixStream::connect(&path).unwrap();
    answered.write_all(PING).unwrap();
    unanswered.write_all(PING).unwrap();
    unfinished.write_all(&PING[..9]).unwrap();
    let mut waiting = Vec::new();
    while waiting.len() < 2 {
        poll(
            &mut [watch(events.wake_fd().as_raw_fd(), libc::POLLIN)],
            None,
        )
        .unwrap();
        let _ = events.wake_fd().read();
        waiting.extend(std::iter::from_fn(|| calls.try_next()));
    }
    let last = waiting.pop().unwrap();
    last.split().1.send(Ok(Answer::Done));
    drop(waiting);
    server.finish();
    let mut seen = [read_answer(&mut answered), read_answer(&mut unanswered)];
    seen.sort();
    assert_eq!(seen[0].0, 204);
    assert_eq!(seen[1], (500, r#"["the VMM is ending"]"#.into()));
    assert!(at_end(&mut unfinished));
}

#[test]
fn the_client_hears_the_whole_chain() {
    let rig = Rig::new();
    let path = rig.path.clone();
    let client = std::thread::spawn(move || client::request(&path, "PUT", "vm.boot", None));
    let (request, reply) = rig.call().split();
    assert!(matches!(request, Request::Boot));
    let mut failure = Failure::new(Status::Failed, "booting the VM");
    failure.chain.push("no kernel".into());
    reply.send(Err(failure));
    let error = client.join().unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Server { status: 500, .. }));
    assert_eq!(error.to_string(), "booting the VM: no kernel");

    let error = client::request("/nowhere/s".as_ref(), "GET", "vmm.ping", None).unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
}

mod openapi {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::super::http::HttpRequest;
    use super::super::route::{ROOT, ROUTES, route};
    use super::super::{DeviceNode, Ping, Resize, ResizeDisk, VmInfo, VmState};
    use crate::config::{
        BalloonConfig, ConsoleConfig, CpuTopologyConfig, CpusConfig, DiskConfig, MemoryConfig,
        NetConfig, PayloadConfig, PmemConfig, RateLimitConfig, RngConfig, TokenBucketConfig,
        UserNetworkConfig, VmConfig, VsockConfig,
    };

    fn document() -> Value {
        serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap()
    }

    #[test]
    fn every_route_is_in_it_and_everything_in_it_answers() {
        let document = document();
        assert_eq!(
            document["servers"][0]["url"],
            json!("http://localhost/api/v1")
        );
        let mut told = BTreeSet::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            for (method, operation) in operations.as_object().unwrap() {
                let method = method.to_uppercase();
                let path = path.strip_prefix('/').unwrap();
                told.insert((method.clone(), path.to_owned()));
                let body = &operation["requestBody"]["content"]["application/json"]["example"];
                let has_body = !body.is_null();
                let ask = |body: Vec<u8>| {
                    route(&HttpRequest {
                        method: method.clone(),
                        path: format!("{ROOT}{path}"),
                        body,
                        keep_alive: true,
                    })
                };
                let example = if has_body {
                    body.to_string()
                } else {
                    String::new()
                };
                ask(example.into_bytes()).unwrap_or_else(|f| panic!("{method} {path}: {f:?}"));
                // A body is read where it says so, and nowhere else.
                assert_eq!(ask(b"{".to_vec()).is_err(), has_body, "{method} {path}");
                assert!(
                    operation["responses"].as_object().unwrap().len() > 1
                        || path == "vmm.ping"
                        || path == "vmm.shutdown"
                );
            }
        }
        let there: BTreeSet<_> = ROUTES
            .iter()
            .map(|r| (r.method.to_owned(), r.path.to_owned()))
            .collect();
        assert_eq!(
            told, there,
            "docs/openapi.json (left) and the server (right)"
        );
    }

    fn keys(value: &Value) -> BTreeSet<&str> {
        value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect()
    }

    #[test]
    fn schemas_have_the_fields_that_are_read_and_written() {
        let topology = CpuTopologyConfig {
            threads_per_core: 1,
            cores_per_die: 1,
            dies_per_package: 1,
            packages: 1,
        };
        // What a console has depends on its mode.
        let console = |text| json!(ConsoleConfig::parse("--console", text).unwrap());
        let mut file = console("file=/f,iommu=on");
        file["socket"] = console("socket=/s")["socket"].clone();
        let vsock = VsockConfig::parse("cid=3,socket=/v").unwrap();
        let bucket = TokenBucketConfig {
            size: 1,
            one_time_burst: None,
            refill_time: 1,
        };
        let node = DeviceNode {
            id: "a".into(),
            pci_bdf: "b".into(),
        };
        let disk = ResizeDisk {
            id: "a".into(),
            desired_size: 1,
        };
        let info = VmInfo {
            config: VmConfig::default(),
            state: VmState::Created,
            memory_actual_size: 0,
            device_tree: [("a".to_owned(), node.clone())].into(),
        };
        let samples = [
            ("VmConfig", json!(VmConfig::default())),
            ("CpusConfig", json!(CpusConfig::default())),
            ("CpuTopology", json!(topology)),
            ("MemoryConfig", json!(MemoryConfig::default())),
            ("PayloadConfig", json!(PayloadConfig::default())),
            ("ConsoleConfig", file),
            ("DiskConfig", json!(DiskConfig::default())),
            ("NetConfig", json!(NetConfig::default())),
            ("UserNetworkConfig", json!(UserNetworkConfig::default())),
            ("RngConfig", json!(RngConfig::default())),
            ("BalloonConfig", json!(BalloonConfig::default())),
            ("PmemConfig", json!(PmemConfig::default())),
            ("VsockConfig", json!(vsock)),
            ("RateLimiterConfig", json!(RateLimitConfig::default())),
            ("TokenBucket", json!(bucket)),
            ("VmInfo", json!(info)),
            ("DeviceNode", json!(node)),
            ("VmmPingResponse", json!(Ping::of_this_process())),
            ("VmResize", json!(Resize::default())),
            ("VmResizeDisk", json!(disk)),
        ];
        let document = document();
        let schemas = &document["components"]["schemas"];
        for (name, sample) in &samples {
            let properties = &schemas[name]["properties"];
            assert!(
                properties.is_object(),
                "docs/openapi.json has no schema {name}"
            );
            assert_eq!(
                keys(properties),
                keys(sample),
                "{name}: docs/openapi.json (left) and serde (right)"
            );
        }
        let others = ["VmCounters", "Error"];
        let names: BTreeSet<&str> = samples.iter().map(|s| s.0).chain(others).collect();
        assert_eq!(keys(schemas), names);
        // Each reference leads somewhere.
        let text = document.to_string();
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(names.contains(name), "{name}");
        }
    }

    #[test]
    fn defaults_are_those_of_serde() {
        let document = document();
        let schemas = &document["components"]["schemas"];
        let mut compared = 0;
        for (name, sample) in [
            ("CpusConfig", json!(CpusConfig::default())),
            ("MemoryConfig", json!(MemoryConfig::default())),
            ("DiskConfig", json!(DiskConfig::default())),
            ("NetConfig", json!(NetConfig::default())),
            ("UserNetworkConfig", json!(UserNetworkConfig::default())),
            ("RngConfig", json!(RngConfig::default())),
            ("BalloonConfig", json!(BalloonConfig::default())),
            ("PmemConfig", json!(PmemConfig::default())),
        ] {
            for (field, property) in schemas[name]["properties"].as_object().unwrap() {
                if let Some(default) = property.get("default") {
                    assert_eq!(*default, sample[field], "{name}.{field}");
                    compared += 1;
                }
            }
        }
        assert!(compared > 15, "{compared}");
    }
}
