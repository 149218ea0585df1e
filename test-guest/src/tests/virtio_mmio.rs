//! Virtio devices on memory-mapped registers (virtio 1.2 §4.2), where the DSDT says that they are: entropy, and a disk that may be
//! written. Interrupts come by the I/O APIC.

use super::{ensure, same};
use crate::acpi;
use crate::boot::peek;
use crate::clock::within;
use crate::cpu::{apic, disable_interrupts, enable_interrupts, idt};
use crate::map::{self, read, write};
use crate::outcome::{Outcome, Reason};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, F_EVENT_IDX, F_VERSION_1, FEATURES_OK, PATIENCE, blk,
};
use crate::{dma, line};

const ENTROPY: u32 = 4;
const BLOCK: u32 = 2;
/// The interrupt of whatever device is tried.
const VECTOR: u8 = idt::DEVICE;
const SECTOR: u64 = 512;

/// Offsets of registers (§4.2.2).
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const SHM_LEN: u64 = 0x0b0;
    pub const GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}
use register::*;

/// A page of registers and a line of the I/O APIC; the device is reset and its line masked when this goes.
struct Device {
    page: u64,
    pin: u32,
}

/// Places of the devices `LNRO0005` in the DSDT: each a 32-bit fixed memory range and an extended interrupt (ACPI 6.4 §6.4.3.4,
/// §6.4.3.6), as its `_CRS` has them after its `_HID`.
fn places() -> impl Iterator<Item = (u64, u32)> {
    let dsdt = acpi::rsdp().and_then(|r| acpi::tables(r).find(|t| &t.signature == b"DSDT"));
    let (start, end) = dsdt.map_or((0, 0), |t| (t.address, t.address + u64::from(t.length)));
    let named = move |at: &u64| peek::<[u8; 8]>(*at) == *b"LNRO0005";
    (start..end.saturating_sub(64))
        .filter(named)
        .filter_map(move |at| {
            let range = (at..at + 64).find(|a| peek::<[u8; 3]>(*a) == [0x86, 9, 0])?;
            let interrupt = range + 12;
            (peek::<[u8; 3]>(interrupt) == [0x89, 6, 0])
                .then(|| (u64::from(peek::<u32>(range + 4)), peek(interrupt + 5)))
        })
}

impl Device {
    /// The first device of a type, reset, with its interrupt routed.
    fn find(kind: u32) -> Outcome<Self> {
        for (address, pin) in places() {
            let page = map::device(address, 0x1000).ok_or(Reason("no room to map", address, 0))?;
            let device = Self { page, pin };
            same("magic value", u64::from(device.get(MAGIC)), 0x7472_6976)?;
            same("version", u64::from(device.get(VERSION)), 2)?;
            if device.get(DEVICE_ID) == kind {
                line!("VALUE virtio_mmio_{kind} {address:#x} pin {pin}");
                device.set(STATUS, 0);
                same("status after a reset", u64::from(device.get(STATUS)), 0)?;
                apic::route(pin, VECTOR);
                return Ok(device);
            }
        }
        Err(Reason("no such device in the DSDT", 0, u64::from(kind)))
    }

    fn get(&self, register: u64) -> u32 {
        read(self.page + register)
    }

    fn set(&self, register: u64, value: u32) {
        write(self.page + register, value);
    }

    fn add_status(&self, bits: u8) -> Outcome {
        let status = self.get(STATUS) | u32::from(bits);
        self.set(STATUS, status);
        same("status", u64::from(self.get(STATUS)), u64::from(status))
    }

