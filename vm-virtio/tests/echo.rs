//! A small device of two queues, put to the conformance suite: it proves queues, worker loop, state machine and the suite itself.
//!
//! Queue 0 answers each request with what it reads, each byte XORed with the key. Queue 1 does the same, but in its own time: it
//! takes chains, and completes them when an eventfd says so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::AsRawFd;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemory};
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Guest, Request, TestMemory};
use vm_virtio::{
    Activation, Chain, Context, DeviceError, DeviceMemory, DeviceQueue, EventSet, Fault, Outcome,
    QueueError, QueueHandler, RegistersV1, Source, VirtioDevice, Worker, read_config_bytes, status,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What XOR is done with, until the driver writes another.
const KEY: u8 = 0x5a;
/// A feature of no meaning.
const FEATURE: u64 = 1 << 3;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct EchoV1 {
    key: u8,
}

impl Schema for EchoV1 {
    const KIND: &'static str = "echo";
    const VERSION: u32 = 1;
}

/// Answers a chain: bytes written.
fn echo<M: GuestMemory>(chain: &Chain, memory: &M, key: u8) -> Result<u32, Fault> {
    let mut answer = chain.writer(memory);
    let mut asked = chain.reader(memory);
    let count = asked.left().min(answer.left());
    // Slice by slice, as a device does that has its data elsewhere.
    asked.slices(count, |slice| {
        let mut bytes = vec![0; slice.len()];
        slice
            .read_slice(&mut bytes, 0)
            .map_err(|_| Fault::Request("a slice is shorter than it says"))?;
        bytes.iter_mut().for_each(|byte| *byte ^= key);
        answer.write(&bytes)
    })?;
    Ok(u32::try_from(count).unwrap())
}

struct Prompt<M> {
    queue: DeviceQueue,
    memory: M,
    key: u8,
}

impl<M: DeviceMemory> QueueHandler for Prompt<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn on_queue(&mut self, _: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        let key = self.key;
        context.serve(&mut self.queue, &*memory, |chain| {
            Ok(Outcome::Used(echo(chain, &*memory, key)?))
        })
    }
}

/// Has room for `ROOM` requests.
struct Slow<M> {
    queue: DeviceQueue,
    memory: M,
    key: u8,
    in_flight: Vec<Chain>,
    /// Says that requests can be completed.
    done: EventFd,
}

const ROOM: usize = 3;
const DONE: u32 = 7;

impl<M: DeviceMemory> Slow<M> {
    /// The newest first, for order is free.
    fn complete(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        while let Some(chain) = self.in_flight.pop() {
            let written =
                echo(&chain, &*memory, self.key).map_err(|fault| self.queue.error(fault))?;
            self.queue.add_used(&*memory, chain.head(), written)?;
        }
        Ok(())
    }
}

impl<M: DeviceMemory> QueueHandler for Slow<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn on_queue(&mut self, _: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        let (in_flight, done) = (&mut self.in_flight, &self.done);
        context.serve(&mut self.queue, &*memory, |chain| {
            if in_flight.len() == ROOM {
                return Ok(Outcome::Later);
            }
            in_flight.push(std::mem::take(chain));
            done.write(1).unwrap();
            Ok(Outcome::InFlight)
        })
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.done.as_raw_fd(),
            events: EventSet::IN,
            token: DONE,
        }]
    }

    fn on_source(
        &mut self,
        token: u32,
        events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        assert_eq!((token, events), (DONE, EventSet::IN));
        self.done.read().unwrap();
        self.complete()?;
        self.on_queue(self.queue.index(), context)
    }

    fn on_stop(&mut self, _: &mut Context<'_>) -> Result<(), QueueError> {
        self.complete()
    }
}

struct Echo<M> {
    key: u8,
    /// One worker for both queues, each with its handler.
    worker: Option<Worker<Handler<M>>>,
}

enum Handler<M> {
    Prompt(Prompt<M>),
    Slow(Slow<M>),
}

