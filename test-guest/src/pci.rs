//! PCI: configuration space by ports 0xcf8 and 0xcfc and by ECAM, base address registers, capabilities, MSI-X
//! (PCI Local Bus 3.0 §3.2.2.3, §6; PCI Express 4.0 §7.2.2).

pub mod msix;

use crate::cpu::{inb, inl, inw, outb, outl, outw};
use crate::{acpi, map};

/// Configuration address port.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// Configuration data port, 4 bytes.
pub const DATA_PORT: u16 = 0xcfc;

/// Command register: answer in port space.
pub const COMMAND_IO: u16 = 1;
/// Command register: answer in memory space.
pub const COMMAND_MEMORY: u16 = 2;

/// Command register: may read and write memory and send MSIs.
pub const COMMAND_MASTER: u16 = 4;

const COMMAND: u16 = 4;
const FIRST_BAR: u16 = 0x10;

/// A function on segment 0, whether or not there is one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Function {
    /// Bus.
    pub bus: u8,
    /// Device, below 32.
    pub device: u8,
    /// Function, below 8.
    pub function: u8,
}

impl core::fmt::Display for Function {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// Space that a base address register is about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere.
    Memory64,
}

/// A base address register, or a pair of them.
#[derive(Clone, Copy)]
pub struct Bar {
    /// Number of the (first) register, below 6.
    pub index: u8,
    /// Its space.
    pub space: Space,
    /// Prefetchable.
    pub prefetch: bool,
    /// Address it holds.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl Bar {
    /// True when the two share an address in the same space.
    pub fn overlaps(&self, other: &Bar) -> bool {
        (self.space == Space::Io) == (other.space == Space::Io)
            && self.address < other.address + other.size
            && other.address < self.address + self.size
    }
}

impl Function {
    /// The function at an address.
    pub const fn at(bus: u8, device: u8, function: u8) -> Self {
        Self {
            bus,
            device,
            function,
        }
    }

    fn select(self, offset: u16) -> u16 {
        let devfn = u32::from(self.device) << 3 | u32::from(self.function);
        let place = u32::from(self.bus) << 16 | devfn << 8 | u32::from(offset & 0xfc);
        outl(ADDRESS_PORT, 1 << 31 | place);
        DATA_PORT + (offset & 3)
    }

    /// Reads a byte.
    pub fn read8(self, offset: u16) -> u8 {
        inb(self.select(offset))
    }

    /// Reads two bytes.
    pub fn read16(self, offset: u16) -> u16 {
        inw(self.select(offset))
    }

    /// Reads four bytes.
    pub fn read32(self, offset: u16) -> u32 {
        inl(self.select(offset))
    }

    /// Writes a byte.
    pub fn write8(self, offset: u16, value: u8) {
        outb(self.select(offset), value);
    }

    /// Writes two bytes.
    pub fn write16(self, offset: u16, value: u16) {
        outw(self.select(offset), value);
    }

    /// Writes four bytes.
    pub fn write32(self, offset: u16, value: u32) {
        outl(self.select(offset), value);
    }

    /// Where its 4096 bytes of configuration space are in memory, if the MCFG has its bus.
    pub fn ecam(self) -> Option<u64> {
        let (base, first, last) = acpi::ecam()?;
        if !(first..=last).contains(&self.bus) {
            return None;
        }
        let at = u64::from(self.bus) << 20
            | u64::from(self.device) << 15
            | u64::from(self.function) << 12;
        map::device(base.checked_add(at)?, 4096)
    }

    /// True when somebody is there.
    pub fn exists(self) -> bool {
        self.read16(0) != 0xffff
    }

    /// Vendor and device id.
    pub fn ids(self) -> (u16, u16) {
        let both = self.read32(0);
        (both as u16, (both >> 16) as u16)
    }

    /// True when the header says that there are more functions than number 0.
    pub fn is_multifunction(self) -> bool {
        self.read8(0xe) & 0x80 != 0
    }

    /// The command register.
    pub fn command(self) -> u16 {
        self.read16(COMMAND)
    }

