//! The device with outputs that do what a test wants.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use vm_virtio::status;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Descriptor, Guest, Request, TestMemory};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// An output whose other end is the test.
#[derive(Clone)]
struct Screen(Arc<(Mutex<Shown>, Condvar)>);

struct Shown {
    printed: Vec<u8>,
    /// Calls of `write`.
    attempts: usize,
    /// Calls of `flush`.
    flushes: usize,
    /// What the next writes fail with.
    errors: VecDeque<ErrorKind>,
    /// What the next flushes fail with.
    flush_errors: VecDeque<ErrorKind>,
    /// Bytes that it takes before it would block.
    space: usize,
    /// The most that it takes at once.
    piece: usize,
    on_write: Option<Box<dyn FnMut(usize) + Send>>,
}

impl Screen {
    fn new() -> Self {
        let shown = Shown {
            printed: Vec::new(),
            attempts: 0,
            flushes: 0,
            errors: VecDeque::new(),
            flush_errors: VecDeque::new(),
            space: usize::MAX,
            piece: usize::MAX,
            on_write: None,
        };
        Self(Arc::new((Mutex::new(shown), Condvar::new())))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Shown) -> T) -> T {
        f(&mut self.0.0.lock().unwrap())
    }

    fn printed(&self) -> Vec<u8> {
        self.with(|shown| shown.printed.clone())
    }

    /// Waits for a call after which `done`.
    fn wait(&self, what: &str, mut done: impl FnMut(&mut Shown) -> bool) {
        let shown = self.0.0.lock().unwrap();
        let patience = Duration::from_secs(60);
        let (_shown, waited) = self
            .0
            .1
            .wait_timeout_while(shown, patience, |shown| !done(shown))
            .unwrap();
        assert!(!waited.timed_out(), "{what}: waited in vain");
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shown = self.0.0.lock().unwrap();
        shown.attempts += 1;
        self.0.1.notify_all();
        if let Some(error) = shown.errors.pop_front() {
            return Err(error.into());
        }
        let count = bytes.len().min(shown.space).min(shown.piece);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        shown.space -= count;
        let before = shown.printed.len();
        shown.printed.extend(&bytes[..count]);
        if let Some(on_write) = &mut shown.on_write {
            on_write(before);
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut shown = self.0.0.lock().unwrap();
        shown.flushes += 1;
        self.0.1.notify_all();
        match shown.flush_errors.pop_front() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}

fn console(screen: &Screen, input: &Arc<ConsoleInput>) -> Console<TestMemory> {
    Console::new(
        "_console",
        Box::new(screen.clone()),
        input.clone(),
        (80, 25),
    )
    .unwrap()
}

/// A guest at work, its screen and its keyboard.
fn running() -> (Guest, Screen, Arc<ConsoleInput>) {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    let guest = Guest::running(Box::new(console(&screen, &input)));
    (guest, screen, input)
}

fn print(text: &[u8]) -> Request {
    Request {
        readable: text.to_vec(),
        writable: 0,
    }
}

fn room_for(writable: u32) -> Request {
    Request {
        readable: Vec::new(),
        writable,
    }
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

/// The console, asked to print.
struct Printing(Screen);

impl Subject for Printing {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(console(&self.0, &ConsoleInput::new().unwrap()))
    }

    fn queue(&self) -> u16 {
        TRANSMIT
    }

    fn request(&self, n: u32) -> Request {
        print(format!("<{n}{}>", ".".repeat(n as usize * 37 % 300)).as_bytes())
    }

    fn check(&self, n: u32, answer: &[u8]) {
        assert!(answer.is_empty());
        let text = self.request(n).readable;
        self.0.with(|shown| {
            let mut places = shown.printed.windows(text.len());
            let place = places.position(|part| part == text);
            let place = place.expect("it was not printed");
            shown.printed.drain(place..place + text.len());
        });
    }
}

/// The console, asked for input, of which there is plenty.
struct Reading;

impl Subject for Reading {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        let input = ConsoleInput::new().unwrap();
        input.push(&text(ConsoleInput::CAPACITY));
        Box::new(console(&Screen::new(), &input))
    }

    fn queue(&self) -> u16 {
        RECEIVE
    }

    fn request(&self, n: u32) -> Request {
        room_for(1 + n * 37 % 200)
    }

    fn check(&self, n: u32, answer: &[u8]) {
        assert_eq!(answer.len(), self.request(n).writable as usize);
        let follows = |pair: &[u8]| pair[1] == ((u32::from(pair[0]) + 1) % 251) as u8;
        assert!(answer.windows(2).all(follows), "{answer:?}");
    }
}

