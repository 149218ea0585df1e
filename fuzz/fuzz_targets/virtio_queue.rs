//! A virtqueue whose driver writes anything anywhere, through `vm_virtio::DeviceQueue`.
//!
//! Holds to: no panic, no endless loop; a chain that comes out is all in memory, has no more buffers than it may, and reads and writes as
//! many bytes as it says; never more chains in flight than entries; a saved queue goes on where it was.

#![no_main]

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_virtio::{
    Chain, DeviceQueue, Fault, MAX_INDIRECT, Next, Outcome, QueueV1, VirtioInterrupt, feature,
};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of RAM, in two regions that touch in its middle; there is nothing after it.
const RAM: usize = 0x1_0000;
/// The device's limit.
const MOST_ENTRIES: u16 = 256;

thread_local! {
    static MEMORY: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), RAM / 2),
        (GuestAddress(RAM as u64 / 2), RAM / 2),
    ])
    .expect("64 KiB of memory");
    static KICK: Arc<EventFd> = Arc::new(EventFd::new(0).expect("an eventfd"));
}

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    log_size: u8,
    odd_size: Option<u16>,
    descriptors: u16,
    available: u16,
    used: u16,
    high: Option<u32>,
    next_available: u16,
    next_used: u16,
    event_idx: bool,
    indirect: bool,
    /// Memory before anything else.
    memory: &'a [u8],
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Poke(u16, &'a [u8]),
    Describe {
        index: u16,
        address: u32,
        len: u32,
        flags: u8,
        next: u16,
    },
    /// Puts heads into the available ring and moves its index.
    Offer(Vec<u8>),
    Index(u16),
    Serve(Answer),
    Pop,
    Undo,
    Use(u16, u32),
    Notifications(bool),
    Signal,
    Save,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Answer {
    Used(u32),
    InFlight,
    Later,
    Fault,
    Slices(u16),
    Bytes(u8),
}

/// How many there were.
struct Interrupts(AtomicUsize);

impl VirtioInterrupt for Interrupts {
    fn queue(&self, _: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn config_changed(&self) {
        panic!("a queue says that the configuration changed");
    }
}

struct Run<'a> {
    memory: &'a GuestMemoryMmap,
    interrupts: Interrupts,
    queue: DeviceQueue,
    features: u64,
}

impl Run<'_> {
    fn step(&mut self, step: &Step<'_>) -> Result<(), vm_virtio::QueueError> {
        let memory = self.memory;
        let rings = self.queue.state();
        let size = rings.size.max(1);
        match step {
            Step::Poke(at, bytes) => poke(memory, u64::from(*at), bytes),
            Step::Describe {
                index,
                address,
                len,
                flags,
                next,
            } => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&address.to_le_bytes());
                bytes[8..12].copy_from_slice(&len.to_le_bytes());
                bytes[12] = *flags;
                bytes[14..].copy_from_slice(&next.to_le_bytes());
                poke(
                    memory,
                    rings.descriptors + 16 * u64::from(index % size),
                    &bytes,
                );
            }
            Step::Offer(heads) => {
                let mut index: u16 = memory
                    .read_obj(GuestAddress(rings.available + 2))
                    .unwrap_or_default();
                for head in heads {
                    let slot = rings.available + 4 + 2 * u64::from(index % size);
                    poke(memory, slot, &u16::from(*head).to_le_bytes());
                    index = index.wrapping_add(1);
                }
                poke(memory, rings.available + 2, &index.to_le_bytes());
            }
            Step::Index(index) => poke(memory, rings.available + 2, &index.to_le_bytes()),
            Step::Serve(answer) => {
                let turns = Cell::new(0);
                let served = self.queue.serve(memory, &self.interrupts, |chain| {
                    turns.set(turns.get() + 1);
                    handle(memory, size, chain, *answer)
                });
                assert!(turns.get() <= size, "more chains than entries in one turn");
                if served? == Next::Again {
                    assert_eq!(turns.get(), size, "others get their turn too early");
                }
            }
            Step::Pop => {
                let mut chain = Chain::new();
                if self.queue.pop(memory, &mut chain)? {
                    look(memory, size, &chain);
                }
            }
            // The device's own promise: it puts back only what it popped.
            Step::Undo if self.queue.in_flight() > 0 => self.queue.undo_pop(),
            Step::Undo => {}
            Step::Use(head, len) if self.queue.is_served() && self.queue.in_flight() > 0 => {
                self.queue.add_used(memory, *head, *len)?;
            }
            Step::Use(..) => {}
            Step::Notifications(true) => drop(self.queue.enable_notification(memory)?),
            Step::Notifications(false) => self.queue.disable_notification(memory)?,
            Step::Signal => self.queue.signal(memory, &self.interrupts)?,
            Step::Save => {
                let kick = KICK.with(Arc::clone);
                let again = DeviceQueue::new(0, MOST_ENTRIES, &rings, self.features, memory, kick);
                self.queue = again.expect("a queue that was saved can be restored");
                assert_eq!(self.queue.state(), rings, "restored as it was saved");
            }
        }
        Ok(())
    }
}

