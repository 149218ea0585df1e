//! Console output: a bounded buffer that a thread of its own empties into a file or terminal.
//!
//! A vCPU that prints never waits for a slow terminal; when the buffer is full the writer is told
//! so (`WouldBlock`), and the serial port holds its transmitter busy as a real one would, until
//! [`Event::OutputRoom`] says that there is room again.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::client::{Clients, InputSlot};
use super::door::Door;
use crate::event::{Event, EventSender};
use crate::threads;

/// Most bytes that wait to be written.
const CAPACITY: usize = 1 << 20;
/// How long the end of the VMM waits for a stuck terminal.
const LAST_FLUSH: Duration = Duration::from_secs(2);

/// Every sink that is open, for [`flush_in_panic`].
static OPEN: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

/// Gives every output thread up to two seconds to write what waits. Takes no lock that the
/// panicking thread might hold for good.
pub fn flush_in_panic() {
    let Ok(open) = OPEN.try_lock() else { return };
    let end = Instant::now() + LAST_FLUSH;
    for shared in open.iter().filter_map(Weak::upgrade) {
        while Instant::now() < end {
            if let Ok(state) = shared.state.try_lock()
                && (state.broken || (!state.writing && state.waiting.is_empty()))
            {
                break;
            }
            std::thread::yield_now();
        }
    }
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// The thread is inside a write.
    writing: bool,
    /// No more will come.
    closed: bool,
    /// A writer was refused and waits to hear of room.
    refused: bool,
    /// The sink failed: everything is dropped from here on.
    broken: bool,
    /// The thread is done, and with it the door that clients came to.
    ended: bool,
}

#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Of a thread that waits for more than this.
    wake: Option<EventFd>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing can be written any more.
    fn give_up(&self, error: &io::Error, events: &EventSender) {
        log::warn!("console output stops here: {error}");
        let mut state = self.lock();
        state.broken = true;
        state.waiting.clear();
        if std::mem::take(&mut state.refused) {
            events.send(Event::OutputRoom);
        }
        self.changed.notify_all();
    }

    /// Tells whoever waits for a change.
    fn tell(&self) {
        self.changed.notify_all();
        if let Some(wake) = &self.wake {
            // Refused only when its counter is full: then it is readable anyway.
            let _ = wake.write(1);
        }
    }

    /// Takes what waits, which counts as being written from here on.
    pub(super) fn take(&self, events: &EventSender) -> Vec<u8> {
        let mut state = self.lock();
        state.writing = true;
        if std::mem::take(&mut state.refused) {
            events.send(Event::OutputRoom);
        }
        std::mem::take(&mut state.waiting)
    }

    /// What was taken is written but for a rest, or not. True if no more will come and none is left.
    pub(super) fn written(&self, rest: bool) -> bool {
        let mut state = self.lock();
        state.writing = rest;
        self.changed.notify_all();
        state.closed && (rest || state.waiting.is_empty())
    }
}

/// One sink. Clones write to the same one; [`flush_all`](Output::flush_all) before the end.
#[derive(Clone)]
pub struct Output {
    shared: Arc<Shared>,
}