impl<M: DeviceMemory> Handler<M> {
    fn inner(&mut self) -> &mut dyn QueueHandler {
        match self {
            Self::Prompt(handler) => handler,
            Self::Slow(handler) => handler,
        }
    }
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        self.inner().queues()
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.inner().on_queue(index, context)
    }

    fn sources(&self) -> Vec<Source> {
        match self {
            Self::Prompt(handler) => handler.sources(),
            Self::Slow(handler) => handler.sources(),
        }
    }

    fn on_source(
        &mut self,
        token: u32,
        events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        self.inner().on_source(token, events, context)
    }

    fn on_stop(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.inner().on_stop(context)
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Echo<M> {
    fn device_type(&self) -> u32 {
        0xec0
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn config_len(&self) -> usize {
        3
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&[self.key, 0xec, 0x0e], offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // For requests after the next start: this one is for tests.
        if let (0, [key, ..]) = (offset, data) {
            self.key = *key;
        }
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            spawn,
        } = activation;
        assert_eq!(features & !(RING_FEATURES | FEATURE), 0);
        assert!(self.worker.is_none(), "it works already");
        let done = EventFd::new(EFD_NONBLOCK)
            .map_err(|e| DeviceError::Device("creating an eventfd", e.into()))?;
        let [first, second] = <[DeviceQueue; 2]>::try_from(queues).expect("two queues");
        let handlers = vec![
            Handler::Prompt(Prompt {
                queue: first,
                memory: memory.clone(),
                key: self.key,
            }),
            Handler::Slow(Slow {
                queue: second,
                memory,
                key: self.key,
                in_flight: Vec::new(),
                done,
            }),
        ];
        self.worker = Some(Worker::start("echo", handlers, interrupt, &spawn)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        let Some(worker) = self.worker.take() else {
            return Ok(Vec::new());
        };
        let home = worker.stop()?.into_iter().map(|handler| match handler {
            Handler::Prompt(handler) => handler.queue,
            Handler::Slow(handler) => handler.queue,
        });
        Ok(home.collect())
    }

    fn reset(&mut self) {
        self.key = KEY;
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &EchoV1 { key: self.key })
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        self.key = section.decode::<EchoV1>()?.key;
        Ok(())
    }
}

fn device() -> Box<dyn VirtioDevice<TestMemory>> {
    Box::new(Echo {
        key: KEY,
        worker: None,
    })
}

/// The echo device, asked by one of its queues.
struct Echoes(u16);

impl Subject for Echoes {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        device()
    }

    fn queue(&self) -> u16 {
        self.0
    }

    fn request(&self, n: u32) -> Request {
        let len = 1 + n * 37 % 300;
        Request {
            readable: (0..len).map(|i| (i * 7 + n) as u8).collect(),
            writable: len + n % 2,
        }
    }

    fn check(&self, n: u32, answer: &[u8]) {
        let request = self.request(n);
        let expected: Vec<u8> = request.readable.iter().map(|byte| byte ^ KEY).collect();
        assert_eq!(answer, expected);
    }
}

vm_virtio::conformance!(prompt, Echoes(0));
vm_virtio::conformance!(slow, Echoes(1));

#[test]
fn a_driver_may_start_with_some_queues_only() {
    let mut guest = Guest::new(device());
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest.set_up_queues();
    let registers = guest.core.registers_mut();
    registers.select_queue(1);
    registers.write_queue_ready(false);
    guest.driver_ok();
    guest.offer(1, &Echoes(1).request(0));
    guest.kick(1);
    let answer = guest.ask(0, &Echoes(0).request(5));
    Echoes(0).check(5, &answer);
    guest = guest.moved_to(device);
    guest.core.resume().unwrap();
    let answer = guest.ask(0, &Echoes(0).request(6));
    Echoes(0).check(6, &answer);
    guest.core.pause().unwrap();
    assert_eq!(guest.take_used(1), None);
}

#[test]
fn a_fault_in_one_queue_leaves_the_other_alone() {
    let mut guest = Guest::running(device());
    guest.queues[0].offer(99);
    guest.kick(0);
    guest.wait_needs_reset();
    assert_eq!(guest.interrupt.config_count(), 1);
    let answer = guest.ask(1, &Echoes(1).request(3));
    Echoes(1).check(3, &answer);

    // The other is as it was, and what is saved says so.
    guest.offer(0, &Echoes(0).request(0));
    guest.kick(0);
    guest.core.pause().unwrap();
    assert_eq!(guest.take_used(0), None);
    let [registers, _] = guest.core.save("it").unwrap();
    let saved: RegistersV1 = registers.decode().unwrap();
    assert_eq!(
        [saved.queues[0].broken, saved.queues[1].broken],
        [true, false]
    );
    assert_eq!(saved.status & status::NEEDS_RESET, status::NEEDS_RESET);
}

#[test]
fn its_own_state_travels() {
    let mut guest = Guest::new(device());
    guest.core.write_config(0, &[0x11]);
    guest.start(u64::MAX);
    guest = guest.moved_to(device);
    guest.core.resume().unwrap();
    let request = Request {
        readable: vec![0x22, 0x33],
        writable: 2,
    };
    assert_eq!(guest.ask(0, &request), [0x33, 0x22]);
}

#[test]
fn a_changed_configuration_has_another_generation() {
    let mut guest = Guest::new(device());
    let before = guest.core.config_generation();
    guest.core.write_config(1, &[0xff]);
    assert_eq!(guest.core.config_generation(), before);
    guest.core.write_config(0, &[0x11]);
    assert_ne!(guest.core.config_generation(), before);
}

#[test]
fn state_of_another_device_is_refused() {
    let guest = Guest::new(device());
    let [registers, own] = guest.core.save("it").unwrap();
    let change = |change: &dyn Fn(&mut RegistersV1)| {
        let mut state: RegistersV1 = registers.decode().unwrap();
        change(&mut state);
        let section = Section::encode("it", &state).unwrap();
        let mut other = Guest::new(device());
        other
            .core
            .restore(&section, &own)
            .map_err(|e| e.to_string())
    };
    assert_eq!(change(&|_| {}), Ok(()));
    let with = |what| {
        Err(format!(
            "the saved state of virtio device \"it\" has {what}"
        ))
    };
    assert_eq!(
        change(&|state| state.queues.truncate(1)),
        with("another number of queues")
    );
    assert_eq!(
        change(&|state| state.queues[0].size = 32),
        with("queues of sizes that this device does not have")
    );
    assert_eq!(
        change(&|state| {
            state.status = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
            state.driver_features = 1 << 50 | 1 << 32;
        }),
        with("features that this device does not offer")
    );
    assert_eq!(
        change(&|state| state.status = 16),
        with("a status that there is not")
    );
    let mut other = Guest::new(device());
    assert!(other.core.restore(&own, &registers).is_err());
}
