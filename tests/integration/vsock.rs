//! Sockets between the guest and programs of the host.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use tempfile::TempDir;

use crate::linux::Linux;
use crate::support::{BareMetal, Kvm, Vmm, initramfs, report, test_guest};
use crate::traffic::pattern;

/// Where the sockets of a test are.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("vsock")
    }

    /// The value of `--vsock`.
    fn option(&self) -> String {
        format!("cid=42,socket={}", self.path().display())
    }

    /// A program of the host that listens at `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.0.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// A program of the host that connects to the guest's port `port`. None if the guest refuses.
    fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while byte != *b"\n" {
            match stream.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                Ok(_) => return None,
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("{e}"),
            }
        }
        assert!(line.starts_with(b"OK "), "{line:?}");
        Some(stream)
    }
}

/// Sends back what comes, to its end.
fn echo(mut stream: UnixStream) -> UnixStream {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return stream,
            count => stream.write_all(&buffer[..count]).unwrap(),
        }
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.accept().unwrap().0
}

/// What the bare-metal guest calls the byte at an offset.
fn bulk(total: usize) -> Vec<u8> {
    (0..total).map(|offset| (offset / 8) as u8).collect()
}

#[test]
fn the_bare_metal_guest_talks_with_programs_of_the_host() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let listener = place.listen(5000);
    let server = thread::spawn(move || {
        let mut stream = echo(accept(&listener));
        stream.write_all(b"bye").unwrap();
    });
    let mut vmm = BareMetal::new(kvm)
        .builder(&["virtio_vsock"])
        .option("--vsock", place.option())
        .start();
    vmm.wait_for("READY virtio_vsock");
    let mut stream = place.connect(99).unwrap();
    stream.write_all(b"hello, guest").unwrap();
    let mut back = [0; 12];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello, guest");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut back).unwrap(), 0);
    let report = report::finish(vmm.wait(), &["virtio_vsock"]);
    assert_eq!(report.number("vsock_cid"), 42);
    server.join().unwrap();
    assert!(!place.path().exists(), "the socket is left behind");
}

#[test]
fn a_reset_of_the_vm_ends_streams_and_the_listener_goes_on() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let listener = place.listen(5003);
    let mut vmm = BareMetal::new(kvm)
        .word("end=reset")
        .builder(&["virtio_vsock_left"])
        .option("--vsock", place.option())
        .start();
    for start in 0..3 {
        let mut stream = accept(&listener);
        // The guest has left it open: its end is that of the machine.
        let mut nothing = [0];
        assert_eq!(stream.read(&mut nothing).unwrap(), 0, "start {start}");
        // Somebody listens, whether the guest is there or not.
        UnixStream::connect(place.path()).unwrap();
    }
    vmm.signal(libc::SIGTERM);
    vmm.wait_exit();
    assert!(!place.path().exists(), "the socket is left behind");
}

#[test]
fn many_bytes_each_way() {
    let Some(kvm) = Kvm::here() else { return };
    const MIB: usize = 64;
    let place = Place::new();
    let (sink, source) = (place.listen(5001), place.listen(5002));
    let server = thread::spawn(move || {
        let wanted = bulk(MIB << 20);
        let mut stream = accept(&sink);
        let begin = Instant::now();
        let mut got = Vec::with_capacity(MIB << 20);
        stream.read_to_end(&mut got).unwrap();
        let from_guest = begin.elapsed();
        assert!(got == wanted, "{} bytes came", got.len());
        drop(stream);
        let mut stream = accept(&source);
        let begin = Instant::now();
        stream.write_all(&wanted).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // Until the guest has all.
        while !matches!(stream.read(&mut [0]), Ok(0) | Err(_)) {}
        let to_guest = begin.elapsed();
        for (way, time) in [("from", from_guest), ("to", to_guest)] {
            let rate = MIB as f64 / time.as_secs_f64();
            println!("{rate:.0} MiB/s {way} the guest");
        }
    });
    let vmm = BareMetal::new(kvm)
        .word(&format!("vsock_mib={MIB}"))
        .builder(&["virtio_vsock_bulk"])
        .option("--vsock", place.option())
        .start();
    report::finish(vmm.wait(), &["virtio_vsock_bulk"]);
    server.join().unwrap();
}

