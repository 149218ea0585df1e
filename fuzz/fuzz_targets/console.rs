//! The console and a driver that offers it anything, through `virtio_devices::Console`, with a terminal that types, blocks and resizes.
//!
//! Holds to what `fuzz::device` says; what the driver sends is what is printed, and what is typed is what it receives.

#![no_main]

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard};

use arbitrary::Arbitrary;
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::{Console, ConsoleHandle, ConsoleInput};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

#[derive(Arbitrary, Debug)]
enum Ask {
    Receive(u16),
    Send(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Event {
    Type(Vec<u8>),
    /// The screen takes no more, or more again.
    Block(bool),
    /// It takes this many bytes a call at most.
    Slow(u8),
    Resize(u16, u16),
}

#[derive(Default)]
struct Printed {
    bytes: Vec<u8>,
    blocked: bool,
    most: Option<usize>,
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Printed>>);

impl Screen {
    fn printed(&self) -> MutexGuard<'_, Printed> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut printed = self.printed();
        if printed.blocked {
            return Err(ErrorKind::WouldBlock.into());
        }
        let len = bytes.len().min(printed.most.unwrap_or(usize::MAX));
        printed.bytes.extend(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Terminal {
    screen: Screen,
    input: Arc<ConsoleInput>,
    handle: Option<ConsoleHandle>,
}

impl Terminal {
    fn unblock(&self) {
        let mut printed = self.screen.printed();
        (printed.blocked, printed.most) = (false, None);
        drop(printed);
        self.input.output_ready();
    }
}

fn send(bytes: &[u8]) -> Request {
    Request {
        readable: bytes.to_vec(),
        writable: 0,
    }
}

fn room(writable: u32) -> Request {
    Request {
        readable: Vec::new(),
        writable,
    }
}

impl Subject for Terminal {
    type Ask = Ask;
    type Event = Event;

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        self.input = ConsoleInput::new().expect("eventfds");
        let screen = Box::new(self.screen.clone());
        let console = Console::new("console", screen, self.input.clone(), (80, 25));
        let console = console.expect("the input is free");
        self.handle = Some(console.handle());
        Box::new(console)
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        match ask {
            Ask::Receive(bytes) => (RECEIVE, room(u32::from(*bytes).max(1))),
            Ask::Send(bytes) => (TRANSMIT, send(bytes)),
        }
    }

    fn answers(&self, ask: &Ask) -> bool {
        matches!(ask, Ask::Send(_)) && !self.screen.printed().blocked
    }

    fn check(&mut self, ask: &Ask, _answer: &[u8]) {
        if let Ask::Send(bytes) = ask {
            assert!(
                self.screen.printed().bytes.ends_with(bytes),
                "not what was sent"
            );
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Type(bytes) => assert_eq!(self.input.push(bytes), bytes.len()),
            Event::Block(true) => self.screen.printed().blocked = true,
            Event::Block(false) => self.unblock(),
            Event::Slow(most) => self.screen.printed().most = Some(usize::from(*most).max(1)),
            Event::Resize(columns, rows) => {
                if let Some(handle) = &self.handle {
                    handle.resize(*columns, *rows);
                }
            }
        }
    }

    fn alive(&mut self, guest: &mut Guest) {
        self.unblock();
        guest.ask(TRANSMIT, &send(b"still here"));
        assert!(self.screen.printed().bytes.ends_with(b"still here"));
        // What was typed before comes first.
        self.input.push(b"\xff\xfe\xfd");
        let mut received = Vec::new();
        while !received.ends_with(b"\xff\xfe\xfd") {
            received.extend(guest.ask(RECEIVE, &room(4096)));
        }
    }
}

fuzz_target!(|case: Case<Ask, Event>| {
    let input = ConsoleInput::new().expect("eventfds");
    let mut terminal = Terminal {
        screen: Screen::default(),
        input,
        handle: None,
    };
    run(&case, &mut terminal);
});
