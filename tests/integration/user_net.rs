//! `--net user`: a VMM without any right of root, in a network namespace where 127.0.0.1 and 192.0.2.1 are the host's addresses. A
//! Linux guest (`guest/user_net.rs`), and the bare-metal guest through pauses and reboots.

use std::fs;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::linux::Linux;
use crate::net::{enter_network_of, listen_at};
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Vmm, initramfs, test_guest};
use crate::traffic::{PATIENCE, accept, both_ways, pattern};

/// An address of the host that is not its loopback's.
const HOST: &str = "192.0.2.1";

fn datagram_socket(address: (&str, u16)) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends back what comes.
fn echo(socket: &UdpSocket) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok((size, from)) = socket.recv_from(&mut buffer) {
        socket.send_to(&buffer[..size], from).unwrap();
    }
}

/// A DNS server (RFC 1035) by which all names have the address 192.0.2.1, and no other.
fn resolve(socket: &UdpSocket) {
    let mut buffer = vec![0; 512];
    while let Ok((size, from)) = socket.recv_from(&mut buffer) {
        let query = &buffer[..size];
        // A name ends with a label of no length; type and class follow.
        let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let is_address = query[end - 4..end] == [0, 1, 0, 1];
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
        answer.extend(&query[12..end]);
        if is_address {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
        }
        socket.send_to(&answer, from).unwrap();
    }
}

/// Asks the VMM something by its API.
fn ask(socket: &Path, words: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_ch-remote"))
        .arg("--api-socket")
        .arg(socket)
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
}

/// The VMM may do nothing that needs a right.
fn check_rights(vmm: &Vmm) {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
    let line = "CapEff:\t0000000000000000";
    assert!(status.lines().any(|l| l == line), "{status}");
}

/// Everything in one boot.
#[test]
fn linux_reaches_the_host_and_is_reached() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let program = initramfs::program("user_net", dir.path());
    let files = dir.path().join("initramfs");
    let lease = include_bytes!("guest/lease.sh");
    initramfs::with_files(
        &files,
        &[("tests/user_net", &program), ("tests/lease", lease)],
    );
    let api: PathBuf = dir.path().join("api");
    let mut vmm = Linux::new(kvm)
        .initramfs(&files)
        .option("--api-socket", api.to_str().unwrap())
        .option(
            "--net",
            "user,hostfwd=[tcp:127.0.0.1:2222-:22,udp::5300-:53],dns=127.0.0.1:5353",
        )
        .option(
            "--net",
            "user,network=192.168.7.0/24,host_loopback=on,mtu=9000",
        )
        .confined(HOST)
        .start("ch.test=user_net");
    // From here on, this thread and its children are in the VMM's namespace.
    let streams = listen_at(vmm.pid(), HOST, 8000);
    let private = TcpListener::bind(("127.0.0.1", 9000)).unwrap();
    let (echoing, resolving) = (
        datagram_socket((HOST, 8001)),
        datagram_socket(("127.0.0.1", 5353)),
    );
    thread::spawn(move || echo(&echoing));
    thread::spawn(move || resolve(&resolving));

    both_ways(accept(&streams), 1);
    vmm.wait_for("CH-USER: datagrams to the host");
    // This is the second network's: what the first connects to is refused.
    both_ways(accept(&private), 2);
    vmm.wait_for("CH-USER: listening");
    check_rights(&vmm);
    both_ways(TcpStream::connect(("127.0.0.1", 2222)).unwrap(), 3);
    let socket = datagram_socket(("127.0.0.1", 0));
    socket.connect(("127.0.0.1", 5300)).unwrap();
    let bytes = pattern(300, 1400);
    socket.send(&bytes).unwrap();
    let mut buffer = vec![0; 1 << 16];
    let size = socket.recv(&mut buffer).unwrap();
    assert!(buffer[..size] == bytes, "{size} bytes came back");

    // What the host sends to a guest that is held is there when it goes on.
    let stream = accept(&streams);
    vmm.wait_for("CH-USER: hold me");
    ask(&api, &["pause"]);
    let going = thread::spawn(move || both_ways(stream, 4));
    ask(&api, &["info"]);
    ask(&api, &["resume"]);
    going.join().unwrap();

    let ended = Linux::finish(vmm, "user_net");
    let said: Vec<_> = ended
        .out
        .lines()
        .filter_map(|l| l.strip_prefix("CH-USER: "))
        .collect();
    for line in [
        "eth0 10.0.2.15 255.255.255.0 router 10.0.2.2 dns 10.0.2.3 mtu 1500",
        "eth1 192.168.7.15 255.255.255.0 router 192.168.7.2 dns 192.168.7.3 mtu 9000",
        "closed: connection refused",
        "went on",
    ] {
        assert!(said.contains(&line), "no {line:?} in {said:?}");
    }
}

/// A datagram that the guest sends back.
fn round(socket: &UdpSocket, bytes: &[u8]) {
    socket.send(bytes).unwrap();
    let mut buffer = [0; 2048];
    let size = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..size], bytes);
}

/// The network of a guest that starts anew has its ports again; one that is held loses nothing.
#[test]
fn forwards_outlive_a_pause_and_a_reboot() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let api = dir.path().join("api");
    let tests = ["virtio_net_user"];
    let mut vmm = BareMetal::new(kvm)
        .builder(&tests)
        .option("--api-socket", &api)
        .option("--net", "user,hostfwd=[udp::7007-:7,tcp::7007-:7]")
        .confined(HOST)
        .start();
    vmm.wait_for("READY virtio_net_user");
    check_rights(&vmm);
    enter_network_of(vmm.pid());
    let socket = datagram_socket(("127.0.0.1", 0));
    socket.connect(("127.0.0.1", 7007)).unwrap();
    round(&socket, b"before");
    ask(&api, &["pause"]);
    socket.send(b"meanwhile").unwrap();
    ask(&api, &["resume"]);
    let mut buffer = [0; 2048];
    let size = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..size], b"meanwhile");
    ask(&api, &["reboot"]);
    vmm.wait_for("READY virtio_net_user");
    round(&socket, b"after");
    round(&socket, b"end");
    let ended = vmm.wait().expect_clean();
    // The report of the second start.
    let at = ended.out.rfind("HELLO").unwrap();
    let ended = crate::support::Ended {
        out: ended.out[at..].to_owned(),
        ..ended
    };
    finish(ended, &tests);
}

/// Somebody else has the port.
#[test]
fn a_port_that_is_taken() {
    let Some(_kvm) = Kvm::here() else { return };
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let ended = Vmm::builder()
        .option("--kernel", test_guest())
        .option("--net", format!("user,hostfwd=tcp::{port}-:22"))
        .start()
        .wait();
    let line = ended.expect_refusal();
    let wanted = format!("tcp:127.0.0.1:{port}-:22");
    assert!(
        line.starts_with("--net: ") && line.contains(&wanted),
        "{line}"
    );
    assert!(line.contains("Address already in use"), "{line}");
}