    /// Writes the command register.
    pub fn set_command(self, value: u16) {
        self.write16(COMMAND, value);
    }

    /// Its base address registers, sized with decoding off and left as they were.
    pub fn bars(self) -> impl Iterator<Item = Bar> {
        let registers = match self.read8(0xe) & 0x7f {
            0 => 6,
            1 => 2,
            _ => 0,
        };
        let mut next = 0;
        core::iter::from_fn(move || {
            while next < registers {
                let index = next;
                next += 1;
                if let Some(bar) = self.bar(index) {
                    next += u8::from(bar.space == Space::Memory64);
                    return Some(bar);
                }
            }
            None
        })
    }

    /// One base address register, sized; `None` where there is none.
    pub fn bar(self, index: u8) -> Option<Bar> {
        let at = FIRST_BAR + u16::from(index) * 4;
        let command = self.command();
        self.set_command(command & !(COMMAND_IO | COMMAND_MEMORY));
        let low = self.size_register(at);
        let bar = if low.1 == 0 {
            None
        } else if low.0 & 1 == 1 {
            let mask = low.1 & !3 | 0xffff_0000;
            Some(Bar {
                index,
                space: Space::Io,
                prefetch: false,
                address: u64::from(low.0 & !3),
                size: u64::from(mask.wrapping_neg()),
            })
        } else {
            let wide = low.0 >> 1 & 3 == 2;
            let high = if wide {
                self.size_register(at + 4)
            } else {
                (0, u32::MAX)
            };
            let mask = u64::from(high.1) << 32 | u64::from(low.1 & !15);
            Some(Bar {
                index,
                space: if wide {
                    Space::Memory64
                } else {
                    Space::Memory32
                },
                prefetch: low.0 & 8 != 0,
                address: u64::from(high.0) << 32 | u64::from(low.0 & !15),
                size: mask.wrapping_neg(),
            })
        };
        self.set_command(command);
        bar
    }

    /// The address in a memory BAR, not sized: nothing is written. `None` for a port BAR or one that doesn't exist.
    pub fn bar_address(self, index: u8) -> Option<u64> {
        if index > 5 {
            return None;
        }
        let at = FIRST_BAR + u16::from(index) * 4;
        let low = self.read32(at);
        let high = match low & 7 {
            0 => 0,
            4 if index < 5 => self.read32(at + 4),
            _ => return None,
        };
        Some(u64::from(high) << 32 | u64::from(low & !15))
    }

    /// What a register holds and what it holds after all ones.
    fn size_register(self, at: u16) -> (u32, u32) {
        let old = self.read32(at);
        self.write32(at, u32::MAX);
        let ones = self.read32(at);
        self.write32(at, old);
        (old, ones)
    }

    /// Moves a base address register; decoding is off meanwhile.
    pub fn move_bar(self, bar: &Bar, address: u64) {
        let at = FIRST_BAR + u16::from(bar.index) * 4;
        let command = self.command();
        self.set_command(command & !(COMMAND_IO | COMMAND_MEMORY));
        self.write32(at, address as u32);
        if bar.space == Space::Memory64 {
            self.write32(at + 4, (address >> 32) as u32);
        }
        self.set_command(command);
    }

    /// Offsets and ids of its capabilities; at most 48, so a loop ends too.
    pub fn capabilities(self) -> impl Iterator<Item = (u16, u8)> {
        let listed = self.read16(6) & 1 << 4 != 0;
        let mut at = if listed { self.read8(0x34) & !3 } else { 0 };
        let walk = core::iter::from_fn(move || {
            if at < 0x40 {
                return None;
            }
            let here = u16::from(at);
            let both = self.read16(here);
            at = (both >> 8) as u8 & !3;
            Some((here, both as u8))
        });
        walk.take(48)
    }
}

/// The functions of bus 0, in order.
pub fn functions() -> impl Iterator<Item = Function> {
    (0..32).flat_map(|device| {
        let first = Function::at(0, device, 0);
        let count = match (first.exists(), first.is_multifunction()) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 8,
        };
        (0..count)
            .map(move |function| Function::at(0, device, function))
            .filter(|f| f.exists())
    })
}
