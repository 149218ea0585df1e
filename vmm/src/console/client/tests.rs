//! Clients that come, read, type and go.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::Output;
use super::*;
use crate::event::{Event, EventReceiver, event_channel};

/// A device that takes `most` bytes at a time, and tells what it took.
struct Device {
    most: usize,
    taken: Mutex<Sender<Vec<u8>>>,
    room: EventFd,
}

impl TypedInput for Device {
    fn type_in(&self, bytes: &[u8]) -> usize {
        let taken = &bytes[..bytes.len().min(self.most)];
        self.taken.lock().unwrap().send(taken.to_vec()).unwrap();
        if taken.len() < bytes.len() {
            self.room.write(1).unwrap();
        }
        taken.len()
    }

    fn room(&self) -> &EventFd {
        &self.room
    }
}

/// A console on a socket, with a guest that takes three bytes at a time.
struct Console {
    output: Output,
    slot: InputSlot,
    typed: Receiver<Vec<u8>>,
    events: EventReceiver,
    path: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

fn console(door: Door, dir: Option<tempfile::TempDir>) -> Console {
    let path = door.path().to_owned();
    let (sender, events) = event_channel().unwrap();
    let (output, slot) = Output::start_clients("test", door, sender).unwrap();
    let (taken, typed) = channel();
    slot.set(Some(Arc::new(Device {
        most: 3,
        taken: Mutex::new(taken),
        room: EventFd::new(EFD_NONBLOCK).unwrap(),
    })));
    Console {
        output,
        slot,
        typed,
        events,
        path,
        _dir: dir,
    }
}

fn on_socket() -> Console {
    let dir = tempfile::tempdir().unwrap();
    let door = Door::socket(&dir.path().join("console")).unwrap();
    console(door, Some(dir))
}

impl Console {
    fn print(&mut self, text: &[u8]) {
        self.output.write_all(text).unwrap();
    }

    fn typed(&self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.typed.recv().unwrap());
        }
        all
    }
}

fn read(from: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_client_that_comes_late_sees_what_was_printed() {
    let mut console = on_socket();
    console.print(b"before ");
    for word in [&b"first "[..], b"second "] {
        let mut client = UnixStream::connect(&console.path).unwrap();
        assert_eq!(read(&mut client, 7), b"before ");
        console.print(word);
        if word == b"second " {
            assert_eq!(read(&mut client, 6), b"first ");
        }
        assert_eq!(read(&mut client, word.len()), word);
        client.write_all(b"typed").unwrap();
        assert_eq!(console.typed(5), b"typed");
    }
    console.output.close();
    assert!(!console.path.exists(), "the socket is left behind");
}

#[test]
fn the_history_is_bounded() {
    let mut console = on_socket();
    let lines: Vec<u8> = (0..40_000u32)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    console.print(&lines);
    console.output.flush_all();
    let mut client = UnixStream::connect(&console.path).unwrap();
    let seen = read(&mut client, HISTORY);
    assert_eq!(seen, lines[lines.len() - HISTORY..]);
}

#[test]
fn one_client_at_a_time_and_the_next_when_it_has_gone() {
    let mut console = on_socket();
    let mut first = UnixStream::connect(&console.path).unwrap();
    console.print(b"one");
    assert_eq!(read(&mut first, 3), b"one");
    let mut second = UnixStream::connect(&console.path).unwrap();
    second.write_all(b"later").unwrap();
    first.write_all(b"now").unwrap();
    assert_eq!(console.typed(3), b"now");
    drop(first);
    assert_eq!(console.typed(5), b"later");
    assert_eq!(read(&mut second, 3), b"one");
}

#[test]
fn a_client_that_types_no_more_reads_on() {
    let mut console = on_socket();
    let mut client = UnixStream::connect(&console.path).unwrap();
    client.write_all(b"bye").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(console.typed(3), b"bye");
    console.print(b"and more");
    assert_eq!(read(&mut client, 8), b"and more");
}

#[test]
fn a_client_that_does_not_read_loses_nothing_and_goes_at_the_end() {
    let mut console = on_socket();
    let mut client = UnixStream::connect(&console.path).unwrap();
    console.print(b"x");
    assert_eq!(read(&mut client, 1), b"x");
    // Until all on the way is full.
    let mut printed = 0;
    let full = loop {
        match console.output.write(&[b'y'; 10_000]) {
            Ok(count) => printed += count,
            Err(e) => break e,
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    assert!(read(&mut client, printed).iter().all(|byte| *byte == b'y'));
    console.output.flush_all();
    assert_eq!(console.events.try_next(), Some(Event::OutputRoom));
}

#[test]
fn what_is_typed_waits_for_a_device() {
    let console = on_socket();
    let device = console.slot.get();
    console.slot.set(None);
    let mut client = UnixStream::connect(&console.path).unwrap();
    client.write_all(b"early").unwrap();
    console.slot.set(device);
    assert_eq!(console.typed(5), b"early");
}

#[test]
fn a_pseudo_terminal_is_opened_again_and_again() {
    let mut console = console(Door::terminal().unwrap(), None);
    console.print(b"before\r\n");
    for n in 0..3 {
        let mut client = File::options()
            .read(true)
            .write(true)
            .open(&console.path)
            .unwrap();
        assert_eq!(read(&mut client, 8), b"before\r\n");
        let earlier = read(&mut client, n);
        assert!(earlier.iter().all(|byte| *byte == b'+'));
        console.print(b"+");
        assert_eq!(read(&mut client, 1), b"+");
        // Control characters pass.
        client.write_all(b"a\x03b\r").unwrap();
        assert_eq!(console.typed(4), b"a\x03b\r");
    }
    console.output.close();
}

#[test]
fn what_is_at_the_path_already_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "mine").unwrap();
    let error = Door::socket(&path).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}
