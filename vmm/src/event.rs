//! What other threads tell the control thread: a channel with an eventfd for its epoll.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Something that the control thread must act on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest told, by pvpanic, that it panicked. It goes on as it likes.
    GuestPanicked {
        /// A kernel that it loaded for this takes over.
        crash_kernel: bool,
    },
    /// A vCPU took a triple fault.
    TripleFault {
        /// vCPU number.
        cpu: u32,
    },
    /// A console's output takes bytes again, after it had refused some.
    OutputRoom,
    /// The VM cannot go on; the text says why.
    Failed(String),
}

/// Sends events from any thread.
#[derive(Debug)]
pub struct EventSender {
    channel: Sender<Event>,
    wake: EventFd,
}

impl EventSender {
    /// Sends `event`. It is lost only when the control thread is gone already.
    pub fn send(&self, event: Event) {
        if self.channel.send(event).is_ok() {
            // An eventfd refuses a write only when its counter is full: then it is readable anyway.
            let _ = self.wake.write(1);
        }
    }

    /// Writing to it wakes the control thread, which then looks for events and requests.
    pub(crate) fn waker(&self) -> io::Result<EventFd> {
        self.wake.try_clone()
    }

    /// Another sender to the same control thread.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            channel: self.channel.clone(),
            wake: self.wake.try_clone()?,
        })
    }
}

/// The control thread's end.
#[derive(Debug)]
pub struct EventReceiver {
    channel: Receiver<Event>,
    wake: EventFd,
}

impl EventReceiver {
    /// Readable when there are events.
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Takes the next event, if there is one.
    pub fn try_next(&self) -> Option<Event> {
        self.channel.try_recv().ok()
    }
}

/// A new channel.
pub fn event_channel() -> io::Result<(EventSender, EventReceiver)> {
    let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (sender, receiver) = channel();
    let sender = EventSender {
        channel: sender,
        wake: wake.try_clone()?,
    };
    Ok((
        sender,
        EventReceiver {
            channel: receiver,
            wake,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_makes_the_descriptor_readable() {
        let (sender, receiver) = event_channel().unwrap();
        assert!(receiver.wake_fd().read().is_err(), "nothing was sent yet");
        sender.try_clone().unwrap().send(Event::GuestReset);
        assert_eq!(receiver.wake_fd().read().unwrap(), 1);
        assert_eq!(receiver.try_next(), Some(Event::GuestReset));
        assert_eq!(receiver.try_next(), None);
    }
}
