//! Threads that carry out blocking requests, for all queues of a disk.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::finished::Finished;
use crate::buffer::IoBuf;
use crate::io::{Completion, DiskIo, Operation, QueueFull, Request};

/// Threads that wait for requests and carry them out, each with a function of its own. They end when this is dropped, which its
/// queues keep from happening.
pub struct Helpers {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or no more will be.
    job: Condvar,
    /// A thread has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    closing: bool,
    threads: usize,
    /// Threads that wait for a job.
    idle: usize,
}

/// A request, and who hears of its end.
struct Job {
    work: Work,
    reply: Reply,
}

/// An [`Operation`] with its list of buffers.
enum Work {
    Read(u64, Vec<IoBuf>),
    Write(u64, Vec<IoBuf>, bool),
    Other(Operation<'static>),
}

impl Work {
    fn new(operation: &Operation<'_>) -> Work {
        match *operation {
            Operation::Read { offset, buffers } => Work::Read(offset, buffers.to_vec()),
            Operation::Write {
                offset,
                buffers,
                durable,
            } => Work::Write(offset, buffers.to_vec(), durable),
            Operation::Flush => Work::Other(Operation::Flush),
            Operation::Discard { offset, len } => Work::Other(Operation::Discard { offset, len }),
            Operation::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => Work::Other(Operation::WriteZeroes {
                offset,
                len,
                may_unmap,
            }),
        }
    }

    fn operation(&self) -> Operation<'_> {
        match self {
            Work::Read(offset, buffers) => Operation::Read {
                offset: *offset,
                buffers,
            },
            Work::Write(offset, buffers, durable) => Operation::Write {
                offset: *offset,
                buffers,
                durable: *durable,
            },
            Work::Other(operation) => *operation,
        }
    }
}

/// Where a queue finds its completions.
struct Answers {
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    /// There may be something to take: nobody locks the inbox in vain.
    attention: AtomicBool,
}

/// What is done, and how the queue wants to hear of it. It is woken only if it sleeps: each way costs a system call.
struct Inbox {
    finished: Finished,
    /// By the eventfd.
    listening: bool,
    /// By `arrived`.
    waiting: bool,
}

/// Sends a completion when it is dropped, even by a thread that panics.
struct Reply {
    to: Arc<Answers>,
    completion: Option<Completion>,
}

impl Reply {
    fn send(mut self, result: io::Result<()>) {
        if let Some(completion) = &mut self.completion {
            completion.result = result;
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let mut inbox = lock(&self.to.inbox);
        if let Some(completion) = self.completion.take() {
            inbox.finished.push(completion);
        }
        self.to.attention.store(true, Ordering::Release);
        if inbox.listening {
            // The counter of an eventfd that is 0 takes a 1.
            let _ = inbox.finished.raise();
        }
        if inbox.waiting {
            self.to.arrived.notify_one();
        }
    }
}

/// What a thread that panicked left behind is whole: nothing here panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn next_job(&self) -> Option<Job> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closing {
                return None;
            }
            state.idle += 1;
            state = wait(&self.job, state);
            state.idle -= 1;
        }
    }
}

/// Counts a thread off, however it ends.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.threads -= 1;
        if state.threads == 0 {
            // Nobody is left to carry these out: their ends are told without the lock.
            let lost = std::mem::take(&mut state.jobs);
            drop(state);
            drop(lost);
        }
        self.0.ended.notify_all();
    }
}

