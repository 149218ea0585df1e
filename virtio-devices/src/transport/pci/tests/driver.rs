//! A machine with a PCI bus and one virtio device on it, and a driver that reaches it as a guest does: configuration space, BAR,
//! doorbells, queues in memory, messages.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pci::{MsiMessage, MsiSink, PciBus, Windows, registers};
use vm_device::Bus;
use vm_memory::{Bytes, GuestAddress};
use vm_virtio::testing::{Descriptor, DriverQueue, TestMemory, memory, spawn};
use vm_virtio::{Half, QueueAddress, VirtioDevice, feature, status};
use vmm_sys_util::eventfd::EventFd;

use super::super::{Host, Notifications, VirtioPciDevice};

/// What has not come by then never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where 64-bit BARs may be.
pub const WINDOW: u64 = 1 << 32;
/// Messages of vector `n` have this and `n` as data.
const DATA: u32 = 0x4000;
const ADDRESS: u32 = 0xfee0_1000;
/// Queues are laid out from here on, and data from there on.
const RINGS: u64 = 0x1_0000;
pub const BUFFERS: u64 = 0x10_0000;

/// Takes messages, which can be waited for.
#[derive(Default)]
pub struct Messages {
    routes: Mutex<BTreeMap<u16, MsiMessage>>,
    sent: Mutex<Vec<u16>>,
    changed: Condvar,
    /// Messages may be any.
    pub lax: AtomicBool,
}

impl Messages {
    /// The vectors that were sent since the last call.
    pub fn take(&self) -> Vec<u16> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    /// Waits for a message of `vector`, and takes it.
    pub fn expect(&self, vector: u16) {
        let sent = self.sent.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(sent, PATIENCE, |sent| !sent.contains(&vector))
            .unwrap();
        let mut sent = waited.0;
        let place = sent.iter().position(|sent| *sent == vector);
        sent.remove(place.expect("waited in vain for a message"));
    }

    /// Waits for `done`, asking after each message.
    pub fn wait_for<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        let mut sent = self.sent.lock().unwrap();
        loop {
            if let Some(found) = done() {
                return found;
            }
            let (guard, timeout) = self.changed.wait_timeout(sent, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "waited in vain for a message");
            sent = guard;
        }
    }
}

impl MsiSink for Messages {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap();
        match message {
            Some(message) => routes.insert(vector, message),
            None => routes.remove(&vector),
        };
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        let route = self.routes.lock().unwrap().get(&vector).copied();
        let message = route.expect("sent without a route");
        if !self.lax.load(Ordering::SeqCst) {
            assert_eq!(message.address, u64::from(ADDRESS));
            assert_eq!(message.data, DATA + u32::from(vector));
        }
        self.sent.lock().unwrap().push(vector);
        self.changed.notify_all();
        Ok(())
    }
}

/// What KVM's ioeventfds do.
#[derive(Default)]
pub struct Doorbells {
    at: Mutex<BTreeMap<u64, EventFd>>,
    pub refuse: AtomicBool,
}

impl Doorbells {
    pub fn addresses(&self) -> Vec<u64> {
        self.at.lock().unwrap().keys().copied().collect()
    }
}

impl Notifications for Doorbells {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let before = self
            .at
            .lock()
            .unwrap()
            .insert(address, event.try_clone().unwrap());
        assert!(before.is_none(), "connected twice");
        Ok(())
    }

    fn disconnect(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let found = self.at.lock().unwrap().remove(&address);
        found.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}

/// A capability of a vendor's: where it is, and the region it tells of.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub at: u16,
    pub len: u8,
    pub kind: u8,
    pub bar: u8,
    pub offset: u32,
    pub size: u32,
}

pub struct Machine {
    pub memory: TestMemory,
    pub mmio: Arc<Bus>,
    pub bus: Arc<PciBus>,
    pub slot: u8,
    pub messages: Arc<Messages>,
    pub doorbells: Arc<Doorbells>,
    pub device: Arc<VirtioPciDevice<TestMemory>>,
    pub queues: Vec<DriverQueue>,
    regions: Vec<Region>,
}

/// Puts `device` behind the transport.
pub fn transport(
    device: Box<dyn VirtioDevice<TestMemory>>,
    memory: &TestMemory,
    messages: &Arc<Messages>,
    doorbells: &Arc<Doorbells>,
) -> VirtioPciDevice<TestMemory> {
    let host = Host {
        msi: messages.clone(),
        notifications: doorbells.clone(),
        spawn: spawn(),
        extra_features: 0,
    };
    VirtioPciDevice::new("it", device, memory.clone(), host).unwrap()
}

