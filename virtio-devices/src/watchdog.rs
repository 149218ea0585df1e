//! The watchdog (virtio device type 35, which no specification describes yet): a driver that stops sending buffers has a hung guest.
//!
//! ```text
//!   off ──a buffer──> armed ──no buffer for the timeout──> expired: once, then off
//!    ^                  │ ^─────────a buffer: the timeout begins anew
//!    └──────reset───────┘
//! ```
//!
//! Each buffer of the one queue is given back at once; where it has a writable byte, that becomes 1. There is no configuration space. While
//! the device is paused no time passes, and the timeout begins anew when it resumes.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use log::debug;
use option_parser::OptionError;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_WATCHDOG;
use vm_memory::GuestMemory;
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, Chain, Context, DeviceError, DeviceMemory, DeviceQueue, EventSet, Fault, Outcome,
    QueueError, QueueHandler, Source, VirtioDevice, Worker,
};
use vmm_sys_util::timerfd::TimerFd;

use crate::offer::{HostError, Offer, Services};

/// As long as the drivers that there are expect.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Entries of the queue.
const QUEUE_SIZE: u16 = 16;
/// What a writable byte becomes.
const ALIVE: u8 = 1;

/// Whether there is one.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct WatchdogConfig(pub bool);

impl Offer for WatchdogConfig {
    const HELP: &'static str =
        "a device to which the guest gives signs of life; 15 s without one, and the VM starts anew";
    const VALUE: Option<&'static str> = None;

    fn parse(_: &'static str, _: &str) -> Result<Self, OptionError> {
        Ok(Self(true))
    }

    fn make<M: DeviceMemory>(
        &self,
        id: &str,
        services: &Services,
    ) -> Result<Option<Box<dyn VirtioDevice<M>>>, HostError> {
        if !self.0 {
            return Ok(None);
        }
        let start_anew = services.start_anew.clone();
        let expired = Arc::new(move || {
            start_anew(&format!(
                "the guest gave its watchdog no sign for {TIMEOUT:?}"
            ));
        });
        Ok(Some(Box::new(Watchdog::new(id, TIMEOUT, expired))))
    }
}

/// What is done when the time is over.
pub type Expired = Arc<dyn Fn() + Send + Sync>;

/// A watchdog.
pub struct Watchdog<M> {
    id: String,
    timeout: Duration,
    expired: Expired,
    armed: bool,
    worker: Option<Worker<Handler<M>>>,
}

impl<M> Watchdog<M> {
    /// Calls `expired`, on the device's thread, when the driver has sent a buffer and then none for `timeout`. `id` names the thread.
    pub fn new(id: &str, timeout: Duration, expired: Expired) -> Self {
        Self {
            id: id.to_owned(),
            timeout,
            expired,
            armed: false,
            worker: None,
        }
    }
}

/// What is saved.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WatchdogV1 {
    /// The driver has sent a buffer since it started.
    armed: bool,
}

impl Schema for WatchdogV1 {
    const KIND: &'static str = "virtio-watchdog";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioDevice<M> for Watchdog<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_WATCHDOG
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let timer = |error: io::Error| DeviceError::Device("its timer", Box::new(error));
        let mut handler = Handler {
            queues: activation.queues,
            memory: activation.memory,
            timer: TimerFd::new().map_err(|e| timer(e.into()))?,
            timeout: self.timeout,
            armed: self.armed,
            expired: self.expired.clone(),
        };
        if self.armed {
            handler.arm().map_err(timer)?;
        }
        self.worker = Some(Worker::start(
            &self.id,
            vec![handler],
            activation.interrupt,
            &activation.spawn,
        )?);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        let handlers = Worker::stop_any(&mut self.worker)?;
        if let Some(handler) = handlers.first() {
            self.armed = handler.armed;
        }
        Ok(handlers.into_iter().flat_map(|h| h.queues).collect())
    }

    fn reset(&mut self) {
        self.armed = false;
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &WatchdogV1 { armed: self.armed })
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let WatchdogV1 { armed } = section.decode()?;
        self.armed = armed;
        Ok(())
    }
}

/// Serves the queue and waits for the timer.
struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    timer: TimerFd,
    timeout: Duration,
    armed: bool,
    expired: Expired,
}

