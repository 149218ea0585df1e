//! A disk in memory that fails, waits and mixes up when a test says so, and keeps notes; and what drivers ask of any disk.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use block_util::{
    Completion, DiskError, DiskFile, DiskIo, Geometry, IoBuf, IoOptions, LockMode, Operation,
    QueueFull, Request,
};
use vm_virtio::testing::Request as DriverRequest;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The first 16 bytes of a request (virtio 1.2 §5.2.6).
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = vec![0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Reads `len` bytes from `sector` on.
pub fn read(sector: u64, len: u32) -> DriverRequest {
    DriverRequest {
        readable: header(0, sector),
        writable: len + 1,
    }
}

/// Writes `data` from `sector` on.
pub fn write(sector: u64, data: &[u8]) -> DriverRequest {
    DriverRequest {
        readable: [&header(1, sector), data].concat(),
        writable: 1,
    }
}

/// What a disk was asked to do, and in which order: offset and bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Done {
    Read(u64, u64),
    Write(u64, u64, bool),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

#[derive(Debug, Default)]
pub struct State {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<Done>>,
    /// Requests that were started, ever.
    started: Mutex<usize>,
    change: Condvar,
    /// Nothing completes.
    held: AtomicBool,
    /// The last request that was started completes first.
    pub reversed: AtomicBool,
    /// Every request fails like this.
    pub failing: Mutex<Option<io::ErrorKind>>,
    /// How often requests were handed over: a system call each, of a real disk.
    pub calls: AtomicUsize,
    /// So many kicks fail for the moment.
    pub busy_kicks: AtomicUsize,
    /// Kicks fail for good.
    pub broken_kicks: AtomicBool,
    /// Waiting fails.
    pub broken_waits: AtomicBool,
    /// The most that were in flight at once, and how often a way in was opened.
    pub most: AtomicUsize,
    pub opened: AtomicUsize,
    wakes: Mutex<Vec<EventFd>>,
}

impl State {
    pub fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    pub fn take_log(&self) -> Vec<Done> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// From now on nothing completes, until somebody waits or [`release`](Self::release) is called.
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        for wake in self.wakes.lock().unwrap().iter() {
            wake.write(1).unwrap();
        }
    }

    /// Waits until `count` requests were started, since the disk was made.
    pub fn wait_started(&self, count: usize) {
        let started = self.started.lock().unwrap();
        let waited = self
            .change
            .wait_timeout_while(started, Duration::from_secs(60), |n| *n < count)
            .unwrap();
        assert!(!waited.1.timed_out(), "the disk was not asked");
    }

    fn perform(&self, operation: &Owned) -> io::Result<()> {
        if let Some(kind) = *self.failing.lock().unwrap() {
            return Err(kind.into());
        }
        let mut bytes = self.bytes();
        let range = |offset: u64, len: u64| {
            let end = offset
                .checked_add(len)
                .filter(|end| *end <= bytes.len() as u64);
            end.map(|end| offset as usize..end as usize)
                .ok_or(io::ErrorKind::InvalidInput)
        };
        let done = match operation {
            Owned::Read(offset, buffers) => {
                let len = total(buffers);
                let mut from = &bytes[range(*offset, len)?];
                for buffer in buffers {
                    // SAFETY: the buffer is memory that whoever submitted it keeps.
                    unsafe {
                        std::ptr::copy(from.as_ptr(), buffer.as_ptr(), buffer.len());
                    }
                    from = &from[buffer.len()..];
                }
                Done::Read(*offset, len)
            }
            Owned::Write(offset, buffers, durable) => {
                let len = total(buffers);
                let range = range(*offset, len)?;
                let mut to = &mut bytes[range];
                for buffer in buffers {
                    // SAFETY: as above.
                    unsafe {
                        std::ptr::copy(buffer.as_ptr(), to.as_mut_ptr(), buffer.len());
                    }
                    to = &mut to[buffer.len()..];
                }
                Done::Write(*offset, len, *durable)
            }
            Owned::Flush => Done::Flush,
            Owned::Discard(offset, len) => {
                range(*offset, *len)?;
                Done::Discard(*offset, *len)
            }
            Owned::WriteZeroes(offset, len, may_unmap) => {
                let range = range(*offset, *len)?;
                bytes[range].fill(0);
                Done::WriteZeroes(*offset, *len, *may_unmap)
            }
        };
        self.log.lock().unwrap().push(done);
        Ok(())
    }
}