impl Machine {
    /// A machine with `device`, whose BAR answers.
    pub fn new(device: Box<dyn VirtioDevice<TestMemory>>) -> Self {
        let machine = Self::with(device, memory(), Arc::default(), |_| {});
        machine.write_config(registers::COMMAND, &6_u16.to_le_bytes());
        machine
    }

    /// A machine with `device`, on which `prepare` is called before it is on the bus.
    pub fn with(
        device: Box<dyn VirtioDevice<TestMemory>>,
        memory: TestMemory,
        doorbells: Arc<Doorbells>,
        prepare: impl FnOnce(&VirtioPciDevice<TestMemory>),
    ) -> Self {
        let messages = Arc::default();
        let device = Arc::new(transport(device, &memory, &messages, &doorbells));
        prepare(&device);
        let (mmio, ports) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let windows = Windows {
            memory64: Some(WINDOW..=(2 << 32) - 1),
            ..Windows::default()
        };
        let bus = Arc::new(PciBus::new(0, windows, mmio.clone(), ports));
        let slot = bus.add(None, device.clone()).unwrap();
        let mut machine = Self {
            memory,
            mmio,
            bus,
            slot,
            messages,
            doorbells,
            device,
            queues: Vec::new(),
            regions: Vec::new(),
        };
        machine.regions = machine
            .capabilities()
            .iter()
            .filter(|(id, _)| *id == registers::CAPABILITY_VENDOR)
            .map(|(_, at)| machine.region_at(*at))
            .collect();
        machine
    }

