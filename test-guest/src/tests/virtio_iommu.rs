//! The IOMMU (virtio 1.2 §5.13), and a disk behind it whose rings and data have addresses of their own.

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::map::{read, write};
use crate::outcome::Outcome;
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{NEEDS_RESET, PATIENCE, Transport, common, wait_for};
use crate::{dma, line};

const TYPE: u16 = 23;
const DISK: u16 = 2;
/// Feature: the device's addresses are translated.
const F_ACCESS_PLATFORM: u64 = 1 << 33;

const OK: u8 = 0;
const RANGE: u8 = 5;
const NO_ENTRY: u8 = 6;

const READ: u32 = 1;
const WRITE: u32 = 2;

/// The domain of the disk.
const DOMAIN: u32 = 5;
/// How far from where they are the disk sees its rings.
const SHIFT: u64 = 0x12_3456_0000_0000 >> 8;
/// Where the disk sees the pages of its data.
const DATA: u64 = 0x7000_0000;
const PAGE: u64 = 0x1000;

/// The IOMMU, running.
struct Iommu {
    transport: Transport,
    requests: Queue,
    events: Queue,
    buffer: u64,
}

impl Iommu {
    fn open() -> Outcome<Self> {
        let transport = Transport::find(TYPE, 0)?;
        let features = transport.negotiate(u64::MAX >> 34)?;
        same("its features", features & 0x7f, 0b111_0111)?;
        transport.interrupts()?;
        let requests = transport.queue(0, 16, features)?;
        let events = transport.queue(1, 16, features)?;
        transport.go()?;
        let buffer = dma::take(256, 16)?;
        Ok(Self {
            transport,
            requests,
            events,
            buffer,
        })
    }

    /// Asks, with so many bytes of room before the tail; the status.
    fn ask(&mut self, words: &[u32], room: u64) -> Outcome<u8> {
        for (i, word) in words.iter().enumerate() {
            write(self.buffer + i as u64 * 4, *word);
        }
        let answer = self.buffer + 128;
        dma::fill(answer, 128, 0xee);
        let length = (room + 4) as u32;
        let segments = [
            Segment::readable(self.buffer, words.len() as u32 * 4),
            Segment::writable(answer, length),
        ];
        ensure("room", self.requests.add(&segments, false).is_some())?;
        self.requests.kick();
        let used = wait_for(&mut self.requests, false)?;
        same("bytes of the answer", u64::from(used.length), room + 4)?;
        Ok(read(answer + room))
    }

    fn attach(&mut self, endpoint: u32) -> Outcome<u8> {
        self.ask(&[1, DOMAIN, endpoint, 0, 0], 0)
    }

    fn detach(&mut self, endpoint: u32) -> Outcome<u8> {
        self.ask(&[2, DOMAIN, endpoint, 0, 0], 0)
    }

    fn map(&mut self, first: u64, size: u64, physical: u64, flags: u32) -> Outcome<u8> {
        let last = first + size - 1;
        let words = [
            3,
            DOMAIN,
            first as u32,
            (first >> 32) as u32,
            last as u32,
            (last >> 32) as u32,
            physical as u32,
            (physical >> 32) as u32,
            flags,
        ];
        self.ask(&words, 0)
    }

    fn unmap(&mut self, first: u64, size: u64) -> Outcome<u8> {
        let last = first + size - 1;
        let words = [
            4,
            DOMAIN,
            first as u32,
            (first >> 32) as u32,
            last as u32,
            (last >> 32) as u32,
            0,
        ];
        self.ask(&words, 0)
    }

    /// The next fault is this one.
    fn fault(&mut self, reason: u8, flags: u32, endpoint: u32, address: u64) -> Outcome {
        let buffer = dma::take(24, 8)?;
        let segment = [Segment::writable(buffer, 24)];
        ensure("room", self.events.add(&segment, false).is_some())?;
        self.events.kick();
        let used = wait_for(&mut self.events, false)?;
        same("bytes of a fault", u64::from(used.length), 24)?;
        same(
            "its reason",
            u64::from(read::<u8>(buffer)),
            u64::from(reason),
        )?;
        let told: u32 = read(buffer + 4);
        same("its flags", u64::from(told), u64::from(flags))?;
        let told: u32 = read(buffer + 8);
        same("its endpoint", u64::from(told), u64::from(endpoint))?;
        same("its address", read(buffer + 16), address)
    }
}

