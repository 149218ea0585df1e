//! The loop itself.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use log::debug;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::QueueHandler;
use super::context::{Context, Tag, Waiting};
use crate::{QueueError, VirtioInterrupt};

/// Events taken from the kernel at a time.
const BATCH: usize = 32;

pub(super) struct Loop<H> {
    handlers: Vec<H>,
    interrupt: Arc<dyn VirtioInterrupt>,
    waiting: Waiting,
}

impl<H: QueueHandler> Loop<H> {
    /// Registers all there is to wait for. `stop` stays open for as long as the loop runs.
    pub fn new(
        mut handlers: Vec<H>,
        interrupt: Arc<dyn VirtioInterrupt>,
        stop: &EventFd,
    ) -> io::Result<Self> {
        let mut waiting = Waiting {
            epoll: Epoll::new()?,
            sources: Vec::new(),
            again: Vec::new(),
        };
        waiting.epoll.ctl(
            ControlOperation::Add,
            stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, Tag::Stop.encode()),
        )?;
        for (handler, served) in handlers.iter_mut().enumerate() {
            for source in served.sources() {
                waiting.add(handler, &source)?;
            }
            for queue in served.queues().iter().filter(|queue| queue.is_served()) {
                let index = queue.index();
                // Each write to an eventfd is an edge. So it need not be read, which saves a system call a kick.
                waiting.epoll.ctl(
                    ControlOperation::Add,
                    queue.kick().as_raw_fd(),
                    EpollEvent::new(
                        EventSet::IN | EventSet::EDGE_TRIGGERED,
                        Tag::Queue { handler, index }.encode(),
                    ),
                )?;
                waiting.again.push((handler, index));
            }
        }
        Ok(Self {
            handlers,
            interrupt,
            waiting,
        })
    }

    pub fn into_handlers(self) -> Vec<H> {
        self.handlers
    }

    /// Serves until it is told to stop.
    pub fn run(&mut self) {
        let mut events = [EpollEvent::default(); BATCH];
        let mut again = Vec::new();
        loop {
            let timeout = if self.waiting.again.is_empty() { -1 } else { 0 };
            let count = match self.waiting.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    debug!("waiting for events: {e}");
                    self.interrupt.needs_reset();
                    break;
                }
            };
            // Those that are to be served without waiting, once, even if they ask for more while the events are handled.
            std::mem::swap(&mut again, &mut self.waiting.again);
            let mut stop = false;
            for event in events.iter().take(count) {
                let set = EventSet::from_bits_truncate(event.events());
                match Tag::decode(event.data()) {
                    Tag::Stop => stop = true,
                    Tag::Queue { handler, index } => {
                        again.retain(|entry| *entry != (handler, index));
                        self.on_queue(handler, index);
                    }
                    Tag::Source { handler, token } => self.on_source(handler, token, set),
                }
            }
            if stop {
                break;
            }
            for (handler, index) in again.drain(..) {
                self.on_queue(handler, index);
            }
        }
        for handler in 0..self.handlers.len() {
            self.call(handler, QueueHandler::on_stop);
        }
    }

    fn on_queue(&mut self, handler: usize, index: u16) {
        let served = self
            .handlers
            .get_mut(handler)
            .and_then(|h| h.queues().iter().find(|queue| queue.index() == index))
            .is_some_and(|queue| queue.is_served());
        if served {
            self.call(handler, |h, context| h.on_queue(index, context));
        }
    }

    fn on_source(&mut self, handler: usize, token: u32, events: EventSet) {
        if !self.call(handler, |h, context| h.on_source(token, events, context)) {
            self.waiting.remove(handler, token);
        }
    }

    /// Calls handler number `handler`, and ends the service of a queue in which it finds a fault. False if it does.
    fn call(
        &mut self,
        handler: usize,
        what: impl FnOnce(&mut H, &mut Context<'_>) -> Result<(), QueueError>,
    ) -> bool {
        let Some(called) = self.handlers.get_mut(handler) else {
            return true;
        };
        let mut context = Context {
            handler,
            waiting: &mut self.waiting,
            interrupt: &*self.interrupt,
        };
        let Err(error) = what(called, &mut context) else {
            return true;
        };
        debug!(
            "virtqueue {} is served no more: {}",
            error.queue, error.fault
        );
        for queue in called.queues() {
            if queue.index() == error.queue && queue.is_served() {
                queue.set_broken();
                // It was registered at the start.
                let _ = self.waiting.epoll.ctl(
                    ControlOperation::Delete,
                    queue.kick().as_raw_fd(),
                    EpollEvent::default(),
                );
            }
        }
        self.interrupt.needs_reset();
        false
    }
}
