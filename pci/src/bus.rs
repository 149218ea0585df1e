//! A bus of 32 slots, function 0 only: which device is where, and where its BARs answer (PCI Local Bus 3.0 §3.2.2.3,
//! §6.2.5).
//!
//! A BAR answers where its register says as long as the command register lets it, all of it lies in a window, and nothing
//! else is there. One that is refused answers nowhere, though its register keeps what the guest wrote, and is tried again
//! whenever a BAR of the bus changes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use log::debug;
use thiserror::Error;
use vm_allocator::AllocatorError;
use vm_device::Bus;

use crate::bar::{AddressSpace, BARS, Bar, Bars};
use crate::device::{BarRegion, Bdf, PciDevice};
use crate::registers::{COMMAND, EXTENDED_SIZE, bar_register};
use crate::windows::Windows;

/// Slots of a bus.
pub const SLOTS: u8 = 32;

/// What can go wrong with devices and slots.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum PciBusError {
    /// There is no such slot.
    #[error("PCI slot {0} is not below {SLOTS}")]
    SlotOutside(u8),
    /// Another device is in the slot.
    #[error("there is a device in PCI slot {0}")]
    SlotTaken(u8),
    /// All slots are taken.
    #[error("all PCI slots of segment {0} are taken")]
    NoSlot(u16),
    /// The slot is empty.
    #[error("there is no device in PCI slot {0}")]
    SlotEmpty(u8),
    /// There is no room for a BAR.
    #[error("giving addresses to the BARs of the device for PCI slot {slot}")]
    NoAddress {
        /// The slot.
        slot: u8,
        /// Why not.
        #[source]
        source: AllocatorError,
    },
    /// A segment of that number is there.
    #[error("there are two PCI segments {0}")]
    SegmentTwice(u16),
}

/// Where each BAR answers.
type Mapped = [[Option<u64>; BARS]; SLOTS as usize];

/// One bus, bus 0 of its segment.
pub struct PciBus {
    segment: u16,
    windows: Windows,
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    slots: RwLock<[Option<Arc<dyn PciDevice>>; SLOTS as usize]>,
    /// Held while a device is added, removed, or written to in configuration space: BARs move one after the other.
    mapped: Mutex<Mapped>,
}

impl PciBus {
    /// An empty bus whose BARs lie in `windows` on `memory` and `ports`.
    #[must_use]
    pub fn new(segment: u16, windows: Windows, memory: Arc<Bus>, ports: Arc<Bus>) -> Self {
        Self {
            segment,
            windows,
            memory,
            ports,
            slots: RwLock::default(),
            mapped: Mutex::default(),
        }
    }

    /// Segment group number.
    #[must_use]
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// The place of slot `slot`.
    #[must_use]
    pub fn bdf(&self, slot: u8) -> Bdf {
        Bdf {
            segment: self.segment,
            device: slot,
            ..Bdf::default()
        }
    }

    /// Puts `device` in `slot`, or in the lowest free one but 0, which is the host bridge's. BARs with address 0 are given
    /// one; those that have one (restored) keep it. Returns the slot.
    ///
    /// # Errors
    /// The slot is taken or there is none, or an address for a BAR is lacking.
    pub fn add(&self, slot: Option<u8>, device: Arc<dyn PciDevice>) -> Result<u8, PciBusError> {
        let mut mapped = self.order();
        let slot = self.free_slot(slot)?;
        self.place(device.as_ref())
            .map_err(|source| PciBusError::NoAddress { slot, source })?;
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots[usize::from(slot)] = Some(device);
        drop(slots);
        self.settle(&mut mapped);
        Ok(slot)
    }

