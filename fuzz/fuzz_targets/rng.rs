//! The entropy device and a driver that offers it anything, through `virtio_devices::Rng`.
//!
//! Holds to what `fuzz::device` says; an answer is all of the room that there was, up to 64 KiB, and not left as it was.

#![no_main]

use std::path::Path;

use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::Rng;
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

struct Entropy;

/// A request for so many bytes.
fn room(bytes: u16) -> Request {
    Request {
        readable: Vec::new(),
        writable: u32::from(bytes).max(1),
    }
}

impl Subject for Entropy {
    type Ask = u16;
    type Event = ();

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        Box::new(Rng::open("rng", Path::new("/dev/urandom")).expect("a source"))
    }

    fn request(&self, bytes: &u16) -> (u16, Request) {
        (0, room(*bytes))
    }

    fn check(&mut self, bytes: &u16, answer: &[u8]) {
        assert_eq!(answer.len(), usize::from(*bytes).max(1));
        // Once in 2^256 it is wrong.
        assert!(answer.len() < 32 || answer.iter().any(|byte| *byte != answer[0]));
    }

    fn alive(&mut self, guest: &mut Guest) {
        assert_eq!(guest.ask(0, &room(32)).len(), 32);
    }
}

fuzz_target!(|case: Case<u16, ()>| run(&case, &mut Entropy));
