//! Network devices: a Linux guest and a server at the host's end of the tap, in a network namespace of their own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;

use crate::linux::Linux;
use crate::support::{Kvm, Vmm, test_guest};

/// The host's end.
const HOST: &str = "192.168.249.1";

/// Moves this thread, and what it opens, into the network namespace of process `pid`.
#[allow(unsafe_code)]
fn enter_network_of(pid: u32) {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).unwrap();
    // SAFETY: setns changes the namespace of this thread alone; the descriptor is open.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns: {}", io::Error::last_os_error());
}

/// Listens at the host's end as soon as the VMM has made it.
fn listen(pid: u32, port: u16) -> TcpListener {
    loop {
        // Until the VMM runs in its own namespace, this enters that of the test.
        enter_network_of(pid);
        match TcpListener::bind((HOST, port)) {
            Ok(listener) => return listener,
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => thread::yield_now(),
            Err(e) => panic!("port {port}: {e}"),
        }
    }
}

fn accept(listener: &TcpListener) -> TcpStream {
    listener.accept().unwrap().0
}

fn sha256(bytes: &[u8], name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(name), bytes).unwrap();
    let sum = std::process::Command::new("sha256sum")
        .arg(name)
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(sum.status.success());
    sum.stdout
}

#[test]
fn linux_pings_and_moves_bytes_both_ways() {
    let Some(kvm) = Kvm::here() else { return };
    // As in the user's own command line: empty values are the defaults.
    let vmm = Linux::new(kvm)
        .net("tap=,mac=2e:89:a8:e4:92:00,ip=,mask=")
        .start("ch.test=net");
    let pid = vmm.pid();
    let server = thread::spawn(move || {
        let listeners = [5001, 5002, 5003].map(|port| listen(pid, port));
        let data: Vec<u8> = (0..1_000_000u32).map(|i| (i * 31 / 7) as u8).collect();
        accept(&listeners[0]).write_all(&data).unwrap();
        let sum = sha256(&data, "received");
        accept(&listeners[1]).write_all(&sum).unwrap();
        let mut received = Vec::new();
        accept(&listeners[2]).read_to_end(&mut received).unwrap();
        received
    });
    let ended = Linux::finish(vmm, "net");
    let line = "CH-NET: mtu 1500 mac 2e:89:a8:e4:92:00";
    assert!(ended.out.lines().any(|l| l == line), "no {line:?}");
    let received = server.join().unwrap();
    let archive = std::fs::read(crate::support::asset("initramfs.cpio")).unwrap();
    // The guest sent its busybox, which the initramfs holds as it is.
    assert!(received.len() > 1 << 20, "{} bytes", received.len());
    assert!(
        archive
            .windows(received.len())
            .any(|window| window == received),
        "what the guest sent is not what it has"
    );
}

#[test]
fn taps_that_cannot_be() {
    let Some(_kvm) = Kvm::here() else { return };
    for (net, wanted) in [
        ("tap=lo", "lo"),
        ("mac=12:34", "mac=12:34"),
        ("num_queues=3", "num_queues=3"),
        ("vhost_user=on,socket=/s", "not built yet"),
    ] {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option("--net", net)
            .own_network()
            .start()
            .wait();
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--net: ") && line.contains(wanted),
            "{line}"
        );
    }
}
