//! The suite that every virtio device is put to: what the specification asks of any device, and what a hostile driver tries on all of
//! them. [`conformance!`](crate::conformance) makes one test of each function here.
//!
//! A device passes if it answers requests however they are cut, loses none over pause, reset and move, and if whatever it is given
//! makes it use the chain or ask for a reset, after which it works again.

use super::attack::ATTACKS;
use super::guest::{Guest, Request};
use super::{MEMORY_SIZE, TestMemory, memory};
use crate::feature::{INDIRECT_DESC, RING_PACKED, VERSION_1};
use crate::{Half, QueueAddress, VirtioDevice, status};

/// A device to be tested, and something it can be asked.
pub trait Subject {
    /// A new device. Each is equal to the others: what one saved another restores. There is one at a time.
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>>;

    /// Its guest's memory: for a device that needs memory of a kind.
    fn memory(&self) -> TestMemory {
        memory()
    }

    /// The queue that takes requests and answers each by itself.
    fn queue(&self) -> u16 {
        0
    }

    /// Request number `n`. At least one byte can be read or written.
    fn request(&self, n: u32) -> Request;

    /// Panics if `answer`, the bytes that the device wrote, is not the one to request number `n`.
    fn check(&self, n: u32, answer: &[u8]);
}

/// Tests of a device: `conformance!(module_name, subject)`, where `subject` is an expression whose value is a
/// [`Subject`](crate::testing::conformance::Subject). `tests/echo.rs` of this crate shows a whole device put to it.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $subject:expr) => {
        $crate::conformance!(@tests $name, $subject, [
            features configuration requests framing late_writes rings_out_of_memory
            reset pause_and_resume save_and_restore hostile_chains
        ]);
    };
    (@tests $name:ident, $subject:expr, [$($test:ident)*]) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $(
                #[test]
                fn $test() {
                    $crate::testing::conformance::$test(&$subject);
                }
            )*
        }
    };
}

/// A guest that has not looked at its device yet.
fn new(subject: &dyn Subject) -> Guest {
    Guest::with_memory(subject.device(), subject.memory())
}

/// A guest whose driver runs the device with all that it offers.
fn running(subject: &dyn Subject) -> Guest {
    let mut guest = new(subject);
    guest.start(u64::MAX);
    guest
}

/// Request number `n` is asked, waited for and checked.
fn ask(guest: &mut Guest, subject: &dyn Subject, n: u32) {
    let answer = guest.ask(subject.queue(), &subject.request(n));
    subject.check(n, &answer);
}

/// Requests that are offered, by head.
struct Offered(Vec<(u16, u32)>);

impl Offered {
    /// Offers requests number `first` to `last - 1`. The device is not notified.
    fn new(guest: &mut Guest, subject: &dyn Subject, first: u32, last: u32) -> Self {
        let offer = |n| (guest.offer(subject.queue(), &subject.request(n)), n);
        Self((first..last).map(offer).collect())
    }

    /// Waits for the answers to all of them, in whatever order.
    fn finish(mut self, guest: &mut Guest, subject: &dyn Subject) {
        while !self.0.is_empty() {
            let (used, answer) = guest.wait_used(subject.queue());
            let place = self
                .0
                .iter()
                .position(|(head, _)| u32::from(*head) == used.head)
                .expect("a chain is used twice");
            let (_, n) = self.0.swap_remove(place);
            assert!(used.len <= subject.request(n).writable);
            subject.check(n, &answer);
        }
        assert_eq!(guest.take_used(subject.queue()), None);
    }
}

/// As many requests as the queue can take at once, but no more than 32.
fn batch(guest: &Guest, subject: &dyn Subject) -> u32 {
    let size = guest.queues[usize::from(subject.queue())].size();
    u32::from(size / 2).clamp(1, 32)
}

/// Features are accepted if they were offered and VERSION_1 is among them, and not otherwise.
pub fn features(subject: &dyn Subject) {
    let mut guest = new(subject);
    let offered = guest.core.registers().offered_features();
    assert_ne!(offered & VERSION_1, 0, "VERSION_1 must be offered");
    assert_eq!(offered & RING_PACKED, 0, "packed rings are not served");

    assert!(guest.negotiate(offered));
    guest
        .core
        .registers_mut()
        .write_driver_features(0x5555_5555);
    assert_eq!(guest.core.registers().features(), offered, "they are fixed");

    guest.reset();
    assert!(!guest.negotiate(offered & !VERSION_1));
    for bit in (0..64).filter(|bit| offered & 1 << bit == 0) {
        guest.reset();
        assert!(!guest.negotiate(VERSION_1 | 1 << bit), "bit {bit}");
        guest.driver_ok();
        assert!(!guest.core.registers().is_running());
    }
    guest.reset();
    assert!(guest.negotiate(VERSION_1));
}