fn total(buffers: &[IoBuf]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

#[derive(Debug)]
pub struct MemoryDisk {
    pub state: Arc<State>,
    pub read_only: bool,
    /// Requests that a way in takes.
    pub depth: usize,
}

impl MemoryDisk {
    /// A disk whose sector `n` is full of `n + 1`.
    pub fn new(sectors: u32) -> Self {
        let bytes = (0..sectors).flat_map(|n| [n as u8 + 1; 512]).collect();
        let state = State {
            bytes: Mutex::new(bytes),
            ..State::default()
        };
        Self {
            state: Arc::new(state),
            read_only: false,
            depth: usize::MAX,
        }
    }
}

impl DiskFile for MemoryDisk {
    fn size(&self) -> u64 {
        self.state.bytes().len() as u64
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            logical_block_size: 512,
            physical_block_size: 4096,
            minimum_io_size: 0,
            optimal_io_size: 0,
            discard_granularity: 512,
        }
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        if size > 1 << 30 {
            return Err(DiskError::Resize {
                path: "memory".into(),
                size,
                source: io::ErrorKind::FileTooLarge.into(),
            });
        }
        self.state.bytes().resize(size as usize, 0);
        Ok(())
    }

    fn lock(&self, _: LockMode) -> Result<(), DiskError> {
        Ok(())
    }

    fn unlock(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let wake = fd.try_clone().unwrap();
        self.state.wakes.lock().unwrap().push(wake);
        self.state.opened.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(MemoryIo {
            state: self.state.clone(),
            depth: options.depth.min(self.depth),
            submitted: Vec::new(),
            started: Vec::new(),
            done: VecDeque::new(),
            fd,
        }))
    }
}

#[derive(Debug)]
enum Owned {
    Read(u64, Vec<IoBuf>),
    Write(u64, Vec<IoBuf>, bool),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

#[derive(Debug)]
struct MemoryIo {
    state: Arc<State>,
    depth: usize,
    submitted: Vec<(Owned, u64)>,
    started: Vec<(Owned, u64)>,
    done: VecDeque<Completion>,
    fd: EventFd,
}

impl MemoryIo {
    fn run(&mut self) {
        if self.state.reversed.load(Ordering::SeqCst) {
            self.started.reverse();
        }
        for (operation, user_data) in self.started.drain(..) {
            let result = self.state.perform(&operation);
            self.done.push_back(Completion { user_data, result });
        }
        if !self.done.is_empty() {
            self.fd.write(1).unwrap();
        }
    }
}

impl DiskIo for MemoryIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        if self.in_flight() >= self.depth {
            return Err(QueueFull { depth: self.depth });
        }
        let owned = match request.operation {
            Operation::Read { offset, buffers } => Owned::Read(offset, buffers.to_vec()),
            Operation::Write {
                offset,
                buffers,
                durable,
            } => Owned::Write(offset, buffers.to_vec(), durable),
            Operation::Flush => Owned::Flush,
            Operation::Discard { offset, len } => Owned::Discard(offset, len),
            Operation::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => Owned::WriteZeroes(offset, len, may_unmap),
        };
        self.submitted.push((owned, request.user_data));
        let most = &self.state.most;
        most.fetch_max(self.in_flight(), Ordering::SeqCst);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.submitted.is_empty() {
            return Ok(());
        }
        if self.state.broken_kicks.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let busy = &self.state.busy_kicks;
        if busy
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .is_ok()
        {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.state.calls.fetch_add(1, Ordering::SeqCst);
        *self.state.started.lock().unwrap() += self.submitted.len();
        self.state.change.notify_all();
        self.started.append(&mut self.submitted);
        if !self.state.held.load(Ordering::SeqCst) {
            self.run();
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        if !self.state.held.load(Ordering::SeqCst) {
            self.run();
        }
        let done = self.done.pop_front();
        if self.done.is_empty() {
            // Fails only if there was nothing to read.
            let _ = self.fd.read();
        }
        done
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as self.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }

    fn wait(&mut self) -> io::Result<()> {
        if self.state.broken_waits.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.kick()?;
        self.run();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.submitted.len() + self.started.len() + self.done.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }
}
