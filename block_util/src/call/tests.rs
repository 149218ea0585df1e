//! Requests that functions carry out: completions, the descriptor, threads that die.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use super::*;

fn readable(io: &dyn DiskIo) -> bool {
    let mut fd = libc::pollfd {
        fd: io.completion_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which lives through the call.
    (unsafe { libc::poll(&raw mut fd, 1, 0) }) == 1
}

fn spawn(name: String, job: Box<dyn FnOnce() + Send>) -> io::Result<()> {
    std::thread::Builder::new().name(name).spawn(job).map(drop)
}

fn flush(user_data: u64) -> Request<'static> {
    Request {
        operation: Operation::Flush,
        user_data,
    }
}

#[test]
fn a_function_carries_requests_out_at_once() {
    let mut calls = 0;
    let mut io = CallIo::new(2, |_: &Operation<'_>| {
        calls += 1;
        if calls == 2 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    })
    .unwrap();
    io.submit(flush(1)).unwrap();
    assert!(!readable(&io), "before the kick");
    io.submit(flush(2)).unwrap();
    assert_eq!(io.submit(flush(3)), Err(QueueFull { depth: 2 }));
    io.kick().unwrap();
    assert!(readable(&io));
    let first = io.next_completion().unwrap();
    assert!(first.user_data == 1 && first.result.is_ok());
    assert!(readable(&io));
    let second = io.next_completion().unwrap();
    assert_eq!(
        second.result.unwrap_err().kind(),
        io::ErrorKind::Unsupported
    );
    assert!(io.next_completion().is_none() && !readable(&io));
    assert_eq!(io.in_flight(), 0);
}

/// Two threads; a request to discard waits for the sender of its length's number.
#[test]
fn threads_carry_out_what_does_not_wait_for_another() {
    let (go, gate) = channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    let helpers = Helpers::new("t", 2, &spawn, || {
        let gate = Arc::clone(&gate);
        move |operation: &Operation<'_>| {
            if let Operation::Discard { .. } = operation {
                gate.lock().unwrap().recv().map_err(io::Error::other)?;
            }
            Ok(())
        }
    })
    .unwrap();
    let (mut a, mut b) = (helpers.open_io(2).unwrap(), helpers.open_io(2).unwrap());
    let stuck = Request {
        operation: Operation::Discard { offset: 0, len: 1 },
        user_data: 1,
    };
    a.submit(stuck).unwrap();
    a.kick().unwrap();
    b.submit(flush(2)).unwrap();
    b.wait().unwrap();
    assert!(readable(&b) && !readable(&a));
    assert_eq!(b.next_completion().unwrap().user_data, 2);
    assert!(b.next_completion().is_none() && !readable(&b));
    assert_eq!((a.in_flight(), b.in_flight()), (1, 0));
    a.submit(flush(3)).unwrap();
    assert_eq!(a.submit(flush(4)), Err(QueueFull { depth: 2 }));
    go.send(()).unwrap();
    let mut order = Vec::new();
    while a.in_flight() > 0 {
        a.wait().unwrap();
        order.extend(std::iter::from_fn(|| a.next_completion()).map(|c| c.user_data));
    }
    order.sort_unstable();
    assert_eq!(order, [1, 3]);
}

/// Whoever looks by itself costs nobody the eventfd; who listens again is told of what came meanwhile.
#[test]
fn completions_that_nobody_listens_for_are_told_later() {
    let helpers = Helpers::new("t", 1, &spawn, || |_: &Operation<'_>| Ok(())).unwrap();
    let queues: [Box<dyn DiskIo>; 2] = [
        Box::new(helpers.open_io(4).unwrap()),
        Box::new(CallIo::new(4, |_: &Operation<'_>| Ok(())).unwrap()),
    ];
    for mut io in queues {
        assert_eq!(io.peek(), Some(false));
        io.listen(false);
        io.submit(flush(1)).unwrap();
        io.submit(flush(2)).unwrap();
        io.kick().unwrap();
        while io.peek() != Some(true) {
            std::thread::yield_now();
        }
        io.wait().unwrap();
        assert!(!readable(&*io), "{io:?}");
        assert!(io.next_completion().is_some());
        io.listen(true);
        io.wait().unwrap();
        assert!(readable(&*io), "{io:?}");
        assert!(io.next_completion().is_some() && io.next_completion().is_none());
        assert!(!readable(&*io) && io.in_flight() == 0);
        // And from now on as at the start.
        io.submit(flush(3)).unwrap();
        io.wait().unwrap();
        io.kick().unwrap();
        assert!(readable(&*io));
        assert_eq!(io.next_completion().map(|done| done.user_data), Some(3));
    }
}

#[test]
fn a_queue_that_is_dropped_waits_for_its_requests() {
    let (done, seen): (Sender<()>, _) = channel();
    let helpers = Helpers::new("t", 1, &spawn, || {
        let done = done.clone();
        move |_: &Operation<'_>| done.send(()).map_err(io::Error::other)
    })
    .unwrap();
    let mut io = helpers.open_io(8).unwrap();
    (0..8).for_each(|i| io.submit(flush(i)).unwrap());
    drop(io);
    assert_eq!(seen.try_iter().count(), 8);
    // And with the last handle the threads and what they hold are gone.
    drop(helpers);
    drop(done);
    assert!(seen.recv().is_err());
}

#[test]
fn a_thread_that_dies_fails_its_request_alone() {
    let helpers = Helpers::new("t", 2, &spawn, || {
        |operation: &Operation<'_>| match operation {
            Operation::Discard { .. } => panic!("told to"),
            _ => Ok(()),
        }
    })
    .unwrap();
    let mut io = helpers.open_io(4).unwrap();
    let discard = Operation::Discard { offset: 0, len: 1 };
    assert!((&mut io as &mut dyn DiskIo).run(discard).is_err());
    assert!((&mut io as &mut dyn DiskIo).run(Operation::Flush).is_ok());
    assert!((&mut io as &mut dyn DiskIo).run(discard).is_err());
    // Now there is no thread left.
    assert!((&mut io as &mut dyn DiskIo).run(Operation::Flush).is_err());
}

#[test]
fn threads_that_do_not_start_are_an_error() {
    let started = Mutex::new(0);
    let second_fails = |name: String, job: Box<dyn FnOnce() + Send>| {
        let mut started = started.lock().unwrap();
        *started += 1;
        if *started == 2 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        spawn(name, job)
    };
    let made = Helpers::new("t", 4, &second_fails, || |_: &Operation<'_>| Ok(()));
    assert_eq!(made.unwrap_err().kind(), io::ErrorKind::OutOfMemory);
}
