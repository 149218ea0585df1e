//! A machine with one virtio device on its memory bus, and a driver that reaches it as a guest does: registers, doorbells, queues in memory,
//! an interrupt.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use vm_device::{Bus, Trigger};
use vm_memory::{Bytes, GuestAddress};
use vm_virtio::testing::{Descriptor, DriverQueue, TestMemory, memory, spawn};
use vm_virtio::{Half, QueueAddress, VirtioDevice, feature, status};
use vmm_sys_util::eventfd::EventFd;

use super::super::{Host, Notifications, SIZE, VirtioMmioDevice};

/// Where the device is.
const PAGE: u64 = 0xd000_0000;
/// What has not come by then never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// Queues are laid out from here on, and data from there on.
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;

/// An interrupt line whose edges can be waited for.
#[derive(Default)]
pub struct Line {
    edges: Mutex<u64>,
    changed: Condvar,
}

impl Line {
    /// Edges since the last call.
    pub fn take(&self) -> u64 {
        std::mem::take(&mut self.edges.lock().unwrap())
    }

    /// Waits for `done`, asking after each edge.
    pub fn wait_for<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        let mut edges = self.edges.lock().unwrap();
        loop {
            if let Some(found) = done() {
                return found;
            }
            let (guard, timeout) = self.changed.wait_timeout(edges, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "waited in vain for an interrupt");
            edges = guard;
        }
    }
}

impl Trigger for Line {
    fn trigger(&self) -> io::Result<()> {
        *self.edges.lock().unwrap() += 1;
        self.changed.notify_all();
        Ok(())
    }
}

/// What KVM's ioeventfds do.
#[derive(Default)]
pub struct Doorbells {
    queues: Mutex<BTreeMap<u16, EventFd>>,
    pub refuse: AtomicBool,
}

impl Doorbells {
    pub fn queues(&self) -> Vec<u16> {
        self.queues.lock().unwrap().keys().copied().collect()
    }
}

impl Notifications for Doorbells {
    fn connect(&self, queue: u16, event: &EventFd) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let event = event.try_clone().unwrap();
        let before = self.queues.lock().unwrap().insert(queue, event);
        assert!(before.is_none(), "connected twice");
        Ok(())
    }

    fn disconnect(&self, queue: u16, _: &EventFd) -> io::Result<()> {
        let found = self.queues.lock().unwrap().remove(&queue);
        found.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}

pub struct Machine {
    pub memory: TestMemory,
    pub bus: Bus,
    pub device: Arc<VirtioMmioDevice<TestMemory>>,
    pub line: Arc<Line>,
    pub doorbells: Arc<Doorbells>,
    pub queues: Vec<DriverQueue>,
    next_buffer: u64,
    answers: BTreeMap<(usize, u32), u64>,
}

impl Machine {
    pub fn new(device: Box<dyn VirtioDevice<TestMemory>>) -> Self {
        Self::with(device, memory(), Arc::default())
    }

    pub fn with(
        device: Box<dyn VirtioDevice<TestMemory>>,
        memory: TestMemory,
        doorbells: Arc<Doorbells>,
    ) -> Self {
        let line = Arc::new(Line::default());
        let host = Host {
            line: line.clone(),
            notifications: doorbells.clone(),
            spawn: spawn(),
            extra_features: 0,
        };
        let device = VirtioMmioDevice::new("it", device, memory.clone(), host).unwrap();
        let device = Arc::new(device);
        let bus = Bus::default();
        bus.insert(PAGE, SIZE, device.clone()).unwrap();
        Self {
            memory,
            bus,
            device,
            line,
            doorbells,
            queues: Vec::new(),
            next_buffer: BUFFERS,
            answers: BTreeMap::new(),
        }
    }

