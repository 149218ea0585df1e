//! The device with a driver of its own, and what a device behind it sees.

mod behind;
mod hostile;

use vm_virtio::VirtioDevice;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Guest, Request, TestMemory};

use super::domains::MAX_MAPPINGS;
use super::*;

/// Endpoints that are there.
const ENDPOINTS: [u32; 2] = [0x10, 0x18];
const PAGE: u64 = 0x1000;

const OK: u8 = 0;
const UNSUPPORTED: u8 = 2;
const INVALID: u8 = 4;
const RANGE: u8 = 5;
const NO_ENTRY: u8 = 6;
const NO_MEMORY: u8 = 8;

const READ: u32 = 1;
const WRITE: u32 = 2;

/// A request with its tail.
fn plain(words: &[u32]) -> Request {
    Request {
        readable: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        writable: 4,
    }
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn attach(domain: u32, endpoint: u32, flags: u32) -> Request {
    plain(&[1, domain, endpoint, flags, 0])
}

fn detach(domain: u32, endpoint: u32) -> Request {
    plain(&[2, domain, endpoint, 0, 0])
}

fn map(domain: u32, first: u64, last: u64, physical: u64, flags: u32) -> Request {
    let [f0, f1] = halves(first);
    let [l0, l1] = halves(last);
    let [p0, p1] = halves(physical);
    plain(&[3, domain, f0, f1, l0, l1, p0, p1, flags])
}

fn unmap(domain: u32, first: u64, last: u64) -> Request {
    let [f0, f1] = halves(first);
    let [l0, l1] = halves(last);
    plain(&[4, domain, f0, f1, l0, l1, 0])
}

fn probe(endpoint: u32) -> Request {
    let mut words = vec![5, endpoint];
    words.resize(18, 0);
    Request {
        writable: 68,
        ..plain(&words)
    }
}

fn device() -> (Box<dyn VirtioDevice<TestMemory>>, IommuControl) {
    let iommu = Iommu::new("iommu").unwrap();
    let control = iommu.control();
    for endpoint in ENDPOINTS {
        control.endpoint(endpoint);
    }
    (Box::new(iommu), control)
}

fn running() -> (Guest, IommuControl) {
    let (device, control) = device();
    (Guest::running(device), control)
}

/// The status of a request that has nothing but that.
fn ask(guest: &mut Guest, request: &Request) -> u8 {
    let answer = guest.ask(REQUESTS, request);
    assert_eq!(answer[1..], [0; 3]);
    answer[0]
}

fn bypass(guest: &mut Guest, bypass: u8) {
    guest.core.write_config(BYPASS as u64, &[bypass]);
}

fn saved(guest: &mut Guest) -> IommuV1 {
    guest.core.pause().unwrap();
    let [_, section] = guest.core.save("iommu").unwrap();
    guest.core.resume().unwrap();
    section.decode().unwrap()
}

struct Requests;

impl Subject for Requests {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        device().0
    }

    /// Attaching is the same however often it is done.
    fn request(&self, n: u32) -> Request {
        match n % 3 {
            0 => attach(n % 2, ENDPOINTS[n as usize % 2], 0),
            1 => probe(ENDPOINTS[n as usize % 2]),
            _ => plain(&[77, n]),
        }
    }

    fn check(&self, n: u32, answer: &[u8]) {
        match n % 3 {
            0 => assert_eq!(answer, [0; 4]),
            1 => {
                // The suite also takes no feature but VERSION_1.
                let seen = (answer.len(), answer[0], answer[64]);
                assert!(
                    [(68, 1, OK), (68, 0, UNSUPPORTED)].contains(&seen),
                    "{seen:?}"
                );
            }
            _ => assert_eq!(answer, [UNSUPPORTED, 0, 0, 0]),
        }
    }
}

vm_virtio::conformance!(conformance, Requests);

#[test]
fn the_configuration_tells_what_there_is() {
    let (guest, _) = running();
    let mut config = [0; CONFIG_LEN];
    guest.core.read_config(0, &mut config);
    let number = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!(number(0), !0xfff);
    assert_eq!((number(8), number(16)), (0, (1 << 48) - 1));
    assert_eq!(number(24), 0xffff << 32);
    assert_eq!(config[32..], [64, 0, 0, 0, 1, 0, 0, 0]);
    let features = guest.core.registers().features();
    assert_eq!(features & 0x7f, 0b111_0111);
}

