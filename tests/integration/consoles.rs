//! Serial port and console with clients: pseudo-terminals and sockets, late ones and one after another.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::support::{BareMetal, Kvm, Vmm, test_guest};

/// Reads up to and with a line that ends in `wanted`.
fn lines_until(from: &mut impl BufRead, wanted: &str) -> String {
    let mut text = String::new();
    while !text.trim_end().ends_with(wanted) {
        let count = from.read_line(&mut text).unwrap();
        assert!(count > 0, "{text:?} ends without {wanted:?}");
    }
    text
}

/// A guest whose serial port is on a socket at `path`, which it has printed to.
fn guest_on_socket(kvm: Kvm, path: &Path, end: &str) -> Vmm {
    BareMetal::new(kvm)
        .serial(format!("socket={}", path.display()))
        .word(end)
        .start(&["boot", "echo"])
}

/// Connects once the VMM listens.
fn connect(path: &Path) -> UnixStream {
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn late_clients_of_a_socket_see_all_and_type() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let vmm = guest_on_socket(kvm, &path, "end=shutdown");
    let mut stream = connect(&path);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let text = lines_until(&mut reader, "READY");
    assert!(text.starts_with("HELLO test-guest"), "{text}");
    stream.write_all(b"hello\n").unwrap();
    lines_until(&mut reader, "ECHO HELLO");
    drop((reader, stream));

    // The next one sees what the first one saw.
    let mut stream = connect(&path);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let again = lines_until(&mut reader, "ECHO HELLO");
    assert!(again.starts_with(&text), "{again}");
    stream.write_all(b"quit\n").unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("DONE failed=0"), "{rest}");
    vmm.wait().expect_clean();
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn a_socket_outlives_a_reset_of_the_guest() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let vmm = guest_on_socket(kvm, &path, "end=reset");
    let mut stream = connect(&path);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    for word in ["one", "two", "three"] {
        lines_until(&mut reader, "READY");
        stream
            .write_all(format!("{word}\nquit\n").as_bytes())
            .unwrap();
        lines_until(&mut reader, &format!("ECHO {}", word.to_uppercase()));
    }
    lines_until(&mut reader, "READY");
    vmm.signal(libc::SIGTERM);
    vmm.wait().expect_clean();
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn a_pseudo_terminal_is_told_and_works() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = BareMetal::new(kvm)
        .serial("pty")
        .word("end=shutdown")
        .start(&["boot", "echo"]);
    let told = vmm.wait_for_error("--serial is at /dev/pts/", "\n");
    let path = PathBuf::from(format!("/dev/pts/{told}"));
    assert!(path.metadata().unwrap().file_type().is_char_device());
    let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
    let mut reader = BufReader::new(terminal.try_clone().unwrap());
    let text = lines_until(&mut reader, "READY");
    assert!(text.starts_with("HELLO test-guest"), "{text}");
    terminal.write_all(b"hello\n").unwrap();
    lines_until(&mut reader, "ECHO HELLO");
    terminal.write_all(b"quit\n").unwrap();
    lines_until(&mut reader, "DONE failed=0");
    let ended = vmm.wait();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.err);
}

#[test]
fn a_path_that_is_taken_is_refused_and_stays() {
    let Some(_kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("taken");
    std::fs::write(&path, "mine").unwrap();
    for option in ["--serial", "--console"] {
        let ended = Vmm::builder()
            .option("--kernel", test_guest())
            .option(option, format!("socket={}", path.display()))
            .start()
            .wait();
        let wanted = format!("{option}: listening at {path:?} (remove what is there first)");
        let line = ended.expect_refusal();
        assert!(line.starts_with(&wanted), "{line}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }
}
