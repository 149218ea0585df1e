//! How requests reach the control thread, and answers the API thread: a channel and an eventfd each way.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::http::{Response, Status};
use super::{Answer, Failure, Request};
use crate::event::EventSender;

/// A request on its way to the control thread.
pub struct Call {
    /// What is wanted.
    pub request: Request,
    reply: Reply,
}

impl Call {
    /// Takes it apart.
    pub fn split(self) -> (Request, Reply) {
        (self.request, self.reply)
    }
}

/// Where the answer goes. Dropped without one, it says that the VMM ends.
pub struct Reply {
    to: Option<(u64, Arc<Answers>)>,
}

impl Reply {
    /// Sends the answer.
    pub fn send(mut self, answer: Result<Answer, Failure>) {
        self.put(match answer {
            Ok(answer) => answer.response(),
            Err(failure) => failure.response(),
        });
    }

    fn put(&mut self, response: Response) {
        if let Some((id, answers)) = self.to.take() {
            answers.lock().push((id, response));
            answers.wake();
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.put(Failure::new(Status::Failed, "the VMM is ending").response());
    }
}

/// The API thread's end of requests.
pub struct CallSender {
    channel: Sender<Call>,
    wake: EventFd,
}

impl CallSender {
    pub(super) fn send(&self, request: Request, reply: Reply) {
        // If the control thread is gone, the call is dropped and answers for itself.
        if self.channel.send(Call { request, reply }).is_ok() {
            // An eventfd refuses a write only when its counter is full: then it is readable anyway.
            let _ = self.wake.write(1);
        }
    }
}

/// The control thread's end of requests.
pub struct CallReceiver(Receiver<Call>);

impl CallReceiver {
    /// The next request, if there is one.
    pub fn try_next(&self) -> Option<Call> {
        self.0.try_recv().ok()
    }
}

/// A channel whose receiver is the one of `events`: its descriptor wakes for both.
///
/// # Errors
/// No descriptor is left.
pub fn call_channel(events: &EventSender) -> io::Result<(CallSender, CallReceiver)> {
    let (sender, receiver) = channel();
    let sender = CallSender {
        channel: sender,
        wake: events.waker()?,
    };
    Ok((sender, CallReceiver(receiver)))
}

/// Answers on their way to the API thread.
struct Answers {
    waiting: Mutex<Vec<(u64, Response)>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Answers {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(u64, Response)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = self.wake.write(1);
    }
}

pub(super) struct AnswerReceiver(Arc<Answers>);

impl AnswerReceiver {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Answers {
            waiting: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
        })))
    }

    pub(super) fn share(&self) -> Self {
        Self(self.0.clone())
    }

    pub(super) fn for_connection(&self, id: u64) -> Reply {
        Reply {
            to: Some((id, self.0.clone())),
        }
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.0.wake
    }

    /// Takes note of the wake-up.
    pub(super) fn clear(&self) {
        let _ = self.0.wake.read();
    }

    pub(super) fn take(&self) -> Vec<(u64, Response)> {
        std::mem::take(&mut *self.0.lock())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    pub(super) fn stop(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.wake();
    }

    pub(super) fn stopped(&self) -> bool {
        self.0.stop.load(Ordering::SeqCst)
    }
}
