//! One queue into a qcow2 image. Clusters that are there are read and written where they are, by the data file's engine, which is held
//! to where they are meanwhile; all else goes to the disk's helpers.
//!
//! The thread that drives a queue has holds, for which others may be waiting, so that it must not wait for anything in the library:
//! it asks only what is answered at once.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use block_util::{Completion, DiskIo, HelperIo, IoBuf, Operation, QueueFull, Request};
use qcow::{Hold, Image, Piece, Place};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Shared;
use super::copy::volatile;

/// A request that the data file's engine has.
#[derive(Default)]
struct Slot {
    user_data: u64,
    /// The batch whose hold keeps its clusters where they are.
    batch: Option<usize>,
    /// Pieces that are not done yet.
    left: usize,
    error: Option<io::Error>,
    /// It makes data durable.
    flush: bool,
}

/// Requests that were submitted between two kicks, and share a hold.
#[derive(Default)]
struct Batch {
    hold: Option<Hold>,
    /// Requests that are not done yet.
    left: usize,
}

/// The batches of a queue that are not done.
struct Batches {
    all: Vec<Batch>,
    free: Vec<usize>,
    /// The one that requests are submitted to.
    open: Option<usize>,
}

impl Batches {
    /// As many as a queue of `depth` requests can have: one each.
    fn new(depth: usize) -> Self {
        Self {
            all: (0..depth).map(|_| Batch::default()).collect(),
            free: (0..depth).rev().collect(),
            open: None,
        }
    }

    /// Finds where a range is, for reading or writing, as [`Image::hold_read`] and [`Image::hold_write`] do: the batch whose hold
    /// keeps it there.
    fn find(
        &mut self,
        image: &Arc<Image>,
        (offset, length, write): (u64, u64, bool),
        pieces: &mut Vec<Piece>,
    ) -> qcow::Result<Option<usize>> {
        let open = self.open.and_then(|index| self.all.get(index));
        if let Some(hold) = open.and_then(|batch| batch.hold.as_ref()) {
            let found = if write {
                hold.write(offset, length, pieces)?
            } else {
                hold.read(offset, length, pieces)?
            };
            return Ok(self.open.filter(|_| found));
        }
        let hold = if write {
            image.hold_write(offset, length, pieces)?
        } else {
            image.hold_read(offset, length, pieces)?
        };
        // There is a free one where there is a free slot.
        let (Some(hold), Some(index)) = (hold, self.free.pop()) else {
            return Ok(None);
        };
        if let Some(batch) = self.all.get_mut(index) {
            batch.hold = Some(hold);
        }
        self.open = Some(index);
        Ok(self.open)
    }

    /// Another request is of batch `index`.
    fn add(&mut self, index: usize) {
        if let Some(batch) = self.all.get_mut(index) {
            batch.left += 1;
        }
    }

    /// A request of batch `index` is done.
    fn end(&mut self, index: usize) {
        if let Some(batch) = self.all.get_mut(index) {
            batch.left = batch.left.saturating_sub(1);
        }
        self.release(index);
    }

    /// The next request begins a new batch.
    fn close(&mut self) {
        if let Some(index) = self.open.take() {
            self.release(index);
        }
    }

    /// Gives up the hold of batch `index` if nothing needs it any more.
    fn release(&mut self, index: usize) {
        if self.open != Some(index)
            && let Some(batch) = self.all.get_mut(index)
            && batch.left == 0
            && batch.hold.take().is_some()
        {
            self.free.push(index);
        }
    }
}

/// One queue. Its fields go away in this order: what holds clusters first, so that helpers who wait for that come to their end.
pub(super) struct QcowIo {
    data: Box<dyn DiskIo>,
    slots: Vec<Slot>,
    batches: Batches,
    helped: HelperIo,
    free: Vec<usize>,
    /// Readable while one of `data` and `helped` is.
    both: Epoll,
    /// The pieces, and the buffers of a piece, of the request that is being submitted.
    pieces: Vec<Piece>,
    buffers: Vec<IoBuf>,
    shared: Arc<Shared>,
}

