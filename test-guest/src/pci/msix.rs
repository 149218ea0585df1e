//! MSI-X: a table of vectors, each with address, data and mask (PCI 3.0 §6.8.2).

use super::Function;
use crate::map;

const MSIX: u8 = 0x11;

/// A function's MSI-X.
#[derive(Clone, Copy)]
pub struct Msix {
    function: Function,
    capability: u16,
    table: u64,
    pending: u64,
    /// How many vectors the table has.
    pub count: u16,
}

impl Msix {
    /// Finds it; `None` where there is none or its table can't be reached.
    pub fn open(function: Function) -> Option<Self> {
        let (capability, _) = function.capabilities().find(|c| c.1 == MSIX)?;
        let count = (function.read16(capability + 2) & 0x7ff) + 1;
        let place = |at: u16, size: u64| {
            let register = function.read32(capability + at);
            let bar = function.bar_address((register & 7) as u8)?;
            map::device(bar + u64::from(register & !7), size)
        };
        Some(Self {
            function,
            capability,
            table: place(4, u64::from(count) * 16)?,
            pending: place(8, u64::from(count).div_ceil(64) * 8)?,
            count,
        })
    }

    /// Sends `entry` to a vector of the processor with this APIC id, unmasked.
    pub fn route(&self, entry: u16, vector: u8, apic_id: u32) {
        let at = self.entry(entry);
        self.mask(entry, true);
        map::write(at, 0xfee0_0000u32 | apic_id << 12);
        map::write(at + 4, 0u32);
        map::write(at + 8, u32::from(vector));
        self.mask(entry, false);
    }

    /// Writes the data of an entry and leaves the rest.
    pub fn write_data(&self, entry: u16, data: u32) {
        map::write(self.entry(entry) + 8, data);
    }

    /// Masks one entry or lets it through.
    pub fn mask(&self, entry: u16, masked: bool) {
        map::write(self.entry(entry) + 12, u32::from(masked));
    }

    /// True when `entry` waits for being unmasked.
    pub fn is_pending(&self, entry: u16) -> bool {
        let word: u32 = map::read(self.pending + u64::from(entry / 32) * 4);
        word >> (entry % 32) & 1 != 0
    }

    /// Address, data and control of an entry, as it reads.
    pub fn read(&self, entry: u16) -> (u64, u32, u32) {
        let at = self.entry(entry);
        let (low, high): (u32, u32) = (map::read(at), map::read(at + 4));
        (
            u64::from(high) << 32 | u64::from(low),
            map::read(at + 8),
            map::read(at + 12),
        )
    }

    /// Switches it on or off, and masks all entries at once or doesn't.
    pub fn enable(&self, on: bool, mask_all: bool) {
        let value = u16::from(on) << 15 | u16::from(mask_all) << 14;
        self.function.write16(self.capability + 2, value);
    }

    fn entry(&self, entry: u16) -> u64 {
        self.table + u64::from(entry) * 16
    }
}