impl Helpers {
    /// Starts `threads` threads, called `name` and a number, through `spawn`; `make` gives each what it carries requests out with.
    ///
    /// # Errors
    ///
    /// What `spawn` says. None of the threads are left then.
    pub fn new<F>(
        name: &str,
        threads: usize,
        spawn: &dyn Fn(String, Box<dyn FnOnce() + Send>) -> io::Result<()>,
        make: impl Fn() -> F,
    ) -> io::Result<Arc<Helpers>>
    where
        F: FnMut(&Operation<'_>) -> io::Result<()> + Send + 'static,
    {
        let helpers = Helpers {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                job: Condvar::new(),
                ended: Condvar::new(),
            }),
        };
        for number in 0..threads {
            lock(&helpers.shared.state).threads += 1;
            // Where the thread does not start, this is dropped with its closure.
            let ended = Ended(Arc::clone(&helpers.shared));
            let call = make();
            let body = move || {
                let ended = ended;
                // What it holds is gone before the thread is counted off, whether it returns or panics.
                let mut call = call;
                while let Some(Job { work, reply }) = ended.0.next_job() {
                    let result = call(&work.operation());
                    reply.send(result);
                }
            };
            spawn(format!("{name}{number}"), Box::new(body))?;
        }
        Ok(Arc::new(helpers))
    }

    /// A queue of `depth` requests, which are carried out in any order.
    ///
    /// # Errors
    ///
    /// When the kernel has no eventfd for it.
    pub fn open_io(self: &Arc<Self>, depth: usize) -> io::Result<HelperIo> {
        let finished = Finished::new(depth)?;
        Ok(HelperIo {
            event: finished.event()?,
            answers: Arc::new(Answers {
                inbox: Mutex::new(Inbox {
                    finished,
                    listening: true,
                    waiting: false,
                }),
                arrived: Condvar::new(),
                attention: AtomicBool::new(false),
            }),
            helpers: Arc::clone(self),
            submitted: Vec::with_capacity(depth),
            listening: true,
            told: true,
            in_flight: 0,
            depth,
        })
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.closing = true;
        self.shared.job.notify_all();
        while state.threads > 0 {
            state = wait(&self.shared.ended, state);
        }
    }
}

impl fmt::Debug for Helpers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.shared.state);
        write!(f, "Helpers({} threads)", state.threads)
    }
}

/// A queue whose requests [`Helpers`] carry out.
pub struct HelperIo {
    helpers: Arc<Helpers>,
    answers: Arc<Answers>,
    /// The eventfd of `answers`.
    event: EventFd,
    /// Until the kick.
    submitted: Vec<Job>,
    /// Whether the eventfd is to be kept, and whether the inbox knows.
    listening: bool,
    told: bool,
    in_flight: usize,
    depth: usize,
}

impl HelperIo {
    /// Tells the inbox how to tell of what comes.
    fn tell(&mut self) {
        if self.told != self.listening {
            let mut inbox = lock(&self.answers.inbox);
            inbox.listening = self.listening;
            self.told = self.listening;
            if self.listening {
                // The counter of an eventfd that is 0 takes a 1.
                let _ = inbox.finished.raise();
            }
        }
    }
}

impl DiskIo for HelperIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        if self.in_flight == self.depth {
            return Err(QueueFull { depth: self.depth });
        }
        let died = io::Error::other("the thread that carried the request out died");
        let job = Job {
            work: Work::new(&request.operation),
            reply: Reply {
                to: Arc::clone(&self.answers),
                completion: Some(Completion {
                    user_data: request.user_data,
                    result: Err(died),
                }),
            },
        };
        self.in_flight += 1;
        self.submitted.push(job);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.submitted.is_empty() {
            return Ok(());
        }
        self.tell();
        let shared = &self.helpers.shared;
        let mut state = lock(&shared.state);
        if state.threads == 0 {
            drop(state);
            // Dropping a job tells its end.
            self.submitted.clear();
            return Ok(());
        }
        let wanted = self.submitted.len().min(state.idle);
        state.jobs.extend(self.submitted.drain(..));
        drop(state);
        // Threads that are at work look for more by themselves.
        for _ in 0..wanted {
            shared.job.notify_one();
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        if !self.answers.attention.load(Ordering::Acquire) {
            return None;
        }
        let mut inbox = lock(&self.answers.inbox);
        let next = inbox.finished.take();
        if next.is_none() {
            self.answers.attention.store(false, Ordering::Release);
        } else {
            self.in_flight -= 1;
        }
        next
    }

    fn peek(&mut self) -> Option<bool> {
        Some(self.answers.attention.load(Ordering::Acquire))
    }

    fn listen(&mut self, on: bool) {
        self.listening = on;
        // With nothing in flight nothing comes, and the next kick tells.
        if self.in_flight > 0 {
            self.tell();
        }
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        crate::raw::borrow(&self.event)
    }

    fn wait(&mut self) -> io::Result<()> {
        self.kick()?;
        let mut inbox = lock(&self.answers.inbox);
        inbox.waiting = true;
        while inbox.finished.len() == 0 && self.in_flight > 0 {
            inbox = wait(&self.answers.arrived, inbox);
        }
        inbox.waiting = false;
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.depth
    }
}

impl Drop for HelperIo {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            // Cannot fail.
            let _ = self.wait();
            while self.next_completion().is_some() {}
        }
    }
}

impl fmt::Debug for HelperIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HelperIo")
            .field("in_flight", &self.in_flight)
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}