impl QcowIo {
    /// A queue of `depth` requests over `data`, a queue into the data file.
    pub fn new(shared: &Arc<Shared>, data: Box<dyn DiskIo>, depth: usize) -> io::Result<Self> {
        let helped = shared.helpers.open_io(depth)?;
        let both = Epoll::new()?;
        for fd in [data.completion_fd(), helped.completion_fd()] {
            both.ctl(
                ControlOperation::Add,
                fd.as_raw_fd(),
                EpollEvent::new(EventSet::IN, 0),
            )?;
        }
        Ok(Self {
            data,
            slots: (0..depth).map(|_| Slot::default()).collect(),
            batches: Batches::new(depth),
            helped,
            free: (0..depth).rev().collect(),
            both,
            pieces: Vec::new(),
            buffers: Vec::new(),
            shared: Arc::clone(shared),
        })
    }

    /// Whether the request is on its way to the data file.
    fn submit_direct(&mut self, request: &Request<'_>) -> bool {
        let (offset, buffers, write) = match request.operation {
            Operation::Read { offset, buffers } => (offset, buffers, false),
            Operation::Write {
                offset,
                buffers,
                durable: false,
            } => (offset, buffers, true),
            Operation::Flush => return self.flush_direct(request.user_data),
            _ => return false,
        };
        let Some(length) = super::length(buffers) else {
            return false;
        };
        let range = (offset, length, write);
        let found = self
            .batches
            .find(&self.shared.image, range, &mut self.pieces);
        // Where it failed, the helper fails in the same way.
        let Ok(Some(batch)) = found else {
            return false;
        };
        let room = self.data.depth() - self.data.in_flight();
        let block = self.shared.block;
        let helped = self.pieces.iter().any(|p| is_helped(p, block));
        if helped || self.pieces.len().max(1) > room {
            return false;
        }
        let Some(index) = self.free.pop() else {
            return false;
        };
        let mut slot = Slot {
            user_data: request.user_data,
            batch: Some(batch),
            ..Slot::default()
        };
        self.batches.add(batch);
        let mut start = 0;
        for piece in &self.pieces {
            let buffers = if self.pieces.len() == 1 {
                buffers
            } else {
                part(buffers, start, piece.length, &mut self.buffers);
                &self.buffers
            };
            start += piece.length;
            if let Place::File(offset) = piece.place {
                send(&mut *self.data, index, &mut slot, offset, buffers, write);
            } else {
                buffers.iter().for_each(clear);
            }
        }
        if slot.left == 0 {
            // All of it is done: nothing is read, and its end is told like that of others.
            send(&mut *self.data, index, &mut slot, 0, &[], false);
        }
        if let Some(place) = self.slots.get_mut(index) {
            *place = slot;
        }
        true
    }

    fn flush_direct(&mut self, user_data: u64) -> bool {
        if !matches!(self.shared.image.only_data_to_flush(), Ok(true)) {
            return false;
        }
        let Some(index) = self.free.pop() else {
            return false;
        };
        let sent = self.data.submit(Request {
            operation: Operation::Flush,
            user_data: index as u64,
        });
        match self.slots.get_mut(index) {
            Some(slot) if sent.is_ok() => {
                *slot = Slot {
                    user_data,
                    left: 1,
                    flush: true,
                    ..Slot::default()
                };
                true
            }
            _ => {
                self.free.push(index);
                false
            }
        }
    }