    /// Takes the device out of `slot`; its BARs answer no more.
    ///
    /// # Errors
    /// [`PciBusError::SlotEmpty`].
    pub fn remove(&self, slot: u8) -> Result<Arc<dyn PciDevice>, PciBusError> {
        let mut mapped = self.order();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let device = slots
            .get_mut(usize::from(slot))
            .and_then(Option::take)
            .ok_or(PciBusError::SlotEmpty(slot))?;
        drop(slots);
        let bars = device.bars();
        for bar in bars.into_iter().flatten() {
            if let Some(address) = mapped[usize::from(slot)][bar.index].take() {
                self.unmap(device.as_ref(), &bar, address);
            }
        }
        self.settle(&mut mapped);
        Ok(device)
    }

    /// The device in `slot`.
    #[must_use]
    pub fn device(&self, slot: u8) -> Option<Arc<dyn PciDevice>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(usize::from(slot)).cloned().flatten()
    }

    /// The slots that are taken, a bit each.
    #[must_use]
    pub fn taken_slots(&self) -> u32 {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let taken = slots.iter().enumerate().filter(|(_, slot)| slot.is_some());
        taken.fold(0, |bits, (slot, _)| bits | 1 << slot)
    }

    /// Where BAR `bar` of `slot` answers now.
    #[must_use]
    pub fn bar_address(&self, slot: u8, bar: usize) -> Option<u64> {
        *self.order().get(usize::from(slot))?.get(bar)?
    }

    /// Brings BARs in line with registers that changed by other ways than the guest's writes: a restore, a reset.
    pub fn refresh(&self) {
        self.settle(&mut self.order());
    }

    /// The guest reads `data.len()` bytes of configuration space at `offset` of `function` in `slot`: all ones where
    /// nothing is, or where the access goes past the function's 4 KiB.
    pub fn read_config(&self, slot: u8, function: u8, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(device) = self.target(slot, function, offset, data.len()) {
            for (at, part) in dwords(offset, data.len()) {
                device.read_config(at, &mut data[part]);
            }
        }
    }

    /// The guest writes `data` to configuration space at `offset` of `function` in `slot`, which does nothing where a read
    /// would give all ones.
    pub fn write_config(&self, slot: u8, function: u8, offset: u16, data: &[u8]) {
        let mut mapped = self.order();
        let Some(device) = self.target(slot, function, offset, data.len()) else {
            return;
        };
        for (at, part) in dwords(offset, data.len()) {
            device.write_config(at, &data[part]);
            let place = &mapped[usize::from(slot)];
            if (COMMAND..bar_register(BARS)).contains(&at)
                || wanted(&self.windows, &device.bars()) != *place
            {
                self.settle(&mut mapped);
            }
        }
    }

    fn order(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn target(
        &self,
        slot: u8,
        function: u8,
        offset: u16,
        len: usize,
    ) -> Option<Arc<dyn PciDevice>> {
        let end = usize::from(offset).checked_add(len)?;
        if function != 0 || end > usize::from(EXTENDED_SIZE) {
            return None;
        }
        self.device(slot)
    }

    fn free_slot(&self, wanted: Option<u8>) -> Result<u8, PciBusError> {
        let taken = self.taken_slots();
        match wanted {
            Some(slot) if slot >= SLOTS => Err(PciBusError::SlotOutside(slot)),
            Some(slot) if taken & 1 << slot != 0 => Err(PciBusError::SlotTaken(slot)),
            Some(slot) => Ok(slot),
            None => (1..SLOTS)
                .find(|slot| taken & 1 << slot == 0)
                .ok_or(PciBusError::NoSlot(self.segment)),
        }
    }

    /// Gives an address to each BAR of `device` that has none.
    fn place(&self, device: &dyn PciDevice) -> Result<(), AllocatorError> {
        let (wanted, mut taken): (Vec<Bar>, Vec<Bar>) = device
            .bars()
            .into_iter()
            .flatten()
            .partition(|bar| bar.address == 0);
        for slot in 0..SLOTS {
            if let Some(other) = self.device(slot) {
                taken.extend(other.bars().into_iter().flatten());
            }
        }
        let addresses = self.windows.place(&wanted, &taken)?;
        for (bar, address) in wanted.iter().zip(addresses) {
            let bytes = address.to_le_bytes();
            device.write_config(bar.register(), &bytes[..4]);
            if bar.kind.is_64bit() {
                device.write_config(bar.register() + 4, &bytes[4..]);
            }
        }
        Ok(())
    }

    /// Moves BARs to where the registers want them: first all away that leave, then in all that come.
    fn settle(&self, mapped: &mut Mapped) {
        let devices = (0..).zip(&mut *mapped).filter_map(|(slot, places)| {
            let device = self.device(slot)?;
            let bars = device.bars();
            Some((device, bars, places))
        });
        let mut devices: Vec<_> = devices.collect();
        for (device, bars, places) in &mut devices {
            let wanted = wanted(&self.windows, bars);
            for bar in bars.iter().flatten() {
                let place = &mut places[bar.index];
                if *place != wanted[bar.index]
                    && let Some(address) = place.take()
                {
                    self.unmap(device.as_ref(), bar, address);
                }
            }
        }
        for (device, bars, places) in &mut devices {
            let wanted = wanted(&self.windows, bars);
            for bar in bars.iter().flatten() {
                let place = &mut places[bar.index];
                if place.is_none() && wanted[bar.index].is_some() && self.map(device, bar) {
                    *place = Some(bar.address);
                }
            }
        }
    }

    fn bus_of(&self, bar: &Bar) -> &Bus {
        match bar.kind.space() {
            AddressSpace::Io => &self.ports,
            AddressSpace::Memory => &self.memory,
        }
    }

    fn map(&self, device: &Arc<dyn PciDevice>, bar: &Bar) -> bool {
        let region = Arc::new(BarRegion::new(device.clone(), bar.index));
        let bus = self.bus_of(bar);
        if let Err(error) = bus.insert(bar.address, bar.size, region) {
            debug!("BAR {} answers nowhere: {error}", bar.index);
            return false;
        }
        if let Err(error) = device.bar_mapped(bar.index, bar.address) {
            debug!("BAR {} cannot be at {:#x}: {error}", bar.index, bar.address);
            // It was put there just now.
            let _ = bus.remove(bar.address);
            return false;
        }
        true
    }

    fn unmap(&self, device: &dyn PciDevice, bar: &Bar, address: u64) {
        if let Err(error) = self.bus_of(bar).remove(address) {
            debug!("BAR {} was not where it answered: {error}", bar.index);
        }
        device.bar_unmapped(bar.index, address);
    }
}