#[test]
fn probing_tells_where_interrupts_go() {
    let (mut guest, _) = running();
    let answer = guest.ask(REQUESTS, &probe(ENDPOINTS[1]));
    let mut expected = vec![1, 0, 20, 0, 1, 0, 0, 0];
    expected.extend(0xfee0_0000u64.to_le_bytes());
    expected.extend(0xfeef_ffffu64.to_le_bytes());
    expected.resize(68, 0);
    assert_eq!(answer, expected);

    let mut nobody = vec![0; 68];
    nobody[64] = NO_ENTRY;
    assert_eq!(guest.ask(REQUESTS, &probe(0x20)), nobody);
    let short = Request {
        writable: 30,
        ..probe(ENDPOINTS[0])
    };
    let mut refused = vec![0; 30];
    refused[26] = INVALID;
    assert_eq!(guest.ask(REQUESTS, &short), refused);
    let mut odd = probe(ENDPOINTS[0]);
    odd.readable[71] = 1;
    assert_eq!(guest.ask(REQUESTS, &odd)[64], INVALID);
}

#[test]
fn endpoints_come_into_domains_and_out() {
    let (mut guest, control) = running();
    let mut status = |request: &Request| ask(&mut guest, request);
    assert_eq!(status(&attach(1, 0x20, 0)), NO_ENTRY);
    assert_eq!(status(&attach(0x1_0000, 0x10, 0)), RANGE);
    assert_eq!(status(&attach(1, 0x10, 2)), INVALID);
    assert_eq!(status(&plain(&[1, 1, 0x10, 0, 9])), INVALID);
    assert_eq!(status(&detach(1, 0x10)), INVALID);
    assert_eq!(status(&detach(1, 0x20)), NO_ENTRY);
    assert_eq!(status(&map(1, 0, 0xfff, 0, READ)), NO_ENTRY);
    assert_eq!(status(&unmap(1, 0, 0xfff)), NO_ENTRY);

    assert_eq!(status(&attach(1, 0x10, 0)), OK);
    assert_eq!(status(&attach(1, 0x10, 0)), OK);
    assert_eq!(status(&attach(1, 0x18, 1)), INVALID, "it is no bypass");
    assert_eq!(status(&map(1, 0, 0xfff, 0, READ)), OK);
    assert_eq!(status(&detach(2, 0x10)), INVALID);
    assert_eq!(status(&attach(1, 0x18, 0)), OK);
    assert_eq!(status(&detach(1, 0x10)), OK);
    // The other one keeps the domain.
    assert_eq!(status(&map(1, 0, 0xfff, 0, READ)), INVALID);
    assert_eq!(status(&attach(2, 0x18, 1)), OK);
    assert_eq!(status(&map(1, 0, 0xfff, 0, READ)), NO_ENTRY);
    assert_eq!(status(&map(2, 0, 0xfff, 0, READ)), INVALID, "a bypass");
    assert_eq!(status(&unmap(2, 0, 0xfff)), INVALID);
    assert_eq!(status(&attach(2, 0x10, 0)), INVALID, "a bypass");
    control.remove(0x18);
    assert_eq!(status(&attach(1, 0x18, 0)), NO_ENTRY);
    assert_eq!(status(&attach(2, 0x10, 0)), OK, "nobody was left in it");
}

#[test]
fn mappings_that_cannot_be() {
    let (mut guest, _) = running();
    assert_eq!(ask(&mut guest, &attach(0, 0x10, 0)), OK);
    let end = 1u64 << 48;
    for (request, expected) in [
        (map(0, 0x1000, 0x1fff, 0x5000, READ | WRITE | 4), OK),
        (map(0, 0x1000, 0x1fff, 0x9000, READ), INVALID),
        (map(0, 0, 0x2fff, 0, READ), INVALID),
        (map(0, 0x1000, 0xfff, 0, READ), INVALID),
        (map(0, 0x5000, 0x2fff, 0, READ), INVALID),
        (map(0, 0x2000, 0x2fff, 0, 8), INVALID),
        (map(0, 0x2001, 0x2fff, 0, READ), RANGE),
        (map(0, 0x2000, 0x2ffe, 0, READ), RANGE),
        (map(0, 0x2000, 0x2fff, 5, READ), RANGE),
        (map(0, end - PAGE, end - 1, 0, READ), OK),
        (map(0, end, end + 0xfff, 0, READ), RANGE),
        (map(0, !0xfff, u64::MAX, 0, READ), RANGE),
        (map(0, 0x4000, 0x5fff, !0xfff, READ), RANGE),
        (map(0, 0xfee0_1000, 0xfee0_1fff, 0, READ), INVALID),
        (map(0, 0xfed0_0000, 0xfeff_ffff, 0, READ), INVALID),
        (map(0, 0xfef0_0000, 0xfef0_0fff, 0, READ), OK),
        // Half of it.
        (map(0, 0x1_0000, 0x1_3fff, 0, READ), OK),
        (unmap(0, 0x1_0000, 0x1_1fff), RANGE),
        (unmap(0, 0x1_2000, 0x2_0000), RANGE),
        (unmap(0, 0x2000, 0xffff), OK),
        (unmap(0, 0x5000, 0x4fff), INVALID),
        (unmap(0, 0x1000, 0x1_3fff), OK),
        (unmap(0, 0, u64::MAX), OK),
        (unmap(0, 0, u64::MAX), OK),
    ] {
        assert_eq!(ask(&mut guest, &request), expected, "{request:x?}");
    }
    assert_eq!(saved(&mut guest).domains[0].mappings, Some(Vec::new()));
}