/// The disk, before DRIVER_OK, with its ring at shifted addresses.
fn disk(transport: &Transport) -> Outcome<Queue> {
    let features = transport.negotiate(F_ACCESS_PLATFORM)?;
    ensure("the disk is behind it", features & F_ACCESS_PLATFORM != 0)?;
    transport.interrupts()?;
    let queue = transport.prepare(0, 16, features)?;
    transport.set_wide(common::QUEUE_DESC, queue.descriptors + SHIFT);
    transport.set_wide(common::QUEUE_DRIVER, queue.available + SHIFT);
    transport.set_wide(common::QUEUE_DEVICE, queue.used + SHIFT);
    transport.enable()?;
    Ok(queue)
}

/// Offers a request for data at an address that the disk sees.
fn request(queue: &mut Queue, kind: u32, sector: u64, data: Segment) -> Outcome<u64> {
    let header = dma::take(32, 16)?;
    write(header, kind);
    write(header + 8, sector);
    write(header + 16, 0xffu8);
    let segments = [
        Segment::readable(header + SHIFT, 16),
        data,
        Segment::writable(header + 16 + SHIFT, 1),
    ];
    ensure("room", queue.add(&segments, false).is_some())?;
    queue.kick();
    Ok(header + 16)
}

fn is_done(queue: &mut Queue, status: u64) -> Outcome {
    wait_for(queue, false)?;
    same("status of the request", u64::from(read::<u8>(status)), 0)
}

fn wants_reset(transport: &Transport) -> Outcome {
    ensure(
        "the disk wants a reset",
        within(PATIENCE, || transport.status() & NEEDS_RESET != 0),
    )
}

/// A disk writes from and reads into pages that lie side by side for it alone; what is not mapped it cannot reach, and we hear of it.
pub fn iommu() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let mut iommu = Iommu::open()?;
        let config = iommu.transport.config;
        ensure("its configuration", config.length >= 40)?;
        same("page sizes", read(config.at), !0xfff)?;
        same("the bypass", u64::from(read::<u8>(config.at + 36)), 1)?;

        let disk_transport = Transport::find(DISK, 0)?;
        let function = disk_transport.function;
        let endpoint = u32::from(function.bus) << 8
            | u32::from(function.device) << 3
            | u32::from(function.function);
        line!("VALUE iommu_endpoint {endpoint}");
        let mut probe = [0u32; 18];
        (probe[0], probe[1]) = (5, endpoint);
        let room = u64::from(read::<u32>(config.at + 32));
        same("status of a probe", u64::from(iommu.ask(&probe, room)?), 0)?;
        let property: u64 = read(iommu.buffer + 128);
        same(
            "the property for interrupts",
            property,
            1 << 32 | 20 << 16 | 1,
        )?;
        same("where they go", read(iommu.buffer + 136), 0xfee0_0000)?;

        let nobody = iommu.attach(0xff00)?;
        same(
            "an endpoint that is not there",
            u64::from(nobody),
            u64::from(NO_ENTRY),
        )?;
        translated(&mut iommu, &disk_transport, endpoint)?;
        disk_transport.reset()?;
        unattached(&mut iommu, &disk_transport, endpoint)
    })
}