    pub fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        assert!(self.bus.read(PAGE + offset, &mut data));
        data
    }

    pub fn get(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        assert!(self.bus.write(PAGE + offset, data));
    }

    pub fn set(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Sets status bits.
    pub fn add_status(&self, bits: u8) {
        let status = self.get(0x70);
        self.set(0x70, status | u32::from(bits));
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.set(0x14, select);
            u64::from(self.get(0x10))
        };
        half(0) | half(1) << 32
    }

    /// Up to FEATURES_OK, with all features.
    pub fn negotiate(&self) {
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let features = self.offered();
        for select in 0..2 {
            self.set(0x24, select);
            self.set(0x20, (features >> (32 * select)) as u32);
        }
        self.add_status(status::FEATURES_OK);
        assert_ne!(self.get(0x70) & u32::from(status::FEATURES_OK), 0);
    }

    /// From a reset to DRIVER_OK, with all features and all queues.
    pub fn start(&mut self) {
        self.negotiate();
        let event_idx = self.offered() & feature::EVENT_IDX != 0;
        self.queues.clear();
        self.answers.clear();
        self.next_buffer = BUFFERS;
        let mut base = RINGS;
        for index in 0.. {
            self.set(0x30, index);
            let max = self.get(0x34);
            if max == 0 {
                break;
            }
            assert_eq!(self.get(0x44), 0, "ready before it was set up");
            let size = max.min(64) as u16;
            self.set(0x38, size.into());
            let queue = DriverQueue::new(&self.memory, base, size, event_idx);
            for (which, half, value) in queue.registers() {
                let at = match which {
                    QueueAddress::Descriptors => 0x80,
                    QueueAddress::Available => 0x90,
                    QueueAddress::Used => 0xa0,
                };
                self.set(at + if half == Half::High { 4 } else { 0 }, value);
            }
            self.set(0x44, 1);
            assert_eq!(self.get(0x44), 1);
            base = (base + DriverQueue::bytes(size)).next_multiple_of(0x1000);
            self.queues.push(queue);
        }
        self.add_status(status::DRIVER_OK);
        assert_eq!(self.get(0x70), 0xf, "it runs");
    }

    /// Makes a request available.
    pub fn offer(&mut self, queue: usize, asked: &[u8], room: u32) {
        let (at, answer) = (self.next_buffer, self.next_buffer + 0x100);
        self.next_buffer += 0x200;
        self.memory.write_slice(asked, GuestAddress(at)).unwrap();
        let buffers = [
            Descriptor::readable(at, asked.len() as u32),
            Descriptor::writable(answer, room),
        ];
        let head = self.queues[queue].add(&buffers).unwrap();
        self.answers.insert((queue, head.into()), answer);
    }

    /// As the guest's write of the register: by its doorbell, if it is connected.
    pub fn notify(&self, queue: u32) {
        let doorbells = self.doorbells.queues.lock().unwrap();
        let doorbell = u16::try_from(queue).ok().and_then(|q| doorbells.get(&q));
        match doorbell {
            Some(event) => event.write(1).unwrap(),
            None => self.set(0x50, queue),
        }
    }

    /// The next answer, if there is one.
    pub fn take_answer(&mut self, queue: usize) -> Option<Vec<u8>> {
        let used = self.queues[queue].take_used()?;
        let address = self.answers.remove(&(queue, used.head)).unwrap();
        let mut answer = vec![0; used.len as usize];
        self.memory
            .read_slice(&mut answer, GuestAddress(address))
            .unwrap();
        Some(answer)
    }

    /// Waits for an answer by the interrupt, and acknowledges it.
    pub fn wait_answer(&mut self, queue: usize) -> Vec<u8> {
        let line = self.line.clone();
        line.wait_for(|| {
            // As a driver does: what comes after the acknowledgement has an edge of its own.
            self.set(0x64, self.get(0x60));
            self.take_answer(queue)
        })
    }

    /// Asks, waits for the answer.
    pub fn ask(&mut self, queue: usize, asked: &[u8], room: u32) -> Vec<u8> {
        self.offer(queue, asked, room);
        self.notify(queue as u32);
        self.wait_answer(queue)
    }
}