#[test]
fn mappings_are_bounded() {
    let (_, control) = device();
    let mut domains = control.0.domains();
    for (domain, endpoint) in (0..).zip(ENDPOINTS) {
        assert_eq!(domains.attach(domain, endpoint, false) as u8, OK);
    }
    let page = |n: usize| {
        let first = n as u64 * PAGE;
        mappings::Mapping {
            first,
            last: first + PAGE - 1,
            physical: 0,
            access: Permissions::Read,
        }
    };
    let domain = |n: usize| (n % 2) as u32;
    for n in 0..MAX_MAPPINGS {
        assert_eq!(domains.map(domain(n), page(n)) as u8, OK);
    }
    assert_eq!(domains.map(0, page(MAX_MAPPINGS)) as u8, NO_MEMORY);
    assert_eq!(domains.map(1, page(MAX_MAPPINGS)) as u8, NO_MEMORY);
    assert_eq!(domains.unmap(0, 0, PAGE - 1) as u8, OK);
    assert_eq!(domains.map(1, page(MAX_MAPPINGS)) as u8, OK);
}

#[test]
fn state_survives_and_is_checked() {
    let (mut guest, _) = running();
    bypass(&mut guest, 0);
    for request in [
        attach(3, 0x10, 0),
        attach(9, 0x18, 1),
        map(3, 0x1000, 0x3fff, 0x8000, READ),
        map(3, 0x8000, 0x8fff, 0x1000, WRITE),
    ] {
        assert_eq!(ask(&mut guest, &request), OK);
    }
    let state = saved(&mut guest);
    let mut there = guest.moved_to(|| device().0);
    there.core.resume().unwrap();
    assert_eq!(saved(&mut there), state);
    assert_eq!(ask(&mut there, &unmap(3, 0x1000, 0x3fff)), OK);

    let (_, control) = device();
    for (change, wrong) in [
        (
            &(|s: &mut IommuV1| s.attached[0].1 = 7) as &dyn Fn(&mut IommuV1),
            "an endpoint in a domain that is not there",
        ),
        (
            &|s| s.attached[0].0 = 0x99,
            "an endpoint that is not there, or is in two domains",
        ),
        (&|s| s.attached.truncate(1), "a domain without endpoints"),
        (
            &|s| s.domains[0].mappings.as_mut().unwrap()[0].last = 5,
            "a mapping that cannot be",
        ),
        (
            &|s| {
                let mappings = s.domains[0].mappings.as_mut().unwrap();
                mappings.push(mappings[0]);
            },
            "a mapping that cannot be",
        ),
    ] {
        let mut state = state.clone();
        change(&mut state);
        let mut domains = control.0.domains();
        assert_eq!(domains.restore(&state), Err(wrong));
        assert_eq!(domains.save().attached, []);
    }
    assert_eq!(control.0.domains().restore(&state), Ok(()));
}

#[test]
fn a_reset_keeps_the_bypass_alone() {
    let (mut guest, _) = running();
    bypass(&mut guest, 0);
    // What is neither on nor off changes nothing.
    bypass(&mut guest, 2);
    assert_eq!(ask(&mut guest, &attach(3, 0x10, 0)), OK);
    guest.reset();
    guest.start(u64::MAX);
    let expected = IommuV1 {
        bypass: false,
        domains: Vec::new(),
        attached: Vec::new(),
    };
    assert_eq!(saved(&mut guest), expected);
}
