//! Worker threads: the one loop that serves queues and what else a device waits for.
//!
//! ```text
//!            driver's kick ──> on_queue ─┐
//!   start ──>  a source    ──> on_source ─┼──> wait ──> stop ──> on_stop ──> handlers come home
//!            more to do    ──> on_queue ─┘
//! ```
//!
//! A device splits its queues among handlers, gives each worker some of them, and gets them back when it stops the worker.
//! It owns no epoll, no eventfd for stopping or pausing, and no thread handle.

mod context;
mod run;
mod spin;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use thiserror::Error;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use context::Context;
pub use spin::Spin;

use crate::{DeviceQueue, QueueError, Spawn, VirtioInterrupt};
use run::Loop;

/// A descriptor that a handler waits for besides its queues.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// What to wait on. It stays open for as long as it is watched.
    pub fd: RawFd,
    /// For what; level-triggered unless [`EventSet::EDGE_TRIGGERED`] is among them.
    pub events: EventSet,
    /// Tells the handler's sources apart.
    pub token: u32,
}

/// Serves one or some queues of a device, on a worker's thread. It owns its queues while the worker runs.
pub trait QueueHandler: Send {
    /// Its queues.
    fn queues(&mut self) -> &mut [DeviceQueue];

    /// There may be chains in queue `index`: the driver notified of them, or the worker has just started, or
    /// [`Context::again`] was called. [`Context::serve`] does what is usual.
    ///
    /// # Errors
    /// What is wrong with a queue. The driver is told that the device needs a reset, and that queue is served no more.
    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError>;

    /// What else to wait for from the start. [`Context::watch`] adds to it later.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// `events` are there at the source with `token`. May also come once more after [`Context::unwatch`].
    ///
    /// # Errors
    /// As for [`on_queue`](Self::on_queue); the source is watched no more either.
    fn on_source(
        &mut self,
        token: u32,
        events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        let _ = (token, events, context);
        Ok(())
    }

    /// The worker stops: complete what is in flight, give popped chains back. Queues go home after it.
    ///
    /// # Errors
    /// As for [`on_queue`](Self::on_queue).
    fn on_stop(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let _ = context;
        Ok(())
    }
}

impl<H: QueueHandler + ?Sized> QueueHandler for Box<H> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        (**self).queues()
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        (**self).on_queue(index, context)
    }

    fn sources(&self) -> Vec<Source> {
        (**self).sources()
    }

    fn on_source(
        &mut self,
        token: u32,
        events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        (**self).on_source(token, events, context)
    }

    fn on_stop(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        (**self).on_stop(context)
    }
}

/// What can go wrong with a worker, the guest aside.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The kernel gave no descriptor.
    #[error("preparing worker {name:?}")]
    Prepare {
        /// Of the thread.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A source cannot be waited for.
    #[error("worker {name:?} cannot wait for its descriptors")]
    Watch {
        /// Of the thread.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No thread.
    #[error("starting thread {name:?}")]
    Spawn {
        /// Of the thread.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ended without being told to.
    #[error("thread {name:?} is gone, and its queues with it")]
    Gone {
        /// Of the thread.
        name: String,
    },
}

/// A running worker. Dropping it stops it, and drops the handlers.
#[derive(Debug)]
pub struct Worker<H> {
    name: String,
    stop: EventFd,
    home: Receiver<Vec<H>>,
}

impl<H: QueueHandler + 'static> Worker<H> {
    /// Starts a thread called `name` (of which Linux shows 15 bytes) that serves `handlers`. Each queue is served
    /// once at the start: there may be chains in it from before.
    ///
    /// # Errors
    /// No descriptors, no thread, or a source that cannot be waited for, such as a plain file. The handlers are dropped.
    pub fn start(
        name: &str,
        handlers: Vec<H>,
        interrupt: Arc<dyn VirtioInterrupt>,
        spawn: &Spawn,
    ) -> Result<Self, WorkerError> {
        let name = name.to_owned();
        let prepare = |source| WorkerError::Prepare {
            name: name.clone(),
            source,
        };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(prepare)?;
        let mut run =
            Loop::new(handlers, interrupt, &stop).map_err(|source| WorkerError::Watch {
                name: name.clone(),
                source,
            })?;
        // Room for the one message: the thread never waits to send it.
        let (sender, home) = sync_channel(1);
        let job = Box::new(move || {
            run.run();
            // There is no receiver only if the worker was dropped.
            let _ = sender.send(run.into_handlers());
        });
        spawn(name.clone(), job).map_err(|source| WorkerError::Spawn {
            name: name.clone(),
            source,
        })?;
        Ok(Self { name, stop, home })
    }

    /// Stops the thread and gives the handlers back, in their order.
    ///
    /// # Errors
    /// [`WorkerError::Gone`] if it panicked.
    pub fn stop(self) -> Result<Vec<H>, WorkerError> {
        self.take().ok_or_else(|| WorkerError::Gone {
            name: self.name.clone(),
        })
    }

    /// As [`stop`](Self::stop), for a device that has a worker while it is active: none gives no handlers.
    ///
    /// # Errors
    /// As for [`stop`](Self::stop).
    pub fn stop_any(worker: &mut Option<Self>) -> Result<Vec<H>, WorkerError> {
        worker.take().map_or_else(|| Ok(Vec::new()), Self::stop)
    }
}

impl<H> Worker<H> {
    fn take(&self) -> Option<Vec<H>> {
        // Adding 1 to a counter of 64 bits does not fail.
        let _ = self.stop.write(1);
        self.home.recv().ok()
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        // After `stop` the sender is gone, so that this does not wait.
        drop(self.take());
    }
}