/// The configuration space can be read and written anywhere, in any width; past its end there are zeros.
pub fn configuration(subject: &dyn Subject) {
    let mut guest = running(subject);
    let len = guest.core.config_len() as u64;
    let generation = guest.core.config_generation();
    for offset in (0..len + 9).chain([u64::from(u32::MAX), u64::MAX]) {
        for width in [0, 1, 2, 4, 8] {
            let mut data = [0xee; 8];
            guest.core.read_config(offset, &mut data[..width]);
            let ours = len.saturating_sub(offset).min(8) as usize;
            if ours < width {
                assert!(data[ours..width].iter().all(|byte| *byte == 0));
            }
        }
    }
    assert_eq!(guest.core.config_generation(), generation);
    ask(&mut guest, subject, 0);
    for offset in (0..len + 9).chain([u64::MAX]) {
        for width in [1, 2, 4, 8] {
            guest.core.write_config(offset, &[0xa5; 8][..width]);
        }
    }
    guest.reset();
    guest.start(u64::MAX);
    ask(&mut guest, subject, 1);
}

/// Requests are answered with all features and with none, but not before DRIVER_OK; many more than there are entries.
pub fn requests(subject: &dyn Subject) {
    for wanted in [u64::MAX, VERSION_1] {
        let mut guest = new(subject);
        let features = guest.core.registers().offered_features() & wanted;
        assert!(guest.negotiate(features));
        guest.set_up_queues();
        let early = Offered::new(&mut guest, subject, 0, 1);
        guest.kick(subject.queue());
        assert_eq!(guest.take_used(subject.queue()), None);
        guest.driver_ok();
        early.finish(&mut guest, subject);

        let batch = batch(&guest, subject);
        let last = 64.max(2 * batch);
        for first in (1..last).step_by(batch as usize) {
            guest.reuse_room();
            let offered = Offered::new(&mut guest, subject, first, last.min(first + batch));
            guest.kick(subject.queue());
            offered.finish(&mut guest, subject);
        }
    }
}

/// It does not matter how a request is cut into buffers, nor whether they are in an indirect table (§2.7.4.1).
pub fn framing(subject: &dyn Subject) {
    let mut guest = running(subject);
    let queue = subject.queue();
    let indirect = guest.core.registers().features() & INDIRECT_DESC != 0;
    let room = u32::from(guest.queues[usize::from(queue)].size()).min(64);
    for n in 0..8 {
        let request = subject.request(n);
        let all = u32::try_from(request.readable.len()).unwrap() + request.writable;
        // Two of the pieces are shorter: at the end of either part.
        let piece = all / room.saturating_sub(2).max(1) + 1 + n / 2;
        let (buffers, answer) = guest.buffers(&request, piece);
        if buffers.len() > room as usize {
            continue;
        }
        let head = if indirect && n % 2 == 1 {
            let table = guest.room(16 * buffers.len());
            guest.queues[usize::from(queue)].add_indirect(table, &buffers)
        } else {
            guest.queues[usize::from(queue)].add(&buffers)
        };
        guest.expect_answer(queue, head.unwrap(), answer);
        guest.kick(queue);
        let (_, answer) = guest.wait_used(queue);
        subject.check(n, &answer);
    }
}

/// Once the device runs, writes to feature and queue registers change nothing.
pub fn late_writes(subject: &dyn Subject) {
    let mut guest = running(subject);
    let registers = guest.core.registers_mut();
    registers.select_queue(subject.queue());
    let before = registers.save();
    registers.write_queue_size(registers.queue_size() / 2);
    for which in [
        QueueAddress::Descriptors,
        QueueAddress::Available,
        QueueAddress::Used,
    ] {
        registers.write_queue_address(which, Half::Low, 0x1000);
        registers.write_queue_address(which, Half::High, 1);
    }
    registers.write_queue_ready(false);
    registers.write_driver_features(0);
    assert_eq!(registers.save(), before);
    ask(&mut guest, subject, 0);
    guest.driver_ok();
    ask(&mut guest, subject, 1);
}

