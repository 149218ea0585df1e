//! A guest with one virtio device and a driver for it that knows nothing of its type.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vm_migration::Section;

use super::ring::{Descriptor, DriverQueue, Used};
use super::{MEMORY_SIZE, SEAM, TestInterrupt, TestMemory, memory, spawn};
use crate::feature::EVENT_IDX;
use crate::{DeviceCore, VirtioDevice, status};

/// Address from which on queues are laid out. What is below is for tests of their own.
const RINGS: u64 = 0x1_0000;

/// What a driver asks a device: bytes to read, then room to answer in.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Request {
    /// What the device reads.
    pub readable: Vec<u8>,
    /// Bytes that it may write.
    pub writable: u32,
}

/// A guest.
pub struct Guest {
    /// Its RAM.
    pub memory: TestMemory,
    /// The device, behind its registers.
    pub core: DeviceCore<TestMemory>,
    /// What the device says.
    pub interrupt: Arc<TestInterrupt>,
    /// The driver's side of all queues, once they are set up.
    pub queues: Vec<DriverQueue>,
    /// Where the next request's buffers may be.
    next_data: u64,
    /// Address of the answer of each chain, by queue and head.
    answers: Vec<Vec<u64>>,
}

impl Guest {
    /// A guest that has not looked at `device` yet.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice<TestMemory>>) -> Self {
        Self::with_memory(device, memory())
    }

    /// As [`new`](Self::new), with RAM that others have too.
    #[must_use]
    pub fn with_memory(device: Box<dyn VirtioDevice<TestMemory>>, memory: TestMemory) -> Self {
        let interrupt = Arc::new(TestInterrupt::default());
        let core = DeviceCore::new(device, 0, memory.clone(), interrupt.clone(), spawn())
            .expect("putting the device behind registers");
        Self {
            memory,
            core,
            interrupt,
            queues: Vec::new(),
            next_data: 0,
            answers: Vec::new(),
        }
    }

    /// A guest whose driver runs `device` with all that it offers.
    #[must_use]
    pub fn running(device: Box<dyn VirtioDevice<TestMemory>>) -> Self {
        let mut guest = Self::new(device);
        guest.start(u64::MAX);
        guest
    }

    /// From a reset to DRIVER_OK with all features that the device offers and `wanted` has.
    pub fn start(&mut self, wanted: u64) {
        let features = self.core.registers().offered_features() & wanted;
        assert!(self.negotiate(features), "features {features:#x} refused");
        self.set_up_queues();
        self.driver_ok();
        let status = self.core.registers().status();
        assert_eq!(status & status::NEEDS_RESET, 0, "the device does not start");
    }

    /// Up to FEATURES_OK. Whether the device accepts the features.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.write_status(status::ACKNOWLEDGE);
        self.write_status(status::DRIVER);
        for select in 0..2 {
            let registers = self.core.registers_mut();
            registers.select_driver_features(select);
            registers.write_driver_features((features >> (32 * select)) as u32);
        }
        self.write_status(status::FEATURES_OK);
        self.core.registers().status() & status::FEATURES_OK != 0
    }

    /// Sets a status bit. What goes wrong shows in the status.
    pub fn write_status(&mut self, bit: u8) {
        let status = self.core.registers().status() | bit;
        // An error is for the VMM's log.
        let _ = self.core.write_status(status);
    }

    /// Lays all queues out in memory, of their largest size but at most 256 entries, and enables them.
    pub fn set_up_queues(&mut self) {
        let registers = self.core.registers_mut();
        let event_idx = registers.features() & EVENT_IDX != 0;
        let mut base = RINGS;
        self.queues.clear();
        self.answers.clear();
        for index in 0..registers.queue_count() {
            registers.select_queue(index);
            registers.write_queue_size(registers.queue_max_size().min(256));
            let size = registers.queue_size();
            let queue = DriverQueue::new(&self.memory, base, size, event_idx);
            for (which, half, value) in queue.registers() {
                registers.write_queue_address(which, half, value);
            }
            registers.write_queue_ready(true);
            self.queues.push(queue);
            self.answers.push(vec![0; usize::from(size)]);
            base = (base + DriverQueue::bytes(size)).next_multiple_of(0x1000);
        }
        self.reuse_room();
        assert!(base < self.next_data, "the queues are too large for a test");
    }

    /// The last step.
    pub fn driver_ok(&mut self) {
        self.write_status(status::DRIVER_OK);
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.core.write_status(0).expect("resetting the device");
    }

    /// Lets [`room`](Self::room) give memory again that it gave before. No request may be with the device.
    pub fn reuse_room(&mut self) {
        // Close to the seam, so that requests soon lie across it.
        self.next_data = SEAM - 0x1000;
    }

    /// Room of `len` bytes for a buffer, in memory that no other buffer has.
    pub fn room(&mut self, len: usize) -> u64 {
        let address = self.next_data;
        self.next_data += (len as u64).next_multiple_of(16);
        assert!(
            self.next_data <= MEMORY_SIZE,
            "a test takes too much memory"
        );
        address
    }

    /// The buffers of `request`, each in pieces of at most `piece` bytes, and where the answer will be.
    pub fn buffers(&mut self, request: &Request, piece: u32) -> (Vec<Descriptor>, u64) {
        let asked = self.room(request.readable.len());
        self.memory
            .write_slice(&request.readable, GuestAddress(asked))
            .unwrap();
        let answer = self.room(request.writable as usize);
        let cut = |address: u64, len: u32, make: fn(u64, u32) -> Descriptor| {
            (0..len)
                .step_by(piece as usize)
                .map(move |offset| make(address + u64::from(offset), piece.min(len - offset)))
        };
        let readable = u32::try_from(request.readable.len()).unwrap();
        let buffers = cut(asked, readable, Descriptor::readable)
            .chain(cut(answer, request.writable, Descriptor::writable))
            .collect();
        (buffers, answer)
    }

    /// Makes `request` available in `queue`, in one buffer to read and one to write. The device is not notified. Gives its head.
    pub fn offer(&mut self, queue: u16, request: &Request) -> u16 {
        let (buffers, answer) = self.buffers(request, u32::MAX);
        let head = self.queues[usize::from(queue)]
            .add(&buffers)
            .expect("the queue is full");
        self.expect_answer(queue, head, answer);
        head
    }

    /// Tells where the answer to the chain `head` will be.
    pub fn expect_answer(&mut self, queue: u16, head: u16, address: u64) {
        self.answers[usize::from(queue)][usize::from(head)] = address;
    }

    /// Notifies the device, whether it wants to know or not.
    pub fn kick(&self, queue: u16) {
        self.core.kick(queue).unwrap().write(1).unwrap();
    }

    /// The next used chain of `queue`, and what the device wrote.
    pub fn take_used(&mut self, queue: u16) -> Option<(Used, Vec<u8>)> {
        let used = self.queues[usize::from(queue)].take_used()?;
        let address = self.answers[usize::from(queue)][used.head as usize];
        let mut answer = vec![0; used.len as usize];
        self.memory
            .read_slice(&mut answer, GuestAddress(address))
            .expect("the device says it wrote more than there is");
        Some((used, answer))
    }

    /// Waits for the next used chain of `queue`.
    pub fn wait_used(&mut self, queue: u16) -> (Used, Vec<u8>) {
        let interrupt = self.interrupt.clone();
        interrupt.wait_for("a used chain", || self.take_used(queue))
    }

    /// Offers `request`, notifies, waits: the answer.
    pub fn ask(&mut self, queue: u16, request: &Request) -> Vec<u8> {
        let head = self.offer(queue, request);
        self.kick(queue);
        let (used, answer) = self.wait_used(queue);
        assert_eq!(used.head, u32::from(head));
        answer
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&self) {
        self.interrupt.wait_for("NEEDS_RESET", || {
            (self.core.registers().status() & status::NEEDS_RESET != 0).then_some(())
        });
    }

    /// Pauses the device, saves it, ends it, and goes on with what `device` makes in its place, still paused.
    #[must_use]
    pub fn moved_to(mut self, device: impl FnOnce() -> Box<dyn VirtioDevice<TestMemory>>) -> Self {
        self.core.pause().expect("pausing the device");
        let [registers, own]: [Section; 2] = self.core.save("it").expect("saving the device");
        drop(self.core);
        let mut guest = Self::with_memory(device(), self.memory);
        guest
            .core
            .restore(&registers, &own)
            .expect("restoring the device");
        guest.queues = self.queues;
        guest.next_data = self.next_data;
        guest.answers = self.answers;
        guest
    }
}