    /// With all features of the rings and those in `wanted`; sets up queue 0 and lets the device go.
    fn start(&self, wanted: u64) -> Outcome<Queue> {
        self.add_status(ACKNOWLEDGE)?;
        self.add_status(DRIVER)?;
        let offered = |select| {
            self.set(DEVICE_FEATURES_SEL, select);
            u64::from(self.get(DEVICE_FEATURES))
        };
        let offered = offered(0) | offered(1) << 32;
        let features = offered & wanted | offered & F_EVENT_IDX | F_VERSION_1;
        for select in 0..2u32 {
            self.set(DRIVER_FEATURES_SEL, select);
            self.set(DRIVER_FEATURES, (features >> (32 * select)) as u32);
        }
        self.add_status(FEATURES_OK)?;

        self.set(QUEUE_SEL, u32::from(u16::MAX));
        same(
            "a queue that there is not",
            u64::from(self.get(QUEUE_NUM_MAX)),
            0,
        )?;
        self.set(QUEUE_SEL, 0);
        ensure("queue 0 has room", self.get(QUEUE_NUM_MAX) >= 16)?;
        same(
            "queue 0 before it is set up",
            u64::from(self.get(QUEUE_READY)),
            0,
        )?;
        self.set(QUEUE_NUM, 16);
        let queue = Queue::new(0, 16, features & F_EVENT_IDX != 0)?;
        for (at, address) in [
            (QUEUE_DESC, queue.descriptors),
            (QUEUE_DRIVER, queue.available),
            (QUEUE_DEVICE, queue.used),
        ] {
            self.set(at, address as u32);
            self.set(at + 4, (address >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
        same("queue 0 is ready", u64::from(self.get(QUEUE_READY)), 1)?;
        self.add_status(DRIVER_OK)?;
        Ok(queue)
    }

    /// Offers a request, and waits for the interrupt that says it is used; how many bytes the device wrote.
    fn ask(&self, queue: &mut Queue, segments: &[Segment]) -> Outcome<u32> {
        queue.ask_for_interrupt(true);
        let seen = idt::count(VECTOR);
        ensure("the queue has room", queue.add(segments, false).is_some())?;
        self.set(QUEUE_NOTIFY, u32::from(queue.index));
        enable_interrupts();
        let came = within(PATIENCE, || idt::count(VECTOR) != seen && queue.has_used());
        disable_interrupts();
        ensure("the device answers, with an interrupt", came)?;
        same("interrupt status", u64::from(self.get(INTERRUPT_STATUS)), 1)?;
        self.set(INTERRUPT_ACK, 1);
        same("after the ACK", u64::from(self.get(INTERRUPT_STATUS)), 0)?;
        let used = queue.take()?;
        used.map(|used| used.length)
            .ok_or(Reason("nothing was used", 0, 1))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.set(STATUS, 0);
        apic::mask(self.pin);
    }
}

/// Entropy, twice, with a reset in between.
pub fn rng() -> Outcome {
    dma::reset();
    let device = Device::find(ENTROPY)?;
    for select in 0..2 {
        let half = device.get(SHM_LEN + 4 * select);
        same(
            "a shared memory region",
            u64::from(half),
            u64::from(u32::MAX),
        )?;
    }
    let buffer = dma::take(4096, 4096)?;
    for _ in 0..2 {
        dma::fill(buffer, 4096, 0xa5);
        let mut queue = device.start(0)?;
        let written = device.ask(&mut queue, &[Segment::writable(buffer, 64)])?;
        same("bytes", u64::from(written), 64)?;
        ensure("the bytes changed", !dma::all(buffer, 64, 0xa5))?;
        ensure("nothing past the end", dma::all(buffer + 64, 4032, 0xa5))?;
        device.set(STATUS, 0);
        same(
            "queue 0 after a reset",
            u64::from(device.get(QUEUE_READY)),
            0,
        )?;
    }
    Ok(())
}

/// Sectors of the disk are written, made stable and read back.
pub fn blk() -> Outcome {
    dma::reset();
    let device = Device::find(BLOCK)?;
    let generation = device.get(GENERATION);
    let capacity = u64::from(device.get(CONFIG)) | u64::from(device.get(CONFIG + 4)) << 32;
    same(
        "generation",
        u64::from(device.get(GENERATION)),
        u64::from(generation),
    )?;
    line!("VALUE virtio_mmio_sectors {capacity}");
    ensure("the disk has sectors", capacity >= 8)?;
    let mut queue = device.start(blk::F_FLUSH)?;
    let header = dma::take(16, 16)?;
    let status = dma::take(1, 1)?;
    let data = dma::take(2 * SECTOR, 512)?;
    let (length, head) = (2 * SECTOR as u32, Segment::readable(header, 16));
    let end = Segment::writable(status, 1);
    let mut request = |kind: u32, sector: u64, data: Option<Segment>| {
        write(header, kind);
        write(header + 8, sector);
        write(status, 0xff_u8);
        let written = match data {
            Some(data) => device.ask(&mut queue, &[head, data, end])?,
            None => device.ask(&mut queue, &[head, end])?,
        };
        Ok((read::<u8>(status), written))
    };
    let ok = |what, (status, _): (u8, u32)| same(what, u64::from(status), u64::from(blk::OK));
    for (sector, byte) in [(capacity - 2, 0x5a), (0, 0x3c)] {
        dma::fill(data, 2 * SECTOR, byte);
        let written = request(blk::OUT, sector, Some(Segment::readable(data, length)))?;
        ok("writing", written)?;
        ok("making it stable", request(blk::FLUSH, 0, None)?)?;
        dma::fill(data, 2 * SECTOR, 0);
        let done = request(blk::IN, sector, Some(Segment::writable(data, length)))?;
        ok("reading", done)?;
        same("bytes read", u64::from(done.1), 2 * SECTOR + 1)?;
        ensure("what was written", dma::all(data, 2 * SECTOR, byte))?;
    }
    let (past, _) = request(blk::IN, capacity - 1, Some(Segment::writable(data, length)))?;
    same(
        "reading past the end",
        u64::from(past),
        u64::from(blk::IOERR),
    )
}