vm_virtio::conformance!(transmit_queue, Printing(Screen::new()));
vm_virtio::conformance!(receive_queue, Reading);

#[test]
fn what_the_driver_finds() {
    let (guest, ..) = running();
    assert_eq!(guest.core.device_type(), 3);
    assert_eq!(guest.queues.len(), 2);
    assert_eq!(guest.core.registers().features() & 0xff, SIZE | EMERG_WRITE);
    let mut config = [0xee; 12];
    guest.core.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn an_input_is_one_consoles() {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    let first = console(&screen, &input);
    let second = Console::<TestMemory>::new("two", Box::new(screen.clone()), input.clone(), (0, 0));
    let error = second.err().unwrap().to_string();
    assert!(error.contains("\"two\""), "{error}");
    drop(first);
    drop(console(&screen, &input));
}

#[test]
fn input_is_kept_for_the_driver_and_comes_in_order() {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    input.push(b"typed ");
    let mut guest = Guest::new(Box::new(console(&screen, &input)));
    input.push(b"ahead");
    guest.start(u64::MAX);
    assert_eq!(guest.ask(RECEIVE, &room_for(4)), b"type");
    assert_eq!(guest.ask(RECEIVE, &room_for(64)), b"d ahead");

    // Chains that are there before the input is. It is the input that wakes the device.
    guest.offer(RECEIVE, &room_for(3));
    guest.offer(RECEIVE, &room_for(64));
    guest.kick(RECEIVE);
    input.push(b"12345");
    assert_eq!(guest.wait_used(RECEIVE).1, b"123");
    assert_eq!(guest.wait_used(RECEIVE).1, b"45");

    // A reset loses nothing that no driver has received.
    guest.reset();
    input.push(b"later");
    guest.start(u64::MAX);
    assert_eq!(guest.ask(RECEIVE, &room_for(64)), b"later");
}

#[test]
fn a_full_buffer_takes_no_more_and_says_when_it_does() {
    let (mut guest, _, input) = running();
    let all = text(ConsoleInput::CAPACITY + 100);
    assert_eq!(input.push(&all), ConsoleInput::CAPACITY);
    assert_eq!(input.push(b"more"), 0);
    assert!(input.room().read().is_err());

    assert_eq!(guest.ask(RECEIVE, &room_for(50)), all[..50]);
    assert_eq!(input.room().read().unwrap(), 1);
    // It says so once.
    assert_eq!(guest.ask(RECEIVE, &room_for(50)), all[50..100]);
    assert!(input.room().read().is_err());

    // To fill it exactly is to fill it; what was said before is no longer true.
    assert_eq!(input.push(&all[ConsoleInput::CAPACITY..]), 100);
    assert_eq!(guest.ask(RECEIVE, &room_for(1)), all[100..101]);
    assert_eq!(input.push(b"x"), 1);
    assert!(input.room().read().is_err());
    assert_eq!(guest.ask(RECEIVE, &room_for(1)), all[101..102]);
    assert_eq!(input.room().read().unwrap(), 1);
}

#[test]
fn a_long_paste_passes_a_small_buffer_over_pauses_and_moves() {
    const ROOM: usize = 4099;
    let (mut guest, screen, mut input) = running();
    let all = text(5 * ConsoleInput::CAPACITY + 77);
    let mut left = &all[..];
    let mut received = Vec::new();
    for turn in 0_u32.. {
        left = &left[input.push(left)..];
        let chains = input.pending().len().div_ceil(ROOM).min(8);
        if chains == 0 {
            break;
        }
        for _ in 0..chains {
            guest.offer(RECEIVE, &room_for(ROOM as u32));
        }
        guest.kick(RECEIVE);
        if turn % 5 == 1 {
            guest.core.pause().unwrap();
            left = &left[input.push(left)..];
            guest.core.resume().unwrap();
        } else if turn % 5 == 3 {
            input = ConsoleInput::new().unwrap();
            guest = guest.moved_to(|| Box::new(console(&screen, &input)));
            left = &left[input.push(left)..];
            guest.core.resume().unwrap();
        }
        for _ in 0..chains {
            received.extend(guest.wait_used(RECEIVE).1);
        }
        guest.reuse_room();
    }
    assert!(received == all);
}

#[test]
fn another_thread_waits_for_room() {
    let (mut guest, _, input) = running();
    let all = text(4 * ConsoleInput::CAPACITY);
    let typist = {
        let all = all.clone();
        move || {
            let epoll = Epoll::new().unwrap();
            let room = EpollEvent::new(EventSet::IN, 0);
            let fd = input.room().as_raw_fd();
            epoll.ctl(ControlOperation::Add, fd, room).unwrap();
            let mut left = &all[..];
            loop {
                left = &left[input.push(left)..];
                if left.is_empty() {
                    break;
                }
                let mut events = [EpollEvent::default()];
                assert_eq!(epoll.wait(60_000, &mut events).unwrap(), 1, "no room");
            }
        }
    };
    let typist = thread::spawn(typist);
    let mut received = Vec::new();
    while received.len() < all.len() {
        received.extend(guest.ask(RECEIVE, &room_for(10_000)));
        guest.reuse_room();
    }
    typist.join().unwrap();
    assert!(received == all);
}

#[test]
fn output_that_would_block_waits_and_nothing_spins() {
    let (mut guest, screen, input) = running();
    screen.with(|shown| shown.space = 7);
    for part in [&b"hello "[..], b"world", b", and all"] {
        guest.offer(TRANSMIT, &print(part));
    }
    guest.kick(TRANSMIT);
    guest.wait_used(TRANSMIT);
    // One write for each of two chains, and one that would block.
    screen.wait("blocked", |shown| shown.attempts == 3);
    // The device goes on with the rest of its work, and does not try again.
    for _ in 0..3 {
        guest.kick(TRANSMIT);
        input.push(b"x");
        assert_eq!(guest.ask(RECEIVE, &room_for(1)), b"x");
    }
    assert_eq!(screen.with(|shown| shown.attempts), 3);
    assert_eq!(screen.printed(), b"hello w");
    assert_eq!(guest.take_used(TRANSMIT), None);

    // Ready, but only a little.
    screen.with(|shown| shown.space = 2);
    input.output_ready();
    screen.wait("blocked again", |shown| shown.attempts == 5);
    assert_eq!(screen.printed(), b"hello wor");

    screen.with(|shown| shown.space = usize::MAX);
    input.output_ready();
    guest.wait_used(TRANSMIT);
    guest.wait_used(TRANSMIT);
    assert_eq!(screen.printed(), b"hello world, and all");

    // To say so again is harmless.
    input.output_ready();
    guest.ask(TRANSMIT, &print(b"."));
    assert_eq!(screen.printed(), b"hello world, and all.");
}

#[test]
fn a_blocked_output_neither_loses_nor_repeats_over_pause_and_move() {
    let (mut guest, screen, input) = running();
    screen.with(|shown| shown.space = 3);
    guest.offer(TRANSMIT, &print(b"abcdefgh"));
    guest.offer(TRANSMIT, &print(b"ij"));
    guest.kick(TRANSMIT);
    screen.wait("blocked", |shown| shown.attempts == 2);
    guest.core.pause().unwrap();
    screen.with(|shown| shown.space = 2);
    // It was ready while nobody listened.
    input.output_ready();
    guest.core.resume().unwrap();
    screen.wait("blocked", |shown| shown.printed.len() == 5);

    let other = ConsoleInput::new().unwrap();
    let mut guest = guest.moved_to(|| Box::new(console(&screen, &other)));
    assert_eq!(screen.printed(), b"abcde");
    screen.with(|shown| shown.space = usize::MAX);
    guest.core.resume().unwrap();
    guest.wait_used(TRANSMIT);
    guest.wait_used(TRANSMIT);
    assert_eq!(screen.printed(), b"abcdefghij");
}

#[test]
fn a_reset_forgets_half_a_chain() {
    let (mut guest, screen, _) = running();
    screen.with(|shown| shown.space = 3);
    guest.offer(TRANSMIT, &print(b"abcdefgh"));
    guest.kick(TRANSMIT);
    screen.wait("blocked", |shown| shown.attempts == 2);
    guest.reset();
    screen.with(|shown| shown.space = usize::MAX);
    guest.start(u64::MAX);
    guest.ask(TRANSMIT, &print(b"12345678"));
    assert_eq!(screen.printed(), b"abc12345678");
}

#[test]
fn an_output_that_fails_loses_that_chain_only() {
    let (mut guest, screen, _) = running();
    screen.with(|shown| shown.errors = [ErrorKind::BrokenPipe, ErrorKind::Interrupted].into());
    guest.ask(TRANSMIT, &print(b"lost"));
    guest.ask(TRANSMIT, &print(b"kept"));
    assert_eq!(screen.printed(), b"kept");
}

#[test]
fn what_the_output_holds_back_is_flushed_once_a_turn() {
    let (mut guest, screen, input) = running();
    screen.with(|shown| shown.flush_errors = [ErrorKind::WouldBlock].into());
    // All at once.
    guest.core.pause().unwrap();
    for _ in 0..5 {
        guest.offer(TRANSMIT, &print(b"a"));
    }
    guest.core.resume().unwrap();
    for _ in 0..5 {
        guest.wait_used(TRANSMIT);
    }
    screen.wait("a flush that would block", |shown| shown.flushes == 1);
    // What comes meanwhile has to wait.
    guest.offer(TRANSMIT, &print(b"b"));
    guest.kick(TRANSMIT);
    input.push(b"x");
    guest.ask(RECEIVE, &room_for(1));
    assert_eq!(screen.printed(), b"aaaaa");

    input.output_ready();
    guest.wait_used(TRANSMIT);
    screen.wait("a flush", |shown| shown.flushes == 2);
    assert_eq!(screen.printed(), b"aaaaab");
}

#[test]
fn a_huge_chain_leaves_input_and_pause_their_turns() {
    /// Descriptors of 1 MiB each, all the same memory.
    const COUNT: usize = 1000;
    let (mut guest, screen, input) = running();
    let read_at = Arc::new(Mutex::new(None));
    let on_write = {
        let read_at = read_at.clone();
        move |printed| {
            if printed == 0 {
                input.push(b"x");
            } else if input.pending().is_empty() {
                read_at.lock().unwrap().get_or_insert(printed);
            }
        }
    };
    screen.with(|shown| {
        // So slow that the whole takes minutes.
        shown.piece = 1;
        shown.on_write = Some(Box::new(on_write));
    });
    guest.offer(RECEIVE, &room_for(1));
    let table = guest.room(16 * COUNT);
    let buffers = [Descriptor::readable(0, 1 << 20); COUNT];
    let head = guest.queues[usize::from(TRANSMIT)].add_indirect(table, &buffers);
    guest.expect_answer(TRANSMIT, head.unwrap(), 0);
    guest.kick(TRANSMIT);
    assert_eq!(guest.wait_used(RECEIVE).1, b"x");
    screen.wait("more output", |_| read_at.lock().unwrap().is_some());
    guest.core.pause().unwrap();
    assert_eq!(guest.take_used(TRANSMIT), None);
    // Two turns more if notifications of both queues came just before it.
    let read_at = read_at.lock().unwrap().unwrap();
    assert!(read_at <= 3 * (64 << 10), "{read_at}");
    guest.reset();
}

#[test]
fn emergency_output_needs_no_driver() {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    let mut guest = Guest::new(Box::new(console(&screen, &input)));
    guest.core.write_config(8, &u32::from(b'!').to_le_bytes());
    assert_eq!(screen.printed(), b"!");
    // It neither waits nor upsets the chain that does.
    guest.start(u64::MAX);
    screen.with(|shown| shown.space = 2);
    guest.offer(TRANSMIT, &print(b"abc"));
    guest.kick(TRANSMIT);
    screen.wait("blocked", |shown| shown.attempts == 3);
    guest.core.write_config(8, b"?");
    screen.with(|shown| shown.space = usize::MAX);
    guest.core.write_config(8, b"#");
    guest.core.write_config(4, b"-");
    input.output_ready();
    guest.wait_used(TRANSMIT);
    assert_eq!(screen.printed(), b"!ab#c");
}

fn size(guest: &Guest) -> [u8; 4] {
    let mut size = [0; 4];
    guest.core.read_config(0, &mut size);
    size
}

#[test]
fn a_resize_reaches_the_driver() {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    let console = console(&screen, &input);
    let handle = console.handle();
    let mut guest = Guest::running(Box::new(console));
    let generation = guest.core.config_generation();
    handle.resize(80, 25);
    assert_eq!(guest.interrupt.config_count(), 0);
    handle.resize(132, 300);
    assert_eq!(guest.interrupt.config_count(), 1);
    assert_eq!(size(&guest), [132, 0, 44, 1]);
    assert_ne!(guest.core.config_generation(), generation);

    // Told once, when it goes on; not at all if it is as it was.
    guest.core.pause().unwrap();
    handle.resize(90, 30);
    handle.resize(100, 30);
    assert_eq!(guest.interrupt.config_count(), 1);
    guest.core.resume().unwrap();
    assert_eq!(guest.interrupt.config_count(), 2);
    guest.core.pause().unwrap();
    handle.resize(90, 30);
    handle.resize(100, 30);
    guest.core.resume().unwrap();
    assert_eq!(guest.interrupt.config_count(), 2);

    // A driver without the feature is not told, nor one that reads it all anew.
    guest.reset();
    guest.start(!SIZE);
    handle.resize(1, 2);
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(guest.interrupt.config_count(), 2);
    assert_eq!(size(&guest), [1, 0, 2, 0]);
}

#[test]
fn a_restored_driver_hears_of_another_size() {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    let device = console(&screen, &input);
    let handle = device.handle();
    let mut guest = Guest::running(Box::new(device));
    guest.core.pause().unwrap();
    // The driver did not hear of this before it was saved.
    handle.resize(60, 20);
    let others = ConsoleInput::new().unwrap();
    let other = Console::new("_console", Box::new(screen), others, (60, 20)).unwrap();
    let mut guest = guest.moved_to(|| Box::new(other));
    guest.core.resume().unwrap();
    assert_eq!(guest.interrupt.config_count(), 1);
    assert_eq!(size(&guest), [60, 0, 20, 0]);
}

#[test]
fn the_saved_form() {
    let (screen, input) = (Screen::new(), ConsoleInput::new().unwrap());
    let mut device = console(&screen, &input);
    input.push(b"ls");
    let saved = device.save("_console").unwrap();
    assert_eq!((&*saved.kind, saved.version), ("virtio-console", 1));
    let golden = br#"{"columns":80,"rows":25,"input":[108,115],"sent":0}"#;
    assert_eq!(saved.data, golden);

    // What was pushed before a restore comes after what was saved.
    device.restore(&saved).unwrap();
    assert_eq!(input.pending(), b"lsls");
    let mut state = ConsoleV1 {
        input: text(ConsoleInput::CAPACITY),
        sent: u32::MAX,
        ..ConsoleV1::default()
    };
    device
        .restore(&Section::encode("_console", &state).unwrap())
        .unwrap();
    assert!(input.pending() == state.input);
    state.input.push(0);
    let error = device.restore(&Section::encode("_console", &state).unwrap());
    assert!(matches!(error, Err(MigrationError::TooLong { .. })));

    // A place past the end of the chain is its end.
    let mut guest = Guest::running(Box::new(device));
    guest.ask(TRANSMIT, &print(b"printed before"));
    guest.ask(TRANSMIT, &print(b"printed now"));
    assert_eq!(screen.printed(), b"printed now");
}

#[test]
fn a_fault_in_one_queue_ends_that_one() {
    let (mut guest, screen, input) = running();
    guest.queues[usize::from(TRANSMIT)].offer(u16::MAX);
    guest.kick(TRANSMIT);
    guest.wait_needs_reset();
    input.push(b"x");
    assert_eq!(guest.ask(RECEIVE, &room_for(1)), b"x");
    input.output_ready();
    guest.reset();
    guest.start(u64::MAX);
    assert_eq!(guest.core.registers().status() & status::NEEDS_RESET, 0);
    guest.ask(TRANSMIT, &print(b"again"));
    assert_eq!(screen.printed(), b"again");
}