impl Output {
    /// Starts the thread `name` that writes to `sink`.
    pub fn start(name: &str, sink: File, events: EventSender) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        remember(&shared);
        let on_room = events.try_clone()?;
        threads::spawn(name.to_owned(), events, move || {
            drain(&theirs, sink, &on_room);
        })?;
        Ok(Self { shared })
    }

    /// Starts the thread `name` that serves whoever comes to `door`. What a client types goes to the device in the slot.
    pub fn start_clients(
        name: &str,
        door: Door,
        events: EventSender,
    ) -> io::Result<(Self, InputSlot)> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Arc::new(Shared {
            wake: Some(wake.try_clone()?),
            ..Shared::default()
        });
        remember(&shared);
        let slot = InputSlot::new(wake.try_clone()?);
        let (theirs, input, on_room) = (shared.clone(), slot.clone(), events.try_clone()?);
        threads::spawn(name.to_owned(), events, move || {
            let clients = Clients::new(&theirs, &wake, door, input);
            if let Err(e) = clients.serve(&on_room) {
                theirs.give_up(&e, &on_room);
            }
            theirs.lock().ended = true;
            theirs.changed.notify_all();
        })?;
        Ok((Self { shared }, slot))
    }

    /// Waits until all is written, or the sink has been stuck for two seconds.
    pub fn flush_all(&self) {
        let state = self.shared.lock();
        let _done = self
            .shared
            .changed
            .wait_timeout_while(state, LAST_FLUSH, |s| {
                !s.broken && (s.writing || !s.waiting.is_empty())
            })
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Ends the thread once it has written what waits.
    pub fn close(&self) {
        self.flush_all();
        self.shared.lock().closed = true;
        self.shared.tell();
        if self.shared.wake.is_some() {
            let state = self.shared.lock();
            let _ended = self
                .shared
                .changed
                .wait_timeout_while(state, LAST_FLUSH, |s| !s.ended)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.shared.lock();
        if state.broken {
            return Ok(bytes.len());
        }
        let room = CAPACITY - state.waiting.len().min(CAPACITY);
        if room == 0 && !bytes.is_empty() {
            state.refused = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = bytes.get(..room).unwrap_or(bytes);
        let wake = state.waiting.is_empty();
        state.waiting.extend_from_slice(taken);
        drop(state);
        if wake {
            self.shared.tell();
        }
        Ok(taken.len())
    }

    /// Nothing to do: the thread writes as soon as it can.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// For the case of a panic.
fn remember(shared: &Arc<Shared>) {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    open.retain(|other| other.strong_count() > 0);
    open.push(Arc::downgrade(shared));
}

fn drain(shared: &Shared, mut sink: File, events: &EventSender) {
    let mut chunk = Vec::new();
    loop {
        {
            let mut state = shared.lock();
            while state.waiting.is_empty() {
                if state.closed {
                    return;
                }
                state = shared
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::swap(&mut chunk, &mut state.waiting);
            state.writing = true;
            if std::mem::take(&mut state.refused) {
                events.send(Event::OutputRoom);
            }
        }
        let result = sink.write_all(&chunk);
        chunk.clear();
        let mut state = shared.lock();
        state.writing = false;
        drop(state);
        shared.changed.notify_all();
        if let Err(e) = result {
            shared.give_up(&e, events);
            return;
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::event::event_channel;
    use std::io::Read;
    use std::os::fd::FromRawFd;

    fn pipe() -> (File, File) {
        let mut fds = [0; 2];
        // SAFETY: the array has room for the two descriptors.
        assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: both are new and owned by nobody else.
        unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) }
    }

    #[test]
    fn a_reader_that_never_reads_blocks_nobody_and_loses_nothing() {
        let (events, receiver) = event_channel().unwrap();
        let (mut from, to) = pipe();
        let mut output = Output::start("test-out", to, events).unwrap();
        let mut accepted = 0usize;
        // The pipe takes 64 KiB, the thread holds one chunk, the buffer 1 MiB: it fills up.
        let full = loop {
            match output.write(&[b'x'; 4096]) {
                Ok(n) => accepted += n,
                Err(e) => break e,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(accepted <= 2 * CAPACITY + (1 << 20));
        let mut all = vec![0; accepted];
        from.read_exact(&mut all).unwrap();
        assert!(all.iter().all(|&b| b == b'x'));
        output.flush_all();
        assert_eq!(receiver.try_next(), Some(Event::OutputRoom));
        output.close();
    }

    #[test]
    fn a_closed_reader_is_no_error_to_the_guest() {
        let (events, _receiver) = event_channel().unwrap();
        let (from, to) = pipe();
        drop(from);
        let mut output = Output::start("test-out", to, events).unwrap();
        output.write_all(b"into the void").unwrap();
        output.flush_all();
        output.write_all(b"and again").unwrap();
    }
}
