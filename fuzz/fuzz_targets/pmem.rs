//! Persistent memory and a driver that offers it anything, through `virtio_devices::Pmem`.
//!
//! Holds to what `fuzz::device` says; a flush is answered with OK, anything else with an error.

#![no_main]

use std::fs::File;

use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::{Pmem, PmemConfig};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

/// Types of requests; 0 is known.
type Ask = u8;

struct Memory {
    file: File,
}

fn request(kind: u32) -> Request {
    Request {
        readable: kind.to_le_bytes().to_vec(),
        writable: 4,
    }
}

impl Subject for Memory {
    type Ask = Ask;
    type Event = ();

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let config = PmemConfig {
            id: "pmem".into(),
            start: 4 << 30,
            size: 2 << 20,
        };
        let file = self.file.try_clone().expect("another descriptor");
        Box::new(Pmem::new(config, Some(file), Box::new(())))
    }

    fn request(&self, kind: &Ask) -> (u16, Request) {
        (0, request((*kind).into()))
    }

    fn check(&mut self, kind: &Ask, answer: &[u8]) {
        assert_eq!(answer, u32::from(*kind != 0).to_le_bytes());
    }

    fn alive(&mut self, guest: &mut Guest) {
        assert_eq!(guest.ask(0, &request(0)), [0; 4]);
    }
}

thread_local! {
    // In memory, so that a flush costs little.
    static FILE: File = tempfile::tempfile_in("/dev/shm").expect("a file");
}

fuzz_target!(|case: Case<Ask, ()>| {
    let file = FILE.with(|file| file.try_clone().expect("another descriptor"));
    run(&case, &mut Memory { file });
});
