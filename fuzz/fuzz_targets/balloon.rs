//! The balloon and a driver that offers it anything, through `virtio_devices::Balloon`.
//!
//! Holds to what `fuzz::device` says; a page that a driver gave up is zeros in RAM, and the sizes that the host asks for and sees are
//! no larger than RAM.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::{Balloon, BalloonConfig, BalloonControl};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

const PAGE: u64 = 4096;
/// Pages of RAM.
const PAGES: u16 = 1024;
/// The queue of free pages, whatever the features.
const REPORTING: u16 = 4;

#[derive(Arbitrary, Debug)]
enum Ask {
    Inflate(Vec<u16>),
    Deflate(Vec<u16>),
    Statistics(Vec<(u8, u64)>),
    Report(u16),
}

#[derive(Arbitrary, Debug)]
enum Event {
    Resize(u32),
    AskStatistics,
}

struct Host {
    /// Where pages are given up; not where the queues are.
    ram: Arc<GuestMemoryMmap>,
    control: Option<BalloonControl>,
}

/// Page numbers of a request, at least one.
fn pages(numbers: &[u16]) -> impl Iterator<Item = u16> {
    let first = numbers.is_empty().then_some(0);
    numbers
        .iter()
        .copied()
        .chain(first)
        .map(|page| page % PAGES)
}

fn list(numbers: &[u16]) -> Vec<u8> {
    let bytes = |page| u32::from(page).to_le_bytes();
    pages(numbers).flat_map(bytes).collect()
}

impl Host {
    fn fill(&self, page: u16) {
        let at = GuestAddress(u64::from(page) * PAGE);
        self.ram.write_obj(1u8, at).expect("a page of RAM");
    }

    fn is_empty(&self, page: u16) -> bool {
        let at = GuestAddress(u64::from(page) * PAGE);
        self.ram.read_obj::<u8>(at).expect("a page of RAM") == 0
    }
}

impl Subject for Host {
    type Ask = Ask;
    type Event = Event;

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let config = BalloonConfig {
            id: "balloon".into(),
            ram: u64::from(PAGES) * PAGE,
            deflate_on_oom: true,
            free_page_reporting: true,
            ..BalloonConfig::default()
        };
        let balloon = Balloon::new(config, self.ram.clone()).expect("a balloon");
        self.control = Some(balloon.control());
        Box::new(balloon)
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        let (queue, readable, writable) = match ask {
            Ask::Inflate(numbers) => {
                pages(numbers).for_each(|page| self.fill(page));
                (0, list(numbers), 0)
            }
            Ask::Deflate(numbers) => (1, list(numbers), 0),
            Ask::Statistics(entries) => {
                let mut readable = vec![0];
                for (tag, value) in entries {
                    readable.extend(u16::from(*tag).to_le_bytes());
                    readable.extend(value.to_le_bytes());
                }
                (2, readable, 0)
            }
            Ask::Report(room) => (REPORTING, Vec::new(), u32::from(*room).max(1)),
        };
        (queue, Request { readable, writable })
    }

    fn answers(&self, ask: &Ask) -> bool {
        // Statistics stay with the device.
        !matches!(ask, Ask::Statistics(_))
    }

    fn check(&mut self, ask: &Ask, answer: &[u8]) {
        assert!(answer.is_empty());
        if let Ask::Inflate(numbers) = ask {
            assert!(pages(numbers).all(|page| self.is_empty(page)));
        }
    }

    fn event(&mut self, event: &Event) {
        let Some(control) = &self.control else { return };
        match event {
            Event::Resize(pages) => {
                let size = u64::from(*pages) * PAGE;
                let possible = *pages <= PAGES.into();
                assert_eq!(control.resize(size).is_ok(), possible);
            }
            Event::AskStatistics => control.ask_statistics().expect("an eventfd"),
        }
    }

    fn settled(&mut self) {
        if let Some(control) = &self.control {
            let most = u64::from(PAGES) * PAGE;
            assert!(control.actual() <= most && control.target() <= most);
        }
    }

    fn alive(&mut self, guest: &mut Guest) {
        self.fill(3);
        let readable = list(&[3]);
        guest.ask(
            0,
            &Request {
                readable,
                writable: 0,
            },
        );
        assert!(self.is_empty(3));
    }
}

thread_local! {
    static RAM: Arc<GuestMemoryMmap> = {
        let size = usize::from(PAGES) * PAGE as usize;
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("RAM"))
    };
}

fuzz_target!(|case: Case<Ask, Event>| {
    let ram = RAM.with(Arc::clone);
    run(&case, &mut Host { ram, control: None });
});
