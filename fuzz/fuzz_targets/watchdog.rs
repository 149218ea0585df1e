//! The watchdog and a driver that offers it anything, through `virtio_devices::Watchdog`.
//!
//! Holds to what `fuzz::device` says; a writable byte becomes 1, and nothing else is written. The time is over without end.

#![no_main]

use std::sync::Arc;
use std::time::Duration;

use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::Watchdog;
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

struct Signs;

fn sign(readable: u8, writable: u8) -> Request {
    Request {
        readable: vec![readable; usize::from(readable)],
        writable: u32::from(writable).max(1),
    }
}

impl Subject for Signs {
    type Ask = (u8, u8);
    type Event = ();

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let timeout = Duration::from_micros(50);
        Box::new(Watchdog::new("watchdog", timeout, Arc::new(|| {})))
    }

    fn request(&self, ask: &(u8, u8)) -> (u16, Request) {
        (0, sign(ask.0, ask.1))
    }

    fn check(&mut self, _: &(u8, u8), answer: &[u8]) {
        assert_eq!(answer, [1]);
    }

    fn alive(&mut self, guest: &mut Guest) {
        assert_eq!(guest.ask(0, &sign(8, 1)), [1]);
    }
}

fuzz_target!(|case: Case<(u8, u8), ()>| run(&case, &mut Signs));