fn poke(memory: &GuestMemoryMmap, at: u64, bytes: &[u8]) {
    // What does not fit is not written, as with a guest.
    let _ = memory.write_slice(bytes, GuestAddress(at));
}

/// Holds a chain to what it promises.
fn look(memory: &GuestMemoryMmap, size: u16, chain: &Chain) {
    let most = usize::from(size.max(MAX_INDIRECT));
    assert!(
        chain.readable().len() + chain.writable().len() <= most,
        "too many buffers"
    );
    for (buffers, len) in [
        (chain.readable(), chain.readable_len()),
        (chain.writable(), chain.writable_len()),
    ] {
        let sum: u64 = buffers.iter().map(|b| u64::from(b.len)).sum();
        assert_eq!(sum, u64::from(len), "as long as its buffers");
        for buffer in buffers {
            assert!(buffer.len > 0, "an empty buffer");
            assert!(
                memory.check_range(buffer.address, buffer.len as usize),
                "{buffer:?}"
            );
        }
    }
    assert!(
        usize::from(chain.head()) < usize::from(size),
        "head {}",
        chain.head()
    );
}

fn handle(
    memory: &GuestMemoryMmap,
    size: u16,
    chain: &mut Chain,
    answer: Answer,
) -> Result<Outcome, Fault> {
    look(memory, size, chain);
    let (readable, writable) = (chain.readable_len() as usize, chain.writable_len() as usize);
    match answer {
        Answer::Used(written) => return Ok(Outcome::Used(written)),
        Answer::InFlight => return Ok(Outcome::InFlight),
        Answer::Later => return Ok(Outcome::Later),
        Answer::Fault => return Err(Fault::Request("the device does not like it")),
        Answer::Slices(skip) => {
            let skip = usize::from(skip);
            let mut reader = chain.reader(memory);
            let skipped = reader.skip(skip);
            assert_eq!(skipped.is_ok(), skip <= readable, "skips what is there");
            let mut seen = 0;
            reader.slices(reader.left(), |slice| {
                seen += slice.len();
                Ok(())
            })?;
            assert_eq!(seen + if skipped.is_ok() { skip } else { 0 }, readable);
            assert_eq!((reader.left(), reader.done()), (0, readable));
            assert!(reader.slices(1, |_| Ok(())).is_err(), "reads past the end");
        }
        Answer::Bytes(byte) => {
            // What was written is what there is, however many buffers it went through. They may overlap.
            let mut header = [0; 16];
            assert_eq!(
                chain.reader(memory).read(&mut header).is_ok(),
                readable >= 16
            );
            let mut writer = chain.writer(memory);
            let some = writable.min(4096);
            writer.write(&vec![byte; some])?;
            assert_eq!((writer.left(), writer.done()), (writable - some, some));
            assert_eq!(writer.write_obj(0u64).is_ok(), writable - some >= 8);
        }
    }
    Ok(Outcome::Used(chain.writable_len()))
}

fn run(case: &Case<'_>, memory: &GuestMemoryMmap) {
    poke(memory, 0, &[0; RAM]);
    poke(
        memory,
        0,
        case.memory
            .get(..RAM.min(case.memory.len()))
            .unwrap_or_default(),
    );
    let at = |low: u16, align: u64| {
        let high = case.high.map_or(0, |high| u64::from(high) << 16);
        (high | u64::from(low)) & !(align - 1)
    };
    let state = QueueV1 {
        size: case.odd_size.unwrap_or(1 << (case.log_size % 9)),
        ready: true,
        descriptors: at(case.descriptors, 16),
        available: at(case.available, 2),
        used: at(case.used, 4),
        next_available: case.next_available,
        next_used: case.next_used,
        broken: false,
    };
    let mut features = 0;
    if case.event_idx {
        features |= feature::EVENT_IDX;
    }
    if case.indirect {
        features |= feature::INDIRECT_DESC;
    }
    let kick = KICK.with(Arc::clone);
    let Ok(queue) = DeviceQueue::new(0, MOST_ENTRIES, &state, features, memory, kick) else {
        return;
    };
    let mut run = Run {
        memory,
        interrupts: Interrupts(AtomicUsize::new(0)),
        queue,
        features,
    };
    for step in &case.steps {
        fuzz::show(step);
        if run.step(step).is_err() {
            run.queue.set_broken();
        }
        let (in_flight, size) = (run.queue.in_flight(), run.queue.size());
        assert!(
            in_flight <= size,
            "{in_flight} chains of {size} entries in flight"
        );
    }
}

fuzz_target!(|case: Case<'_>| MEMORY.with(|memory| run(&case, memory)));