    pub fn read_config<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.bus.read_config(self.slot, 0, offset, &mut data);
        data
    }

    pub fn write_config(&self, offset: u16, data: &[u8]) {
        self.bus.write_config(self.slot, 0, offset, data);
    }

    /// Ids and offsets of all capabilities, in order.
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let [mut at] = self.read_config(registers::CAPABILITIES);
        while at != 0 {
            let [id, next] = self.read_config(u16::from(at));
            found.push((id, u16::from(at)));
            at = next;
        }
        found
    }

    fn region_at(&self, at: u16) -> Region {
        let [_, _, len, kind] = self.read_config(at);
        let [bar] = self.read_config(at + 4);
        Region {
            at,
            len,
            kind,
            bar,
            offset: u32::from_le_bytes(self.read_config(at + 8)),
            size: u32::from_le_bytes(self.read_config(at + 12)),
        }
    }

    /// The vendor's capability of that kind.
    pub fn region(&self, kind: u8) -> Region {
        let found = self.regions.iter().find(|region| region.kind == kind);
        *found.expect("there is no such capability")
    }

    pub fn bar(&self) -> u64 {
        self.bus
            .bar_address(self.slot, 0)
            .expect("BAR 0 does not answer")
    }

    pub fn read<const N: usize>(&self, kind: u8, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        let address = self.bar() + u64::from(self.region(kind).offset) + offset;
        assert!(self.mmio.read(address, &mut data));
        data
    }

    /// Writes to the region, and what lies there by a doorbell.
    pub fn write(&self, kind: u8, offset: u64, data: &[u8]) {
        self.write_at(
            self.bar() + u64::from(self.region(kind).offset) + offset,
            data,
        );
    }

    pub fn write_at(&self, address: u64, data: &[u8]) {
        match self.doorbells.at.lock().unwrap().get(&address) {
            Some(event) => event.write(1).unwrap(),
            None => assert!(self.mmio.write(address, data)),
        }
    }

    /// A register of the common configuration.
    pub fn get<const N: usize>(&self, offset: u64) -> u64 {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.read::<N>(1, offset));
        u64::from_le_bytes(wide)
    }

    pub fn set<const N: usize>(&self, offset: u64, value: u64) {
        self.write(1, offset, &value.to_le_bytes()[..N]);
    }

    pub fn status(&self) -> u8 {
        self.get::<1>(0x14) as u8
    }

    pub fn set_status(&self, bit: u8) {
        self.set::<1>(0x14, u64::from(self.status() | bit));
    }

    pub fn offered(&self) -> u64 {
        self.set::<4>(0, 0);
        let low = self.get::<4>(4);
        self.set::<4>(0, 1);
        low | self.get::<4>(4) << 32
    }

    /// Up to FEATURES_OK. Whether the device accepts the features.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::DRIVER);
        for half in 0..2 {
            self.set::<4>(8, half);
            self.set::<4>(0xc, features >> (32 * half) & 0xffff_ffff);
        }
        self.set_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// MSI-X: a message for each vector, none masked.
    pub fn enable_msix(&self) {
        let capability = self.msix();
        let count = u16::from_le_bytes(self.read_config(capability + 2)) & 0x7ff;
        let table = u32::from_le_bytes(self.read_config(capability + 4));
        assert_eq!(table & 7, 0);
        for vector in 0..=u64::from(count) {
            let entry = self.bar() + u64::from(table) + 16 * vector;
            let words = [ADDRESS, 0, DATA + vector as u32, 0];
            for (place, word) in (0..).zip(words) {
                self.write_at(entry + 4 * place, &word.to_le_bytes());
            }
        }
        self.write_config(capability + 2, &0x8000_u16.to_le_bytes());
    }

    /// Offset of the MSI-X capability.
    pub fn msix(&self) -> u16 {
        let capabilities = self.capabilities();
        let found = capabilities
            .iter()
            .find(|(id, _)| *id == registers::CAPABILITY_MSIX);
        found.unwrap().1
    }

    /// Lays out and enables all queues, queue `n` with vector `n + 1`; vector 0 is for the configuration.
    pub fn set_up_queues(&mut self, event_idx: bool) {
        self.set::<2>(0x10, 0);
        self.queues.clear();
        let mut base = RINGS;
        for index in 0..self.get::<2>(0x12) {
            self.set::<2>(0x16, index);
            self.set::<2>(0x18, self.get::<2>(0x18).min(64));
            self.set::<2>(0x1a, index + 1);
            assert_eq!(self.get::<2>(0x1a), index + 1);
            let queue = DriverQueue::new(&self.memory, base, 64, event_idx);
            for (which, half, value) in queue.registers() {
                let register = match which {
                    QueueAddress::Descriptors => 0x20,
                    QueueAddress::Available => 0x28,
                    QueueAddress::Used => 0x30,
                };
                let register = register + if half == Half::High { 4 } else { 0 };
                self.set::<4>(register, u64::from(value));
            }
            self.set::<2>(0x1c, 1);
            self.queues.push(queue);
            base = (base + DriverQueue::bytes(64)).next_multiple_of(0x1000);
        }
        assert!(base <= BUFFERS);
    }

    /// From a reset to DRIVER_OK, with all features and MSI-X.
    pub fn start(&mut self) {
        let offered = self.offered();
        assert!(self.negotiate(offered));
        self.enable_msix();
        self.set_up_queues(offered & feature::EVENT_IDX != 0);
        self.set_status(status::DRIVER_OK);
        assert_eq!(self.status() & status::NEEDS_RESET, 0);
    }

    /// Address of the notification of queue `index`.
    pub fn doorbell(&self, index: u16) -> u64 {
        self.set::<2>(0x16, u64::from(index));
        let region = self.region(2);
        let multiplier = u32::from_le_bytes(self.read_config(region.at + 16));
        let offset = self.get::<2>(0x1e) * u64::from(multiplier);
        assert!(offset + 2 <= u64::from(region.size));
        self.bar() + u64::from(region.offset) + offset
    }

    pub fn notify(&self, index: u16) {
        self.write_at(self.doorbell(index), &index.to_le_bytes());
    }

    /// Offers `request` and room for `writable` bytes at `BUFFERS`, and notifies.
    pub fn offer(&mut self, queue: u16, request: &[u8], writable: u32) {
        let mut buffers = Vec::new();
        if !request.is_empty() {
            self.memory
                .write_slice(request, GuestAddress(BUFFERS))
                .unwrap();
            buffers.push(Descriptor::readable(BUFFERS, request.len() as u32));
        }
        buffers.push(Descriptor::writable(BUFFERS + 0x8_0000, writable));
        self.queues[usize::from(queue)].add(&buffers).unwrap();
        self.notify(queue);
    }

    /// What was written to the next used chain, if there is one.
    pub fn take_answer(&mut self, queue: u16) -> Option<Vec<u8>> {
        let used = self.queues[usize::from(queue)].take_used()?;
        let mut answer = vec![0; used.len as usize];
        self.memory
            .read_slice(&mut answer, GuestAddress(BUFFERS + 0x8_0000))
            .unwrap();
        Some(answer)
    }

    /// Offers, notifies, waits for the message of the queue, and only then looks: who looks before may get no message.
    pub fn ask(&mut self, queue: u16, request: &[u8], writable: u32) -> Vec<u8> {
        self.offer(queue, request, writable);
        self.messages.expect(queue + 1);
        self.take_answer(queue).expect("a message for nothing")
    }
}
