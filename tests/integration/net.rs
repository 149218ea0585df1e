//! Network devices, in a network namespace of their own: a Linux guest and a server at the host's end of the tap; the bare-metal guest
//! and a peer that sends every frame back.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;

use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Vmm, test_guest};

/// The host's end.
const HOST: &str = "192.168.249.1";

/// Moves this thread, and what it opens, into the network namespace of process `pid`, as soon as that has one of its own.
#[allow(unsafe_code)]
pub fn enter_network_of(pid: u32) {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
    while of(&pid.to_string()) == of("self") {
        thread::yield_now();
    }
    let namespace = File::open(format!("/proc/{pid}/ns/net")).unwrap();
    // SAFETY: setns changes the namespace of this thread alone; the descriptor is open.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns: {}", io::Error::last_os_error());
}

/// Listens in that namespace, as soon as `address` is there.
pub fn listen_at(pid: u32, address: &str, port: u16) -> TcpListener {
    enter_network_of(pid);
    // Where there are no addresses at all, Linux lets programs have any.
    while !fs::read_to_string("/proc/thread-self/net/fib_trie")
        .unwrap()
        .contains(address)
    {
        thread::yield_now();
    }
    TcpListener::bind((address, port)).unwrap_or_else(|e| panic!("{address}:{port}: {e}"))
}

/// Listens at the host's end as soon as the VMM has made it.
pub fn listen(pid: u32, port: u16) -> TcpListener {
    listen_at(pid, HOST, port)
}

fn accept(listener: &TcpListener) -> TcpStream {
    listener.accept().unwrap().0
}

fn sha256(bytes: &[u8], name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), bytes).unwrap();
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
    talk(&Linux::new(kvm).net("tap=,mac=2e:89:a8:e4:92:00,ip=,mask="));
}

#[test]
fn linux_moves_bytes_behind_the_iommu() {
    let Some(kvm) = Kvm::here() else { return };
    talk(
        &Linux::new(kvm)
            .net("tap=,mac=2e:89:a8:e4:92:00,iommu=on")
            .option("--rng", "iommu=on"),
    );
}

/// Linux pings, takes a file and sends one.
fn talk(linux: &Linux) {
    let vmm = linux.start("ch.test=net");
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
    let archive = fs::read(crate::support::asset("initramfs.cpio")).unwrap();
    // The guest sent its busybox, which the initramfs holds as it is.
    assert!(received.len() > 1 << 20, "{} bytes", received.len());
    assert!(
        archive
            .windows(received.len())
            .any(|window| window == received),
        "what the guest sent is not what it has"
    );
}

/// Ethertype of the bare-metal guest's frames, for local experiments.
const EXPERIMENT: u16 = 0x88b5;

/// A packet socket on the tap, which hears nothing but the guest's frames (packet(7)).
#[allow(unsafe_code)]
fn packet_socket(tap: &str) -> OwnedFd {
    let name = std::ffi::CString::new(tap).unwrap();
    // SAFETY: the name ends with NUL; the socket is new; the address is plain numbers, of the size that is told.
    unsafe {
        let index = libc::if_nametoindex(name.as_ptr());
        assert_ne!(index, 0, "{tap}: {}", io::Error::last_os_error());
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(EXPERIMENT.to_be()),
        );
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = EXPERIMENT.to_be();
        address.sll_ifindex = i32::try_from(index).unwrap();
        let size = size_of_val(&address) as u32;
        let result = libc::bind(fd, (&raw const address).cast(), size);
        assert_eq!(result, 0, "bind: {}", io::Error::last_os_error());
        socket
    }
}

/// Sends each frame back to whoever it comes from, for as long as there is a tap. Gives the lengths of the frames, and fails at one
/// whose sum is wrong (`test-guest/src/tests/virtio_net.rs`).
#[allow(unsafe_code)]
fn send_back(socket: &OwnedFd) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut buffer = [0u8; 16384];
    loop {
        // SAFETY: the buffer is as long as is told.
        let got = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        // The VMM has ended, and its tap with it.
        let Ok(length) = usize::try_from(got) else {
            return lengths;
        };
        let frame = &mut buffer[..length];
        let (data, sum) = frame.split_at(length - 8);
        let wanted = data[12..]
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| {
                (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
            });
        assert_eq!(sum, wanted.to_le_bytes(), "frame number {}", lengths.len());
        let (to, from) = frame[..12].split_at_mut(6);
        to.swap_with_slice(from);
        // SAFETY: the frame is as long as is told.
        let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, got, "sending: {}", io::Error::last_os_error());
        lengths.push(length);
    }
}

/// Runs the bare-metal guest's test against a peer; the lengths of the frames that it sent.
fn frames(kvm: Kvm, net: &str, words: &[&str]) -> (Vec<usize>, u64) {
    let guest = words
        .iter()
        .fold(BareMetal::new(kvm), |g, word| g.word(word));
    let mut vmm = guest
        .builder(&["virtio_net"])
        .option("--net", format!("tap=vmtap0,{net}"))
        .own_network()
        .start();
    vmm.wait_for("READY virtio_net");
    enter_network_of(vmm.pid());
    let socket = packet_socket("vmtap0");
    let peer = thread::spawn(move || send_back(&socket));
    vmm.send("\n");
    let report = finish(vmm.wait(), &["virtio_net"]);
    // With merged buffers, and without.
    let most = report.values("net_buffers");
    assert_eq!(most.len(), 2);
    assert_eq!(most[1], "1");
    let mac = report.values("net_mac");
    assert!(mac.iter().all(|mac| *mac == "2e:89:a8:e4:92:01"), "{mac:?}");
    (peer.join().unwrap(), most[0].parse().unwrap())
}

#[test]
fn frames_go_out_and_come_back() {
    let Some(kvm) = Kvm::here() else { return };
    let (lengths, buffers) = frames(kvm, "mac=2e:89:a8:e4:92:01", &[]);
    assert_eq!(buffers, 1);
    assert_eq!(lengths.iter().max(), Some(&1514));
    assert_eq!(lengths.iter().min(), Some(&60));
}

#[test]
fn frames_over_two_pairs_in_merged_buffers() {
    let Some(kvm) = Kvm::here() else { return };
    let (lengths, buffers) = frames(
        kvm,
        "mac=2e:89:a8:e4:92:01,num_queues=4,mtu=9000",
        &["net_pairs=2", "net_mtu=9000"],
    );
    // 9014 bytes and a header, in buffers of 2048.
    assert_eq!(buffers, 5);
    assert_eq!(lengths.iter().max(), Some(&9014));
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