/// Rings that are not in memory, or not aligned, make the device ask for a reset when it should start.
pub fn rings_out_of_memory(subject: &dyn Subject) {
    let mut guest = new(subject);
    for which in [
        QueueAddress::Descriptors,
        QueueAddress::Available,
        QueueAddress::Used,
    ] {
        for address in [MEMORY_SIZE, MEMORY_SIZE - 16, 0x1001, !15] {
            let offered = guest.core.registers().offered_features();
            assert!(guest.negotiate(offered));
            guest.set_up_queues();
            let registers = guest.core.registers_mut();
            registers.select_queue(subject.queue());
            registers.write_queue_ready(false);
            registers.write_queue_address(which, Half::Low, address as u32);
            registers.write_queue_address(which, Half::High, (address >> 32) as u32);
            registers.write_queue_ready(true);
            guest.driver_ok();
            let status = guest.core.registers().status();
            assert_ne!(status & status::NEEDS_RESET, 0, "{which:?} {address:#x}");
            assert!(!guest.core.is_active());
            guest.reset();
        }
    }
    guest.start(u64::MAX);
    ask(&mut guest, subject, 0);
}

/// A reset is complete when the write of the status returns, whatever the device was doing.
pub fn reset(subject: &dyn Subject) {
    let mut guest = new(subject);
    for steps in 0..4 {
        let offered = guest.core.registers().offered_features();
        if steps > 0 {
            assert!(guest.negotiate(offered));
        }
        if steps > 1 {
            guest.set_up_queues();
        }
        if steps > 2 {
            guest.driver_ok();
            let batch = batch(&guest, subject);
            drop(Offered::new(&mut guest, subject, 0, batch));
            guest.kick(subject.queue());
        }
        guest.reset();
        assert!(!guest.core.is_active());
        let registers = guest.core.registers_mut();
        assert_eq!((registers.status(), registers.features()), (0, 0));
        for index in 0..registers.queue_count() {
            registers.select_queue(index);
            assert!(!registers.queue_ready());
        }
    }
    guest.start(u64::MAX);
    ask(&mut guest, subject, 0);
}

/// A paused device touches nothing; resumed, it answers all there is, without being notified again.
pub fn pause_and_resume(subject: &dyn Subject) {
    let mut guest = running(subject);
    let batch = batch(&guest, subject);
    for round in 0..3 {
        let (first, last) = (round * batch, (round + 1) * batch);
        let mut offered = Offered::new(&mut guest, subject, first, first + batch / 2);
        guest.kick(subject.queue());
        guest.core.pause().unwrap();
        guest.core.pause().unwrap();
        let used = guest.queues[usize::from(subject.queue())].used_index();
        let more = Offered::new(&mut guest, subject, first + batch / 2, last);
        offered.0.extend(more.0);
        guest.kick(subject.queue());
        assert_eq!(
            guest.queues[usize::from(subject.queue())].used_index(),
            used
        );
        guest.core.resume().unwrap();
        guest.core.resume().unwrap();
        offered.finish(&mut guest, subject);
    }
}

/// Saved and restored at any stage, requests in flight or not, another device goes on where the first was.
pub fn save_and_restore(subject: &dyn Subject) {
    let mut guest = new(subject).moved_to(|| subject.device());
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest = guest.moved_to(|| subject.device());
    guest.set_up_queues();
    let before = guest.core.registers().save();
    guest = guest.moved_to(|| subject.device());
    assert_eq!(guest.core.registers().save(), before);
    guest.core.resume().unwrap();
    assert!(!guest.core.is_active(), "DRIVER_OK was not there yet");
    guest.driver_ok();

    let batch = batch(&guest, subject);
    for round in 0..3 {
        let offered = Offered::new(&mut guest, subject, round * batch, (round + 1) * batch);
        guest.kick(subject.queue());
        assert!(guest.core.save("it").is_err(), "it is at work");
        guest = guest.moved_to(|| subject.device());
        guest.core.resume().unwrap();
        offered.finish(&mut guest, subject);
    }
}

/// Chains that no driver may make, with all features negotiated and with none: the device uses them or asks for a reset, and works after it.
pub fn hostile_chains(subject: &dyn Subject) {
    let mut guest = new(subject);
    let queue = usize::from(subject.queue());
    for ((name, attack), wanted) in ATTACKS
        .iter()
        .flat_map(|attack| [(attack, u64::MAX), (attack, VERSION_1)])
    {
        guest.start(wanted);
        ask(&mut guest, subject, 0);
        let used = guest.queues[queue].used_index();
        attack(&mut guest, subject.queue(), &subject.request(1));
        guest.kick(subject.queue());
        let interrupt = guest.interrupt.clone();
        interrupt.wait_for(name, || {
            let asks = guest.core.registers().status() & status::NEEDS_RESET != 0;
            let uses = guest.queues[queue].used_index() != used;
            (asks || uses).then_some(())
        });
        guest.reset();
    }
    guest.start(u64::MAX);
    ask(&mut guest, subject, 2);
}