fn translated(iommu: &mut Iommu, transport: &Transport, endpoint: u32) -> Outcome {
    let done = |what, status: u8| same(what, u64::from(status), u64::from(OK));
    done("attach", iommu.attach(endpoint)?)?;
    let (start, end) = dma::pool();
    let rings = iommu.map(start + SHIFT, end - start, start, READ | WRITE)?;
    done("map the rings", rings)?;
    // Three pages, in another order than they lie in memory, with one between.
    let pages = dma::take(5 * PAGE, PAGE)?;
    for (at, page) in [(0, 4), (1, 0), (2, 2)] {
        let mapped = iommu.map(DATA + at * PAGE, PAGE, pages + page * PAGE, READ | WRITE)?;
        done("map a page", mapped)?;
        dma::fill(pages + page * PAGE, PAGE, 0x10 + page as u8);
    }
    let mut queue = disk(transport)?;
    transport.go()?;

    // From the middle of the first to that of the last.
    let data = Segment::readable(DATA + 0x200, 2 * PAGE as u32);
    let status = request(&mut queue, 1, 8, data)?;
    is_done(&mut queue, status)?;
    let plain = dma::take(2 * PAGE, PAGE)?;
    let status = request(
        &mut queue,
        0,
        8,
        Segment::writable(plain + SHIFT, 2 * PAGE as u32),
    )?;
    is_done(&mut queue, status)?;
    ensure("the first page's", dma::all(plain, 0xe00, 0x14))?;
    ensure("the second page's", dma::all(plain + 0xe00, PAGE, 0x10))?;
    ensure("the third page's", dma::all(plain + 0x1e00, 0x200, 0x12))?;
    // And back, into them.
    for page in [0, 2, 4] {
        dma::fill(pages + page * PAGE, PAGE, 0);
    }
    let status = request(
        &mut queue,
        0,
        8,
        Segment::writable(DATA + 0x200, 2 * PAGE as u32),
    )?;
    is_done(&mut queue, status)?;
    ensure("before what was read", dma::all(pages + 4 * PAGE, 0x200, 0))?;
    ensure(
        "read, page 1",
        dma::all(pages + 4 * PAGE + 0x200, 0xe00, 0x14),
    )?;
    ensure("read, page 2", dma::all(pages, PAGE, 0x10))?;
    ensure("read, page 3", dma::all(pages + 2 * PAGE, 0x200, 0x12))?;
    ensure("after it", dma::all(pages + 2 * PAGE + 0x200, 0xe00, 0))?;

    let part = iommu.unmap(start + SHIFT, PAGE)?;
    same("unmapping a part", u64::from(part), u64::from(RANGE))?;
    done("unmap", iommu.unmap(DATA + PAGE, PAGE)?)?;
    request(&mut queue, 1, 8, data)?;
    wants_reset(transport)?;
    iommu.fault(2, 0x101, endpoint, DATA + PAGE)
}

/// Without a domain the disk sees all, or nothing, as the configuration says.
fn unattached(iommu: &mut Iommu, transport: &Transport, endpoint: u32) -> Outcome {
    let detached = iommu.detach(endpoint)?;
    same("detach", u64::from(detached), u64::from(OK))?;
    let bypass = iommu.transport.config.at + 36;
    write(bypass, 0u8);
    same("the bypass, off", u64::from(read::<u8>(bypass)), 0)?;
    let queue = disk(transport)?;
    transport.set_status(0xf);
    wants_reset(transport)?;
    iommu.fault(1, 0x101, endpoint, queue.descriptors + SHIFT)?;
    write(bypass, 1u8);
    transport.reset()?;

    let features = transport.negotiate(F_ACCESS_PLATFORM)?;
    let mut queue = transport.queue(0, 16, features)?;
    transport.go()?;
    let buffer = dma::take(0x400, 0x200)?;
    write(buffer, 0u32);
    write(buffer + 8, 8u64);
    let segments = [
        Segment::readable(buffer, 16),
        Segment::writable(buffer + 0x200, 0x200),
        Segment::writable(buffer + 16, 1),
    ];
    ensure("room", queue.add(&segments, false).is_some())?;
    queue.kick();
    is_done(&mut queue, buffer + 16)?;
    ensure(
        "what was written before",
        dma::all(buffer + 0x200, 0x200, 0x14),
    )?;
    ensure("and no fault", !iommu.events.has_used())
}

/// Before anybody drives the IOMMU, the entropy device works with plain addresses.
pub fn bypass() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let transport = Transport::find(4, 0)?;
        let features = transport.negotiate(F_ACCESS_PLATFORM)?;
        ensure("it is behind the IOMMU", features & F_ACCESS_PLATFORM != 0)?;
        let mut queue = transport.queue(0, 16, features)?;
        transport.go()?;
        let buffer = dma::take(64, 64)?;
        let segment = [Segment::writable(buffer, 64)];
        ensure("room", queue.add(&segment, false).is_some())?;
        queue.kick();
        let used = wait_for(&mut queue, false)?;
        same("bytes", u64::from(used.length), 64)?;
        ensure("they are not all zero", !dma::all(buffer, 64, 0))
    })
}
