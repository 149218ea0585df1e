//! What a console's driver receives: a bounded buffer between whoever has input and the device's thread.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemory;
use vm_migration::MigrationError;
use vm_virtio::{Chain, Fault, Outcome};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The host's end of a console: where its input goes, and what it hears of. Any thread may use it, at any time: input is kept
/// until a driver receives it.
#[derive(Debug)]
pub struct ConsoleInput {
    buffer: Mutex<Buffer>,
    /// A console has it.
    claimed: AtomicBool,
    /// The buffer is no longer empty.
    arrived: EventFd,
    /// The output takes bytes again.
    output_ready: EventFd,
    /// The buffer is no longer full.
    room: EventFd,
}

#[derive(Debug, Default)]
struct Buffer {
    /// At most [`ConsoleInput::CAPACITY`].
    bytes: VecDeque<u8>,
    /// A push filled it: the next to take bytes out says that there is room.
    filled: bool,
    /// `room` may be readable.
    room_said: bool,
}

/// Makes `event` readable.
fn signal(event: &EventFd) {
    // Fails only once the counter is 2^64 - 2, and is readable then.
    let _ = event.write(1);
}

/// Makes `event` unreadable.
pub(super) fn clear(event: &EventFd) {
    // Fails only if it is already.
    let _ = event.read();
}

impl ConsoleInput {
    /// Bytes that it keeps.
    pub const CAPACITY: usize = 64 << 10;

    /// Without input yet. One console can be made with it.
    ///
    /// # Errors
    /// The kernel gave no eventfd.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            buffer: Mutex::default(),
            claimed: AtomicBool::new(false),
            arrived: EventFd::new(EFD_NONBLOCK)?,
            output_ready: EventFd::new(EFD_NONBLOCK)?,
            room: EventFd::new(EFD_NONBLOCK)?,
        }))
    }

    fn buffer(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes` from their start, as many as fit, and says how many.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut buffer = self.buffer();
        let space = Self::CAPACITY.saturating_sub(buffer.bytes.len());
        let (taken, _) = bytes.split_at(space.min(bytes.len()));
        if buffer.bytes.is_empty() && !taken.is_empty() {
            signal(&self.arrived);
        }
        buffer.bytes.extend(taken);
        buffer.filled = buffer.bytes.len() >= Self::CAPACITY;
        if std::mem::take(&mut buffer.room_said) {
            clear(&self.room);
        }
        taken.len()
    }

    /// Readable from when a buffer that [`push`](Self::push) filled has room again, until it is read, or the next `push`. Does not
    /// block.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// The output of the console takes bytes again after it said that it would block. Harmless if it never said so, or if
    /// no console is at work.
    pub fn output_ready(&self) {
        signal(&self.output_ready);
    }

    /// Readable once [`output_ready`](Self::output_ready) was called.
    pub(super) fn output_event(&self) -> &EventFd {
        &self.output_ready
    }

    /// Readable once there is input in a buffer that had none.
    pub(super) fn arrival_event(&self) -> &EventFd {
        &self.arrived
    }

    /// Makes it a console's. False if it is one's already.
    pub(super) fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::AcqRel)
    }

    /// Lets another console have it.
    pub(super) fn release(&self) {
        self.claimed.store(false, Ordering::Release);
    }

    /// Moves what fits into `chain`.
    pub(super) fn fill<M: GuestMemory>(&self, memory: &M, chain: &Chain) -> Result<Outcome, Fault> {
        if chain.writable_len() == 0 {
            return Ok(Outcome::Used(0));
        }
        let mut buffer = self.buffer();
        if buffer.bytes.is_empty() {
            return Ok(Outcome::Later);
        }
        let mut writer = chain.writer(memory);
        let (first, second) = buffer.bytes.as_slices();
        for part in [first, second] {
            let (now, _) = part.split_at(part.len().min(writer.left()));
            writer.write(now)?;
        }
        let count = writer.done();
        buffer.bytes.drain(..count);
        if std::mem::take(&mut buffer.filled) {
            buffer.room_said = true;
            signal(&self.room);
        }
        // No more than the capacity.
        Ok(Outcome::Used(count as u32))
    }

    /// What no driver has received.
    pub(super) fn pending(&self) -> Vec<u8> {
        self.buffer().bytes.iter().copied().collect()
    }

    /// Puts `saved` before what was pushed already, of which the end is dropped if it does not fit any more.
    pub(super) fn restore(&self, saved: &[u8]) -> Result<(), MigrationError> {
        if saved.len() > Self::CAPACITY {
            return Err(MigrationError::TooLong {
                what: "the input of a console",
                size: saved.len() as u64,
                limit: Self::CAPACITY as u64,
            });
        }
        let mut buffer = self.buffer();
        let pushed = std::mem::take(&mut buffer.bytes);
        buffer.bytes = saved.iter().copied().chain(pushed).collect();
        buffer.bytes.truncate(Self::CAPACITY);
        Ok(())
    }
}
