//! The IOMMU, a driver that asks it anything, and a device behind it, through `virtio_devices::iommu`.
//!
//! Holds to what `fuzz::device` says, and to this: what is mapped is aligned, in range and no interrupt's; a range that a device behind it may
//! reach has slices of just its length, whatever the driver does at the time, and one that it may not has none; after a reset a
//! mapping is seen, and nothing besides it.

#![no_main]

use arbitrary::Arbitrary;
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::iommu::{EndpointMemory, Iommu, IommuControl};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory, memory};

/// Endpoints that are there.
const ENDPOINTS: [u32; 2] = [8, 16];
const REQUESTS: u16 = 0;
const EVENTS: u16 = 1;

/// What a driver asks. Numbers are small, so that they meet.
#[derive(Arbitrary, Debug)]
enum Ask {
    Attach {
        domain: u8,
        endpoint: u8,
        flags: u8,
    },
    Detach {
        domain: u8,
        endpoint: u8,
    },
    Map {
        domain: u8,
        first: Place,
        last: Place,
        physical: Place,
        flags: u8,
    },
    Unmap {
        domain: u8,
        first: Place,
        last: Place,
    },
    Probe(u8),
    Any(Vec<u8>, u8),
    Event(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    /// The first byte of a page.
    Page(u8),
    /// The last one.
    End(u8),
    Any(u64),
}

impl Place {
    fn get(self) -> u64 {
        match self {
            Self::Page(page) => u64::from(page) << 12,
            Self::End(page) => (u64::from(page) << 12) + 0xfff,
            Self::Any(place) => place,
        }
    }
}

/// A device behind it looks.
#[derive(Arbitrary, Debug)]
struct Look {
    endpoint: bool,
    at: Place,
    len: u16,
    write: bool,
}

struct Translation {
    control: Option<IommuControl>,
    ram: TestMemory,
}

impl Ask {
    fn request(&self) -> (u16, Request) {
        let mut bytes = Vec::new();
        let mut word = |word: u32| bytes.extend_from_slice(&word.to_le_bytes());
        let mut writable = 4;
        match self {
            Self::Attach {
                domain,
                endpoint,
                flags,
            } => {
                [
                    1,
                    u32::from(*domain),
                    u32::from(*endpoint),
                    u32::from(*flags),
                    0,
                ]
                .into_iter()
                .for_each(word);
            }
            Self::Detach { domain, endpoint } => {
                [2, u32::from(*domain), u32::from(*endpoint), 0, 0]
                    .into_iter()
                    .for_each(word);
            }
            Self::Map {
                domain,
                first,
                last,
                physical,
                flags,
            } => {
                word(3);
                word((*domain).into());
                for place in [first, last, physical].map(|place| place.get()) {
                    word(place as u32);
                    word((place >> 32) as u32);
                }
                word((*flags).into());
            }
            Self::Unmap {
                domain,
                first,
                last,
            } => {
                word(4);
                word((*domain).into());
                for place in [first, last].map(|place| place.get()) {
                    word(place as u32);
                    word((place >> 32) as u32);
                }
                word(0);
            }
            Self::Probe(endpoint) => {
                word(5);
                word((*endpoint).into());
                [0; 16].into_iter().for_each(word);
                writable = 68;
            }
            Self::Any(any, room) => {
                bytes.extend_from_slice(any);
                writable = u32::from(*room).max(4);
            }
            Self::Event(room) => {
                return (
                    EVENTS,
                    Request {
                        readable: Vec::new(),
                        writable: u32::from(*room).max(24),
                    },
                );
            }
        }
        (
            REQUESTS,
            Request {
                readable: bytes,
                writable,
            },
        )
    }
}

impl Subject for Translation {
    type Ask = Ask;
    type Event = Look;

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let iommu = Iommu::new("iommu").expect("an eventfd");
        let control = iommu.control();
        for endpoint in ENDPOINTS {
            control.endpoint(endpoint);
        }
        self.control = Some(control);
        Box::new(iommu)
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        ask.request()
    }

    fn answers(&self, ask: &Ask) -> bool {
        !matches!(ask, Ask::Event(_))
    }

    fn check(&mut self, ask: &Ask, answer: &[u8]) {
        let known = |status: &u8| [0, 2, 4, 5, 6, 8].contains(status);
        let at = answer.len() - 4;
        assert!(
            known(&answer[at]) && answer[at + 1..] == [0; 3],
            "{answer:?}"
        );
        if let Ask::Attach { endpoint, .. } | Ask::Detach { endpoint, .. } = ask
            && !ENDPOINTS.contains(&u32::from(*endpoint))
        {
            assert_ne!(answer[at], 0, "an endpoint that is not there");
        }
        if let Ask::Map {
            first,
            last,
            physical,
            ..
        } = ask
            && answer[at] == 0
        {
            let (first, last) = (first.get(), last.get());
            assert!(first < last && first % 4096 == 0 && last % 4096 == 4095 && last < 1 << 48);
            assert_eq!(physical.get() % 4096, 0);
            assert!(
                last < 0xfee0_0000 || first > 0xfeef_ffff,
                "interrupts are mapped"
            );
        }
    }

    fn event(&mut self, look: &Look) {
        let Some(control) = &self.control else {
            return;
        };
        let endpoint = control.endpoint(ENDPOINTS[usize::from(look.endpoint)]);
        let seen = EndpointMemory::translated(self.ram.clone(), endpoint).memory();
        let access = if look.write {
            Permissions::Write
        } else {
            Permissions::Read
        };
        let (address, len) = (GuestAddress(look.at.get()), usize::from(look.len));
        let reached = seen.check_range(address, len, access);
        let slices = seen.get_slices(address, len, access);
        let sum = slices.map(|mut slices| {
            slices.try_fold(0, |sum, slice| slice.map(|slice| sum + slice.len()))
        });
        // Both say the same, and all that is reached is there.
        assert_eq!(reached, matches!(sum, Ok(Ok(_))), "{look:?}");
        if let (true, Ok(Ok(sum))) = (reached, sum) {
            assert_eq!(sum, len);
        }
    }

    fn alive(&mut self, guest: &mut Guest) {
        let domain = 77;
        let ask = |ask: Ask| ask.request().1;
        for request in [
            ask(Ask::Attach {
                domain,
                endpoint: 8,
                flags: 0,
            }),
            ask(Ask::Map {
                domain,
                first: Place::Page(5),
                last: Place::End(5),
                physical: Place::Page(1),
                flags: 3,
            }),
        ] {
            assert_eq!(guest.ask(REQUESTS, &request), [0; 4]);
        }
        let control = self.control.as_ref().expect("there is a device");
        let seen = EndpointMemory::translated(self.ram.clone(), control.endpoint(8)).memory();
        let can = |page: u64| seen.check_range(GuestAddress(page << 12), 4096, Permissions::Write);
        assert!(!can(4) && can(5) && !can(6));
    }
}

thread_local! {
    static RAM: TestMemory = memory();
}

fuzz_target!(|case: Case<Ask, Look>| {
    let ram = RAM.with(TestMemory::clone);
    run(&case, &mut Translation { control: None, ram });
});