/// Where BARs should answer.
fn wanted(windows: &Windows, bars: &Bars) -> [Option<u64>; BARS] {
    bars.map(|bar| {
        bar.filter(|bar| bar.decoded && windows.contain(bar))
            .map(|bar| bar.address)
    })
}

/// An access of `len` bytes at `offset` as accesses within aligned dwords: offset and part of the data of each.
fn dwords(offset: u16, len: usize) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        // The end is at most 4096.
        let at = offset + done as u16;
        let part = done..len.min(done + 4 - usize::from(at % 4));
        done = part.end;
        Some((at, part))
    })
}

/// The buses of a machine, one a segment.
#[derive(Default)]
pub struct Segments(Vec<Arc<PciBus>>);

impl Segments {
    /// Adds a segment.
    ///
    /// # Errors
    /// [`PciBusError::SegmentTwice`].
    pub fn add(&mut self, bus: Arc<PciBus>) -> Result<(), PciBusError> {
        if self.get(bus.segment()).is_some() {
            return Err(PciBusError::SegmentTwice(bus.segment()));
        }
        self.0.push(bus);
        Ok(())
    }

    /// The bus of segment `segment`.
    #[must_use]
    pub fn get(&self, segment: u16) -> Option<&Arc<PciBus>> {
        self.0.iter().find(|bus| bus.segment() == segment)
    }

    /// All of them, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<PciBus>> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests;
