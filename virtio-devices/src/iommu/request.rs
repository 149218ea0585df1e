//! Requests of the driver, read, done and answered (virtio 1.2 §5.13.6).
//!
//! A request is a head of 4 bytes, what its type needs, and in the writable buffers a tail of 4 bytes with the status; PROBE has
//! its properties before the tail.

use vm_memory::GuestMemory;
use vm_virtio::{Chain, Fault, Outcome};

use super::domains::{Domains, MSI};
use super::mappings::Mapping;
use super::state::access;

/// Bytes of properties that PROBE gives.
pub const PROBE_SIZE: u32 = 64;
/// Bytes of a tail.
const TAIL: u32 = 4;
/// The longest request: PROBE, with its reserved bytes.
const LONGEST: usize = 72;

const ATTACH: u8 = 1;
const DETACH: u8 = 2;
const MAP: u8 = 3;
const UNMAP: u8 = 4;
const PROBE: u8 = 5;

/// ATTACH: the domain translates nothing.
const ATTACH_BYPASS: u32 = 1;

const MAP_READ: u32 = 1 << 0;
const MAP_WRITE: u32 = 1 << 1;
const MAP_MMIO: u32 = 1 << 2;

/// Property: a range of addresses that is not to be mapped.
const RESERVED_MEMORY: u16 = 1;
/// Bytes of that property after type and length.
const RESERVED_MEMORY_LEN: u16 = 20;
/// Its kind: message-signalled interrupts.
const KIND_MSI: u8 = 1;

/// What is in the tail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// No such request.
    Unsupported = 2,
    /// A value that cannot be.
    Invalid = 4,
    /// A value out of range.
    Range = 5,
    /// No such domain or endpoint.
    NoEntry = 6,
    /// No room.
    NoMemory = 8,
}

/// Features that change what requests mean.
#[derive(Clone, Copy, Debug, Default)]
pub struct Negotiated {
    /// MAP knows the flag MMIO.
    pub mmio: bool,
    /// ATTACH knows the flag BYPASS.
    pub bypass: bool,
    /// There is PROBE.
    pub probe: bool,
}

/// Does the request in `chain`.
///
/// # Errors
/// There is no room for a tail.
pub fn serve<M: GuestMemory>(
    domains: &mut Domains,
    negotiated: Negotiated,
    memory: &M,
    chain: &Chain,
) -> Result<Outcome, Fault> {
    let Some(before_tail) = chain.writable_len().checked_sub(TAIL) else {
        return Err(Fault::Request("a request has no room for its status"));
    };
    let mut bytes = [0; LONGEST];
    let mut reader = chain.reader(memory);
    let len = reader.left().min(LONGEST);
    let bytes = bytes.get_mut(..len).unwrap_or_default();
    reader.read(bytes)?;

    let mut writer = chain.writer(memory);
    let status = match bytes.first() {
        Some(&PROBE) if negotiated.probe => {
            let status = probe(domains, bytes, before_tail);
            if status == Status::Ok {
                writer.write(&properties())?;
            }
            status
        }
        Some(&ATTACH) => attach(domains, negotiated, bytes),
        Some(&DETACH) => detach(domains, bytes),
        Some(&MAP) => map(domains, negotiated, bytes),
        Some(&UNMAP) => unmap(domains, bytes),
        Some(_) => Status::Unsupported,
        None => Status::Invalid,
    };
    // What is written counts from the start: what a driver finds before the tail is never what was there.
    let zeros = [0; 64];
    let mut left = before_tail as usize - writer.done();
    while left > 0 {
        let now = left.min(zeros.len());
        writer.write(zeros.get(..now).unwrap_or_default())?;
        left -= now;
        if writer.done() >= MOST_ZEROS {
            writer.skip(left)?;
            left = 0;
        }
    }
    writer.write(&[status as u8, 0, 0, 0])?;
    Ok(Outcome::Used(chain.writable_len()))
}

/// No driver gives more room than this: then it is not worth the time.
const MOST_ZEROS: usize = 4096;

/// `N` bytes at `at`.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    field(bytes, at).map(u64::from_le_bytes)
}

/// The reserved bytes of a request are there and 0.
fn reserved(bytes: &[u8], at: usize, len: usize) -> bool {
    let reserved = at.checked_add(len).and_then(|end| bytes.get(at..end));
    reserved.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
}

fn attach(domains: &mut Domains, negotiated: Negotiated, bytes: &[u8]) -> Status {
    let parse = || {
        let flags = u32_at(bytes, 12)?;
        let known = if negotiated.bypass { ATTACH_BYPASS } else { 0 };
        (flags & !known == 0 && reserved(bytes, 16, 4)).then_some(())?;
        Some((
            u32_at(bytes, 4)?,
            u32_at(bytes, 8)?,
            flags & ATTACH_BYPASS != 0,
        ))
    };
    match parse() {
        Some((domain, endpoint, bypass)) => domains.attach(domain, endpoint, bypass),
        None => Status::Invalid,
    }
}

fn detach(domains: &mut Domains, bytes: &[u8]) -> Status {
    let parse = || {
        reserved(bytes, 12, 8).then_some(())?;
        Some((u32_at(bytes, 4)?, u32_at(bytes, 8)?))
    };
    match parse() {
        Some((domain, endpoint)) => domains.detach(domain, endpoint),
        None => Status::Invalid,
    }
}

fn map(domains: &mut Domains, negotiated: Negotiated, bytes: &[u8]) -> Status {
    let parse = || {
        let flags = u32_at(bytes, 32)?;
        let known = MAP_READ | MAP_WRITE | if negotiated.mmio { MAP_MMIO } else { 0 };
        (flags & !known == 0).then_some(())?;
        let mapping = Mapping {
            first: u64_at(bytes, 8)?,
            last: u64_at(bytes, 16)?,
            physical: u64_at(bytes, 24)?,
            access: access(flags & MAP_READ != 0, flags & MAP_WRITE != 0),
        };
        Some((u32_at(bytes, 4)?, mapping))
    };
    match parse() {
        Some((domain, mapping)) => domains.map(domain, mapping),
        None => Status::Invalid,
    }
}

fn unmap(domains: &mut Domains, bytes: &[u8]) -> Status {
    let parse = || {
        reserved(bytes, 24, 4).then_some(())?;
        Some((u32_at(bytes, 4)?, u64_at(bytes, 8)?, u64_at(bytes, 16)?))
    };
    match parse() {
        Some((domain, first, last)) => domains.unmap(domain, first, last),
        None => Status::Invalid,
    }
}

/// PROBE of an endpoint, with `room` bytes for properties.
fn probe(domains: &Domains, bytes: &[u8], room: u32) -> Status {
    match u32_at(bytes, 4) {
        Some(_) if room < PROBE_SIZE || !reserved(bytes, 8, 64) => Status::Invalid,
        Some(endpoint) if domains.has_endpoint(endpoint) => Status::Ok,
        Some(_) => Status::NoEntry,
        None => Status::Invalid,
    }
}

/// What PROBE tells of any endpoint: where its interrupts go. An end of zeros follows.
fn properties() -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[0..2].copy_from_slice(&RESERVED_MEMORY.to_le_bytes());
    bytes[2..4].copy_from_slice(&RESERVED_MEMORY_LEN.to_le_bytes());
    bytes[4] = KIND_MSI;
    bytes[8..16].copy_from_slice(&MSI.start().to_le_bytes());
    bytes[16..24].copy_from_slice(&MSI.end().to_le_bytes());
    bytes
}
