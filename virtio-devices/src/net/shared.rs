//! What a network device, its workers and its control share: the host's end, and what the driver asked of it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_util::RateLimiter;
use net_util::{MacAddr, Offloads};
use vm_migration::MigrationError;
use vm_virtio::{EventSet, Source, VirtioInterrupt};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::PacketQueue;
use super::config::{Facts, MQ, SIZE, guest_offloads, host_offloads};
use super::state::NetV1;

pub(super) struct Shared {
    pub id: String,
    pub facts: Facts,
    /// The address that the device has after a reset.
    mac: MacAddr,
    pub limits: Limits,
    /// Of each pair, the host's end.
    ends: Vec<Box<dyn PacketQueue>>,
    /// For each pair, there is an event when it comes into use, or goes out of it.
    changes: Vec<EventFd>,
    /// How many pairs are in use, the first ones.
    pairs: AtomicU16,
    driver: Mutex<Driver>,
}

/// What the packets of all pairs together may be.
#[derive(Default)]
pub(super) struct Limits {
    pub receive: Option<Arc<RateLimiter>>,
    pub transmit: Option<Arc<RateLimiter>>,
}

/// What the driver chose, and whom to tell of changes.
struct Driver {
    mac: MacAddr,
    /// By a command.
    offloads: Option<u64>,
    link_up: bool,
    /// What the host's end was told.
    set: Offloads,
    /// For each pair, packets come to its end.
    attached: Vec<bool>,
    /// While the device works.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// The link changed meanwhile.
    changed: bool,
}

impl Shared {
    pub fn new(
        id: String,
        facts: Facts,
        mac: MacAddr,
        limits: Limits,
        ends: Vec<Box<dyn PacketQueue>>,
    ) -> io::Result<Self> {
        let changes = ends
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            driver: Mutex::new(Driver {
                mac,
                offloads: None,
                link_up: true,
                set: Offloads::empty(),
                attached: vec![true; ends.len()],
                interrupt: None,
                changed: false,
            }),
            id,
            facts,
            mac,
            limits,
            ends,
            changes,
            pairs: AtomicU16::new(1),
        })
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's end of a pair.
    pub fn end(&self, pair: u16) -> Option<&dyn PacketQueue> {
        self.ends.get(usize::from(pair)).map(|end| &**end)
    }

    /// The pair is in use.
    pub fn is_used(&self, pair: u16) -> bool {
        pair < self.pairs.load(Ordering::Acquire)
    }

    /// What to wait for to hear that a pair came into use, or went out of it.
    pub fn change(&self, pair: u16, token: u32) -> Option<Source> {
        let change = self.changes.get(usize::from(pair))?;
        Some(Source {
            fd: change.as_raw_fd(),
            events: EventSet::IN,
            token,
        })
    }

    /// It was heard.
    pub fn clear_change(&self, pair: u16) {
        if let Some(change) = self.changes.get(usize::from(pair)) {
            // Where there is no event it is as well.
            let _ = change.read();
        }
    }

    /// The configuration space.
    pub fn config(&self) -> [u8; SIZE] {
        let driver = self.driver();
        self.facts.bytes(driver.mac, driver.link_up)
    }

    /// Makes the host's end as a driver with `features` wants it, before the workers start.
    pub fn start(&self, features: u64) -> io::Result<()> {
        let mut driver = self.driver();
        let chosen = driver.offloads.unwrap_or(features) & guest_offloads(features);
        let pairs = match features & MQ {
            0 => 1,
            _ => self.pairs.load(Ordering::Acquire),
        };
        self.attach(&mut driver, pairs)?;
        self.offload(&mut driver, host_offloads(chosen))
    }

    /// The workers have started.
    pub fn started(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        let mut driver = self.driver();
        if std::mem::take(&mut driver.changed) {
            interrupt.config_changed();
        }
        driver.interrupt = Some(interrupt);
    }

    /// The workers are about to stop.
    pub fn stopped(&self) {
        self.driver().interrupt = None;
    }

    /// As after power-on. The host's end follows at the next start.
    pub fn reset(&self) {
        let mut driver = self.driver();
        driver.mac = self.mac;
        driver.offloads = None;
        driver.changed = false;
        self.pairs.store(1, Ordering::Release);
    }

    pub fn set_link(&self, up: bool) {
        let mut driver = self.driver();
        if std::mem::replace(&mut driver.link_up, up) == up {
            return;
        }
        match &driver.interrupt {
            Some(interrupt) => interrupt.config_changed(),
            None => driver.changed = true,
        }
    }

    pub fn set_mac(&self, mac: MacAddr) {
        self.driver().mac = mac;
    }

    /// Bits that the driver chose of its offloads.
    pub fn set_offloads(&self, chosen: u64) -> io::Result<()> {
        let mut driver = self.driver();
        self.offload(&mut driver, host_offloads(chosen))?;
        driver.offloads = Some(chosen);
        Ok(())
    }

    /// Uses so many pairs, 1 to as many as there are.
    pub fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        let mut driver = self.driver();
        let before = self.pairs.load(Ordering::Acquire);
        let set = self.attach(&mut driver, pairs);
        if set.is_err() {
            // As well as it goes: the driver goes on with what it had.
            let _ = self.attach(&mut driver, before);
        }
        set
    }

    fn offload(&self, driver: &mut Driver, offloads: Offloads) -> io::Result<()> {
        let ends = self.ends.iter().zip(&driver.attached);
        for (end, _) in ends.filter(|(_, attached)| **attached) {
            end.set_offloads(offloads)?;
        }
        driver.set = offloads;
        Ok(())
    }

    fn attach(&self, driver: &mut Driver, pairs: u16) -> io::Result<()> {
        for (index, (end, attached)) in self.ends.iter().zip(&mut driver.attached).enumerate() {
            let wanted = index < usize::from(pairs);
            if *attached == wanted {
                continue;
            }
            end.set_attached(wanted)?;
            *attached = wanted;
            if wanted {
                end.set_offloads(driver.set)?;
            }
        }
        if self.pairs.swap(pairs, Ordering::AcqRel) != pairs {
            for change in &self.changes {
                // A counter of 64 bits that is read does not overflow.
                let _ = change.write(1);
            }
        }
        Ok(())
    }

    pub fn save(&self) -> NetV1 {
        let driver = self.driver();
        NetV1 {
            mac: driver.mac,
            link_up: driver.link_up,
            pairs: self.pairs.load(Ordering::Acquire),
            offloads: driver.offloads,
        }
    }

    pub fn restore(&self, state: &NetV1) -> Result<(), MigrationError> {
        if state.pairs > self.facts.pairs {
            return Err(MigrationError::TooLong {
                what: "the list of queue pairs in use",
                size: u64::from(state.pairs),
                limit: u64::from(self.facts.pairs),
            });
        }
        let mut driver = self.driver();
        driver.mac = state.mac;
        driver.offloads = state.offloads;
        // The link is this host's: the driver hears of it if it is another.
        driver.changed = state.link_up != driver.link_up;
        self.pairs.store(state.pairs.max(1), Ordering::Release);
        Ok(())
    }
}
