//! What a handler can do to the worker it runs in.

use std::io;
use std::os::fd::RawFd;

use vm_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::Source;
use crate::{Chain, DeviceQueue, Fault, Next, Outcome, QueueError, VirtioInterrupt};

/// Who an event is for, as the kernel keeps it: 2 bits of kind, 30 of handler, 32 of queue or token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Tag {
    Stop,
    Queue { handler: usize, index: u16 },
    Source { handler: usize, token: u32 },
}

impl Tag {
    pub fn encode(self) -> u64 {
        match self {
            Self::Stop => 0,
            Self::Queue { handler, index } => 1 << 62 | (handler as u64) << 32 | u64::from(index),
            Self::Source { handler, token } => 2 << 62 | (handler as u64) << 32 | u64::from(token),
        }
    }

    /// Of what [`encode`](Self::encode) made.
    #[allow(clippy::cast_possible_truncation)]
    pub fn decode(data: u64) -> Self {
        let handler = (data >> 32 & 0x3fff_ffff) as usize;
        match data >> 62 {
            1 => Self::Queue {
                handler,
                index: data as u16,
            },
            2 => Self::Source {
                handler,
                token: data as u32,
            },
            _ => Self::Stop,
        }
    }
}

/// What the worker waits for, and who has more to do.
pub(super) struct Waiting {
    pub epoll: Epoll,
    /// Sources, by handler and token.
    pub sources: Vec<(usize, u32, RawFd)>,
    /// Queues to be served without waiting.
    pub again: Vec<(usize, u16)>,
}

impl Waiting {
    pub fn add(&mut self, handler: usize, source: &Source) -> io::Result<()> {
        let Source { fd, events, token } = *source;
        let tag = Tag::Source { handler, token };
        let known = self
            .sources
            .iter()
            .find(|(h, t, _)| (*h, *t) == (handler, token));
        let operation = match known {
            Some((_, _, same)) if *same == fd => ControlOperation::Modify,
            Some(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            None => ControlOperation::Add,
        };
        let is_new = known.is_none();
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, tag.encode()))?;
        if is_new {
            self.sources.push((handler, token, fd));
        }
        Ok(())
    }

    pub fn remove(&mut self, handler: usize, token: u32) {
        self.sources.retain(|(h, t, fd)| {
            let matches = (*h, *t) == (handler, token);
            if matches {
                // Fails only if it was closed before, which removes it as well.
                let _ = self
                    .epoll
                    .ctl(ControlOperation::Delete, *fd, EpollEvent::default());
            }
            !matches
        });
    }
}

/// What a handler is called with.
pub struct Context<'a> {
    pub(super) handler: usize,
    pub(super) waiting: &'a mut Waiting,
    pub(super) interrupt: &'a dyn VirtioInterrupt,
}

impl<'a> Context<'a> {
    /// To the driver.
    #[must_use]
    pub fn interrupt(&self) -> &'a dyn VirtioInterrupt {
        self.interrupt
    }

    /// [`DeviceQueue::serve`], and comes back to the queue if there is more.
    ///
    /// # Errors
    /// As [`DeviceQueue::serve`].
    pub fn serve<M: GuestMemory>(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &M,
        request: impl FnMut(&mut Chain) -> Result<Outcome, Fault>,
    ) -> Result<(), QueueError> {
        match queue.serve(memory, self.interrupt, request)? {
            Next::Wait => {}
            Next::Again => self.again(queue.index()),
        }
        Ok(())
    }

    /// Calls [`on_queue`](super::QueueHandler::on_queue) again for this handler's queue `index`, after the others had their turn.
    pub fn again(&mut self, index: u16) {
        let entry = (self.handler, index);
        if !self.waiting.again.contains(&entry) {
            self.waiting.again.push(entry);
        }
    }

    /// Waits for `source` too, or, if its descriptor is already watched by its token, for other events.
    ///
    /// # Errors
    /// What the kernel says, or that the token is another descriptor's.
    pub fn watch(&mut self, source: &Source) -> io::Result<()> {
        self.waiting.add(self.handler, source)
    }

    /// Waits for the source with `token` no more. Before its descriptor is closed, this must be called.
    pub fn unwatch(&mut self, token: u32) {
        self.waiting.remove(self.handler, token);
    }
}