    /// Ends a piece; the completion, if that was the last of its request.
    fn end_piece(&mut self, done: Completion) -> Option<Completion> {
        let index = usize::try_from(done.user_data).ok()?;
        let slot = self.slots.get_mut(index)?;
        slot.left = slot.left.saturating_sub(1);
        if let Err(error) = done.result {
            slot.error.get_or_insert(error);
        }
        if slot.left > 0 {
            return None;
        }
        let Slot {
            user_data,
            batch,
            error,
            flush,
            ..
        } = std::mem::take(slot);
        self.free.push(index);
        if let Some(batch) = batch {
            self.batches.end(batch);
        }
        if flush && error.is_some() {
            self.shared.image.flush_failed();
        }
        Some(Completion {
            user_data,
            result: error.map_or(Ok(()), Err),
        })
    }
}

/// Whether a piece is not the data file's, or not in whole blocks of it: to write a part of one takes the library's lock.
pub(super) fn is_helped(piece: &Piece, block: u64) -> bool {
    match piece.place {
        Place::File(at) => !(at | piece.length).is_multiple_of(block),
        Place::Zero => false,
        Place::Elsewhere => true,
    }
}

/// Gives a piece to the data file's engine. There is room, which was looked at.
fn send(
    data: &mut dyn DiskIo,
    index: usize,
    slot: &mut Slot,
    offset: u64,
    buffers: &[IoBuf],
    write: bool,
) {
    let operation = if write {
        Operation::Write {
            offset,
            buffers,
            durable: false,
        }
    } else {
        Operation::Read { offset, buffers }
    };
    let sent = data.submit(Request {
        operation,
        user_data: index as u64,
    });
    match sent {
        Ok(()) => slot.left += 1,
        Err(full) => slot.error = Some(io::Error::other(full)),
    }
}

/// Puts the bytes of `buffers` from `start` on into `out`, `length` of them.
fn part(buffers: &[IoBuf], start: u64, length: u64, out: &mut Vec<IoBuf>) {
    out.clear();
    let (mut skip, mut left) = (start, length);
    for buffer in buffers {
        let size = buffer.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        if left == 0 {
            break;
        }
        // Both are less than the buffer's length.
        let piece = buffer.part(skip as usize, left.min(size - skip) as usize);
        skip = 0;
        left -= piece.len() as u64;
        out.push(piece);
    }
}

fn clear(buffer: &IoBuf) {
    const ZEROES: [u8; 4096] = [0; 4096];
    for from in (0..buffer.len()).step_by(ZEROES.len()) {
        volatile(&buffer.part(from, ZEROES.len())).copy_from(&ZEROES);
    }
}

impl DiskIo for QcowIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        if self.in_flight() >= self.slots.len() {
            return Err(QueueFull {
                depth: self.slots.len(),
            });
        }
        if self.submit_direct(&request) {
            return Ok(());
        }
        self.helped.submit(request)
    }

    fn kick(&mut self) -> io::Result<()> {
        // Helpers may wait for what is held: nothing is held that is not on its way.
        self.batches.close();
        self.helped.kick()?;
        self.data.kick()
    }

    fn next_completion(&mut self) -> Option<Completion> {
        while let Some(done) = self.data.next_completion() {
            if let Some(completion) = self.end_piece(done) {
                return Some(completion);
            }
        }
        self.helped.next_completion()
    }

    fn peek(&mut self) -> Option<bool> {
        let (data, helped) = (self.data.peek()?, self.helped.peek()?);
        Some(data || helped)
    }

    fn listen(&mut self, on: bool) {
        self.data.listen(on);
        self.helped.listen(on);
    }

    #[allow(unsafe_code)]
    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.both.as_raw_fd()) }
    }

    fn wait(&mut self) -> io::Result<()> {
        self.batches.close();
        if self.helped.in_flight() == 0 {
            return self.data.wait();
        }
        self.kick()?;
        let mut events = [EpollEvent::default()];
        match self.both.wait(-1, &mut events) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
            _ => Ok(()),
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.helped.in_flight()
    }

    fn depth(&self) -> usize {
        self.slots.len()
    }
}

impl fmt::Debug for QcowIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QcowIo({} in flight)", self.in_flight())
    }
}