impl<M> Handler<M> {
    /// Begins the timeout.
    fn arm(&mut self) -> io::Result<()> {
        self.armed = true;
        Ok(self.timer.reset(self.timeout, None)?)
    }
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn on_queue(&mut self, _index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.first_mut() else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let mut alive = false;
        let served = context.serve(queue, &*memory, |chain| {
            alive = true;
            answer(&*memory, chain)
        });
        if alive && let Err(error) = self.arm() {
            debug!("the timer of the watchdog: {error}");
        }
        served
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.timer.as_raw_fd(),
            events: EventSet::IN,
            token: 0,
        }]
    }

    fn on_source(
        &mut self,
        _token: u32,
        _events: EventSet,
        _context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        // A buffer that came at the last moment has begun the timeout anew: then the timer runs.
        if self.timer.is_armed().unwrap_or(false) {
            return Ok(());
        }
        if let Err(error) = self.timer.clear() {
            debug!("the timer of the watchdog: {error}");
        }
        if std::mem::take(&mut self.armed) {
            (self.expired)();
        }
        Ok(())
    }
}

/// Lets the driver know that its buffer was seen.
fn answer<M: GuestMemory>(memory: &M, chain: &Chain) -> Result<Outcome, Fault> {
    if chain.writable_len() == 0 {
        return Ok(Outcome::Used(0));
    }
    chain.writer(memory).write(&[ALIVE])?;
    Ok(Outcome::Used(1))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use vm_virtio::testing::conformance::Subject;
    use vm_virtio::testing::{Guest, Request, TestMemory};

    use super::*;

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(1);

    fn device(timeout: Duration) -> (Box<dyn VirtioDevice<TestMemory>>, Receiver<()>) {
        let (sender, receiver) = channel();
        let expired = Arc::new(move || {
            // Some tests do not listen.
            let _ = sender.send(());
        });
        let device = Watchdog::new("watchdog", timeout, expired);
        (Box::new(device), receiver)
    }

    fn ping() -> Request {
        Request {
            readable: vec![0; 8],
            writable: 1,
        }
    }

    fn is_armed(guest: &mut Guest) -> bool {
        guest.core.pause().unwrap();
        let [_, section] = guest.core.save("watchdog").unwrap();
        guest.core.resume().unwrap();
        section.decode::<WatchdogV1>().unwrap().armed
    }

    struct Pinged;

    impl Subject for Pinged {
        fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
            device(LONG).0
        }

        fn request(&self, n: u32) -> Request {
            Request {
                readable: vec![0; n as usize % 9],
                writable: 1,
            }
        }

        fn check(&self, _: u32, answer: &[u8]) {
            assert_eq!(answer, [1]);
        }
    }

    vm_virtio::conformance!(conformance, Pinged);

    #[test]
    fn silence_expires_once_and_a_buffer_arms_it_again() {
        let (device, expired) = device(SHORT);
        let mut guest = Guest::running(device);
        for _ in 0..2 {
            assert_eq!(guest.ask(0, &ping()), [1]);
            expired.recv().unwrap();
            assert!(!is_armed(&mut guest));
        }
        drop(guest);
        // The device is gone, and with it the sender.
        assert!(expired.recv().is_err());
    }

    #[test]
    fn it_waits_for_the_first_buffer_and_a_reset_lets_it_wait_again() {
        let (device, _expired) = device(LONG);
        let mut guest = Guest::running(device);
        assert!(!is_armed(&mut guest));
        guest.ask(0, &ping());
        assert!(is_armed(&mut guest));
        guest.reset();
        guest.start(u64::MAX);
        assert!(!is_armed(&mut guest));
    }

    #[test]
    fn a_buffer_without_room_counts() {
        let (device, expired) = device(SHORT);
        let mut guest = Guest::running(device);
        let mute = Request {
            readable: vec![7; 3],
            writable: 0,
        };
        assert_eq!(guest.ask(0, &mute), Vec::<u8>::new());
        expired.recv().unwrap();
    }

    #[test]
    fn what_was_armed_is_armed_elsewhere() {
        let mut guest = Guest::running(device(LONG).0);
        guest.ask(0, &ping());
        let (there, expired) = device(SHORT);
        let mut guest = guest.moved_to(|| there);
        guest.core.resume().unwrap();
        expired.recv().unwrap();
    }
}
