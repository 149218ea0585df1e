//! The worker of a device that a back end serves: what the back end signals goes to the driver.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::debug;
use vm_virtio::{Context, DeviceQueue, EventSet, QueueError, QueueHandler, Source};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::VhostUserError;
use super::channel::Channel;
use super::connection::Connection;
use super::front::Shared;

/// The back end is gone.
const GONE: u32 = 1 << 16;
/// It says something.
const SAYS: u32 = GONE + 1;
/// It found a fault in the rings.
const FAULT: u32 = GONE + 2;

/// What the back end signals of one queue, by its number.
pub(super) struct Call {
    pub queue: u16,
    pub event: EventFd,
}

/// What is waited for while the device works.
pub(super) struct Events {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    calls: Vec<Call>,
    fault: EventFd,
    faulty: Arc<AtomicBool>,
    channel: Option<Channel>,
}

/// The back end's ends of it.
pub(super) struct Ends {
    /// By queue.
    pub calls: Vec<EventFd>,
    /// For all queues.
    pub fault: EventFd,
    /// Where it may speak, if it can.
    pub channel: Option<UnixStream>,
    /// Becomes true with the first fault.
    pub faulty: Arc<AtomicBool>,
}

impl Events {
    /// Of the `queues` of a device that `connection` is to serve.
    pub fn new(
        shared: Arc<Shared>,
        connection: Arc<Connection>,
        queues: impl Iterator<Item = u16>,
    ) -> io::Result<(Self, Ends)> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let calls = queues
            .map(|queue| {
                let event = event()?;
                Ok(Call { queue, event })
            })
            .collect::<io::Result<Vec<_>>>()?;
        let fault = event()?;
        let (channel, theirs) = if connection.tells_changes() {
            let (ours, theirs) = Channel::new()?;
            (Some(ours), Some(theirs))
        } else {
            (None, None)
        };
        let faulty = Arc::new(AtomicBool::new(false));
        let ends = Ends {
            faulty: faulty.clone(),
            calls: calls
                .iter()
                .map(|call| call.event.try_clone())
                .collect::<io::Result<_>>()?,
            fault: fault.try_clone()?,
            channel: theirs,
        };
        let events = Self {
            shared,
            connection,
            calls,
            fault,
            faulty,
            channel,
        };
        Ok((events, ends))
    }

    /// The back end used chains, if it signalled that.
    fn call(&self, place: usize, context: &Context<'_>) {
        if let Some(call) = self.calls.get(place)
            // Nothing to read is no signal.
            && call.event.read().is_ok()
        {
            context.interrupt().queue(call.queue);
        }
    }

    fn gone(&self, why: &VhostUserError, context: &mut Context<'_>) {
        context.unwatch(GONE);
        self.connection.lose(why);
        context.interrupt().needs_reset();
    }

    fn says(&mut self, context: &mut Context<'_>) {
        // One message a turn: others have theirs.
        let changed = self.channel.as_mut().map(Channel::changed);
        match changed {
            Some(Ok(false)) | None => {}
            Some(Ok(true)) => match self.shared.refresh(&self.connection) {
                Ok(()) => context.interrupt().config_changed(),
                Err(error) => self.gone(&error, context),
            },
            Some(Err(_)) => {
                debug!("the vhost-user back end says nothing more");
                context.unwatch(SAYS);
            }
        }
    }
}

impl QueueHandler for Events {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        // The back end serves them.
        &mut []
    }

    fn on_queue(&mut self, _index: u16, _context: &mut Context<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd: &dyn AsRawFd, events, token| Source {
            fd: fd.as_raw_fd(),
            events,
            token,
        };
        let calls = (0..).zip(&self.calls);
        calls
            .map(|(token, call)| source(&call.event, EventSet::IN, token))
            .chain([
                source(&self.fault, EventSet::IN, FAULT),
                // Answers are for whoever asked.
                source(self.connection.stream(), EventSet::READ_HANG_UP, GONE),
            ])
            .chain(
                self.channel
                    .iter()
                    .map(|channel| source(channel, EventSet::IN, SAYS)),
            )
            .collect()
    }

    fn on_source(
        &mut self,
        token: u32,
        _events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        match token {
            GONE => {
                let error = self.shared.gone();
                self.gone(&error, context);
            }
            SAYS => self.says(context),
            FAULT => {
                if self.fault.read().is_ok() {
                    self.faulty.store(true, Ordering::Release);
                    context.interrupt().needs_reset();
                }
            }
            place => self.call(place as usize, context),
        }
        Ok(())
    }

    fn on_stop(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        // What it signalled last must not wait for the resume.
        for place in 0..self.calls.len() {
            self.call(place, context);
        }
        Ok(())
    }
}