/// Takes the 64 streams: each sends its number and bytes, and gets others at the same time.
fn many(listener: &UnixListener) {
    const LEN: usize = 8 << 10;
    let streams: Vec<_> = (0..64)
        .map(|_| {
            let mut stream = accept(listener);
            thread::spawn(move || {
                let mut id = [0; 4];
                stream.read_exact(&mut id).unwrap();
                let id = u32::from_le_bytes(id);
                stream.write_all(&pattern(!id, LEN)).unwrap();
                let mut got = vec![0; LEN];
                stream.read_exact(&mut got).unwrap();
                assert!(got == pattern(id, LEN), "stream {id} brought other bytes");
                stream.write_all(b"+").unwrap();
                // Until the guest closes.
                let _ = stream.read(&mut [0]);
                id
            })
        })
        .collect();
    let mut ids: Vec<u32> = streams.into_iter().map(|s| s.join().unwrap()).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..64));
}

#[test]
fn linux_talks_with_programs_of_the_host() {
    let Some(kvm) = Kvm::here() else { return };
    let place = Place::new();
    let initramfs = place.0.path().join("initramfs");
    let build = tempfile::tempdir().unwrap();
    let program = initramfs::program("vsock", build.path());
    initramfs::with_files(&initramfs, &[("tests/vsock", &program)]);
    let [echoes, streams, halves, closing, stuck] =
        [7000, 7001, 7002, 7003, 7004].map(|port| place.listen(port));
    let server = thread::spawn(move || {
        echo(accept(&echoes));
        many(&streams);
        let mut question = String::new();
        let mut half = accept(&halves);
        half.read_to_string(&mut question).unwrap();
        half.write_all(format!("answer to {question}").as_bytes())
            .unwrap();
        drop(half);
        drop(accept(&closing));
        let sleeper = accept(&stuck);
        echo(accept(&echoes));
        sleeper
    });
    let mut vmm = Linux::new(kvm)
        .initramfs(&initramfs)
        .option("--vsock", place.option())
        .start("ch.test=vsock");
    for line in [
        "echo",
        "64 streams",
        "halves",
        "resets",
        "stuck",
        "listening",
    ] {
        vmm.wait_for(&format!("CH-VSOCK: {line}"));
    }
    let mut stream = place.connect(7100).expect("the guest listens");
    let sent = pattern(7, 30_000);
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == sent, "{} bytes came back", back.len());
    Linux::finish(vmm, "vsock");
    drop(server.join().unwrap());
}

/// The VMM refuses with a line that has all of `wanted`.
fn refuses(value: &str, wanted: &[&str]) {
    let ended = Vmm::builder()
        .option("--kernel", test_guest())
        .option("--vsock", value)
        .start()
        .wait();
    let line = ended.expect_refusal();
    for part in wanted {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
}

#[test]
fn sockets_that_cannot_be() {
    let Some(_) = Kvm::here() else { return };
    let place = Place::new();
    let path = place.path();
    let name = path.to_str().unwrap();
    let at = |path: &Path| format!("cid=3,socket={}", path.display());
    refuses("", &["--vsock", "cid is missing"]);
    refuses("cid=3", &["--vsock: socket is missing"]);
    refuses("cid=2,socket=v", &["--vsock", "cid=2", "from 3 to"]);
    refuses(&at(Path::new(&"v".repeat(97))), &["up to 96 bytes"]);
    refuses(
        &at(Path::new("/no/such/dir/v")),
        &["--vsock: making socket", "No such file"],
    );
    // A file, and a socket that nobody listens at any more, are the user's.
    std::fs::write(&path, b"mine").unwrap();
    refuses(&at(&path), &[name, "exists; remove it"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    std::fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    refuses(&at(&path), &[name, "exists; remove it"]);
    std::fs::remove_file(&path).unwrap();
    // What fails after it is bound takes it away again.
    let ended = Vmm::builder()
        .option("--kernel", "/no/such/kernel")
        .option("--vsock", at(&path))
        .start()
        .wait();
    assert!(ended.expect_refusal().contains("/no/such/kernel"));
    assert!(!path.exists());
}
