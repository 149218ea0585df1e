//! The worker loop with handlers that do odd things.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::*;
use crate::feature::{EVENT_IDX, RING_FEATURES, VERSION_1};
use crate::testing::{Descriptor, DriverQueue, TestInterrupt, TestMemory, memory, spawn};
use crate::{Fault, Outcome};

fn queue(index: u16, memory: &TestMemory, features: u64) -> (DriverQueue, DeviceQueue) {
    let base = 0x1_0000 * (u64::from(index) + 1);
    let driver = DriverQueue::new(memory, base, 64, features & EVENT_IDX != 0);
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let device = DeviceQueue::new(index, 64, &driver.state(), features, &**memory, kick).unwrap();
    (driver, device)
}

fn kick(queue: &DeviceQueue) -> EventFd {
    queue.kick().try_clone().unwrap()
}

type OnQueue = Box<dyn FnMut(&mut DeviceQueue, &mut Context<'_>) -> Result<(), QueueError> + Send>;
type OnSource =
    Box<dyn FnMut(&mut DeviceQueue, u32, &mut Context<'_>) -> Result<(), QueueError> + Send>;

/// A handler of one queue, made of closures.
struct Scripted {
    queue: DeviceQueue,
    on_queue: OnQueue,
    sources: Vec<Source>,
    on_source: OnSource,
    stopped: bool,
}

impl Scripted {
    fn new(
        queue: DeviceQueue,
        on_queue: impl FnMut(&mut DeviceQueue, &mut Context<'_>) -> Result<(), QueueError>
        + Send
        + 'static,
    ) -> Self {
        Self {
            queue,
            on_queue: Box::new(on_queue),
            sources: Vec::new(),
            on_source: Box::new(|_, _, _| Ok(())),
            stopped: false,
        }
    }
}

impl QueueHandler for Scripted {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn on_queue(&mut self, _: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        (self.on_queue)(&mut self.queue, context)
    }

    fn sources(&self) -> Vec<Source> {
        self.sources.clone()
    }

    fn on_source(
        &mut self,
        token: u32,
        _: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        (self.on_source)(&mut self.queue, token, context)
    }

    fn on_stop(&mut self, _: &mut Context<'_>) -> Result<(), QueueError> {
        self.stopped = true;
        Ok(())
    }
}

fn start(handlers: Vec<Scripted>) -> (Worker<Scripted>, Arc<TestInterrupt>) {
    let interrupt = Arc::new(TestInterrupt::default());
    let worker = Worker::start("w", handlers, interrupt.clone(), &spawn()).unwrap();
    (worker, interrupt)
}

#[test]
fn each_queue_is_served_at_the_start_and_comes_home() {
    let memory = memory();
    let (sender, calls) = channel();
    let handlers = (0..3).map(|index| {
        let sender = sender.clone();
        Scripted::new(queue(index, &memory, VERSION_1).1, move |queue, _| {
            let thread = thread::current().name().map(str::to_owned);
            sender.send((queue.index(), thread)).unwrap();
            Ok(())
        })
    });
    let (worker, interrupt) = start(handlers.collect());
    let served: Vec<_> = calls.iter().take(3).collect();
    for index in 0..3 {
        assert!(served.contains(&(index, Some("w".to_owned()))));
    }
    let home = worker.stop().unwrap();
    assert_eq!(
        home.iter()
            .map(|h| (h.queue.index(), h.stopped))
            .collect::<Vec<_>>(),
        [(0, true), (1, true), (2, true)]
    );
    assert_eq!(interrupt.config_count(), 0);
}

/// Driver and device each notify only when the other wants to know. A notification that is lost ends it all.
#[test]
fn no_wake_up_is_lost_either_way() {
    for features in [VERSION_1, RING_FEATURES] {
        let memory = memory();
        let (mut driver, device) = queue(0, &memory, features);
        let notify = kick(&device);
        let (ram, kicks) = (memory.clone(), AtomicUsize::new(0));
        let handler = Scripted::new(device, move |queue, context| {
            context.serve(queue, &*ram, |chain| {
                Ok(Outcome::Used(u32::from(chain.head()) + 1))
            })
        });
        let (worker, interrupt) = start(vec![handler]);
        let (mut asked, mut answered) = (0, 0);
        const ALL: u32 = 20_000;
        while answered < ALL {
            let before = asked;
            // Batches of several sizes.
            while asked < ALL && asked - before < 1 + answered % 7 {
                let Some(_) = driver.add(&[Descriptor::writable(0x1000, 64)]) else {
                    break;
                };
                asked += 1;
                if driver.wants_kick(1) {
                    kicks.fetch_add(1, Ordering::Relaxed);
                    notify.write(1).unwrap();
                }
            }
            let used = interrupt.wait_for("a used chain", || driver.take_used());
            assert_eq!(used.len, used.head + 1);
            answered += 1;
            while let Some(used) = driver.take_used() {
                assert_eq!(used.len, used.head + 1);
                answered += 1;
            }
        }
        assert_eq!((asked, driver.take_used()), (ALL, None));
        let home = worker.stop().unwrap();
        assert_eq!(home[0].queue.in_flight(), 0);
        assert!(kicks.into_inner() <= ALL as usize);
    }
}

#[test]
fn a_handler_that_always_wants_more_can_be_stopped() {
    let memory = memory();
    let (sender, calls) = channel();
    let busy = Scripted::new(
        queue(0, &memory, VERSION_1).1,
        move |queue: &mut DeviceQueue, context: &mut Context<'_>| {
            context.again(queue.index());
            context.again(queue.index());
            Ok(())
        },
    );
    let other = queue(1, &memory, VERSION_1).1;
    let notify = kick(&other);
    let other = Scripted::new(other, move |_, _| {
        sender.send(()).unwrap();
        Ok(())
    });
    let (worker, _) = start(vec![busy, other]);
    for _ in 0..3 {
        calls.recv().unwrap();
        notify.write(1).unwrap();
    }
    assert_eq!(worker.stop().unwrap().len(), 2);
}

#[test]
fn a_fault_ends_the_service_of_its_queue_and_its_source() {
    let memory = memory();
    let bad = queue(0, &memory, VERSION_1).1;
    let good = queue(1, &memory, VERSION_1).1;
    let (bad_kick, good_kick) = (kick(&bad), kick(&good));
    let source = EventFd::new(EFD_NONBLOCK).unwrap();
    source.write(1).unwrap();

    let events: Arc<Mutex<Vec<&str>>> = Arc::default();
    let (log, log2, log3) = (events.clone(), events.clone(), events.clone());
    let mut first = Scripted::new(bad, move |queue, _| {
        log.lock().unwrap().push("bad queue");
        Err(queue.error(Fault::Request("bad")))
    });
    first.sources = vec![Source {
        fd: source.as_raw_fd(),
        events: EventSet::IN,
        token: 5,
    }];
    // Level-triggered, and not read: it would come without end.
    first.on_source = Box::new(move |queue, token, _| {
        assert_eq!(token, 5);
        log2.lock().unwrap().push("bad source");
        Err(queue.error(Fault::Request("bad")))
    });
    let (sender, calls) = channel();
    let second = Scripted::new(good, move |_, _| {
        log3.lock().unwrap().push("good queue");
        sender.send(()).unwrap();
        Ok(())
    });
    let (worker, interrupt) = start(vec![first, second]);
    calls.recv().unwrap();
    interrupt.wait_for("the fault", || {
        (events.lock().unwrap().len() >= 2).then_some(())
    });
    for _ in 0..5 {
        bad_kick.write(1).unwrap();
        good_kick.write(1).unwrap();
        calls.recv().unwrap();
    }
    let home = worker.stop().unwrap();
    assert_eq!(
        [home[0].queue.is_served(), home[1].queue.is_served()],
        [false, true]
    );
    let events = events.lock().unwrap();
    let count = |what| events.iter().filter(|event| **event == what).count();
    assert_eq!(count("bad source"), 1);
    assert!(count("bad queue") <= 1, "{events:?}");
    assert_eq!(count("good queue"), 6);
    assert!(interrupt.config_count() >= 1);
}

#[test]
fn sources_come_and_go() {
    let memory = memory();
    let device = queue(0, &memory, VERSION_1).1;
    let notify = kick(&device);
    let (one, two) = (
        Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
    );
    let (sender, calls): (Sender<u32>, _) = channel();
    let (first, second) = (one.clone(), two.clone());
    let mut handler = Scripted::new(device, move |_, context| {
        let source = |fd: &EventFd, token| Source {
            fd: fd.as_raw_fd(),
            events: EventSet::IN,
            token,
        };
        context.watch(&source(&first, 1)).unwrap();
        // The same again is no error, but the token is not another's.
        context.watch(&source(&first, 1)).unwrap();
        assert!(context.watch(&source(&second, 1)).is_err());
        context.watch(&source(&second, 2)).unwrap();
        Ok(())
    });
    let first = one.clone();
    handler.on_source = Box::new(move |_, token, context| {
        sender.send(token).unwrap();
        if token == 1 {
            first.read().unwrap();
        } else {
            // Not read: it must not come again.
            context.unwatch(2);
            context.unwatch(3);
        }
        Ok(())
    });
    let (worker, _) = start(vec![handler]);
    one.write(1).unwrap();
    assert_eq!(calls.recv().unwrap(), 1);
    two.write(1).unwrap();
    assert_eq!(calls.recv().unwrap(), 2);
    one.write(1).unwrap();
    assert_eq!(calls.recv().unwrap(), 1);
    // And it can be watched again.
    notify.write(1).unwrap();
    assert_eq!(calls.recv().unwrap(), 2);
    worker.stop().unwrap();
    assert_eq!(calls.iter().count(), 0);
}

#[test]
fn what_cannot_be_waited_for_is_refused() {
    let memory = memory();
    let file = File::open("/proc/self/exe").unwrap();
    let mut handler = Scripted::new(queue(0, &memory, VERSION_1).1, |_, _| Ok(()));
    handler.sources = vec![Source {
        fd: file.as_raw_fd(),
        events: EventSet::IN,
        token: 0,
    }];
    let interrupt = Arc::new(TestInterrupt::default());
    let error = Worker::start("w", vec![handler], interrupt, &spawn())
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "worker \"w\" cannot wait for its descriptors"
    );
}

#[test]
fn a_thread_that_does_not_start_or_ends_is_an_error() {
    let memory = memory();
    let handler = |f: fn()| {
        Scripted::new(queue(0, &memory, VERSION_1).1, move |_, _| {
            f();
            Ok(())
        })
    };
    let interrupt = Arc::new(TestInterrupt::default());
    let no_threads: Spawn = Arc::new(|_, _| Err(io::ErrorKind::OutOfMemory.into()));
    let error = Worker::start("w", vec![handler(|| {})], interrupt.clone(), &no_threads)
        .err()
        .unwrap();
    assert_eq!(error.to_string(), "starting thread \"w\"");

    // As a panic does, but without its noise: the job is dropped.
    let dies: Spawn = Arc::new(|_, job| {
        drop(job);
        Ok(())
    });
    let worker = Worker::start("w", vec![handler(|| {})], interrupt, &dies).unwrap();
    let error = worker.stop().err().unwrap();
    assert_eq!(
        error.to_string(),
        "thread \"w\" is gone, and its queues with it"
    );
}

#[test]
fn a_dropped_worker_is_gone_before_its_queues_are_used_again() {
    let memory = memory();
    let (sender, calls) = channel();
    let handler = Scripted::new(queue(0, &memory, VERSION_1).1, move |_, _| {
        sender.send(()).unwrap();
        Ok(())
    });
    let (worker, _) = start(vec![handler]);
    drop(worker);
    // The handler and its sender are gone: the channel ends.
    assert!(calls.iter().count() <= 1);
}
