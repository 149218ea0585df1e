//! The configuration space of a function: a type 0 header and capabilities (PCI Local Bus 3.0 §6.1 to §6.3, §6.7), each
//! bit read-only, writable, or cleared by writing 1.

use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use crate::bar::{AddressSpace, BARS, Bar, BarKind, Bars};
use crate::msi::{self, Msi};
use crate::msix::MsixTable;
use crate::registers::*;

/// Why a configuration space cannot be built.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum ConfigurationError {
    /// A size that such a BAR cannot have.
    #[error("BAR {index} cannot be a {kind:?} of {size:#x} bytes")]
    BarSize {
        /// Index of the BAR.
        index: usize,
        /// Its form.
        kind: BarKind,
        /// Bytes.
        size: u64,
    },
    /// A BAR past the last register, or in one that is in use.
    #[error("there is no free register for BAR {0}")]
    BarIndex(usize),
    /// The 192 bytes after the header are full.
    #[error("no {size} bytes are left for capability {id:#04x}")]
    CapabilityRoom {
        /// Capability id.
        id: u8,
        /// Bytes of it.
        size: usize,
    },
    /// Write mask and body differ in length.
    #[error("capability {id:#04x} has {body} bytes and a write mask of {writable}")]
    CapabilityMask {
        /// Capability id.
        id: u8,
        /// Bytes of the body.
        body: usize,
        /// Bytes of the mask.
        writable: usize,
    },
    /// Table or pending bits do not fit the BAR they are in.
    #[error("MSI-X {what} does not lie in memory BAR {bar}")]
    Msix {
        /// "table" or "pending bits".
        what: &'static str,
        /// Index of the BAR.
        bar: usize,
    },
}

/// What a function says it is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as in 0x06_00_00.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Builds a [`ConfigurationSpace`].
pub struct ConfigurationBuilder {
    space: ConfigurationSpace,
    /// Where the next capability goes.
    next: usize,
    /// The byte that points to the next capability.
    link: usize,
}

impl ConfigurationBuilder {
    /// A function with no BARs, no capabilities and no interrupt pin.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space = ConfigurationSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            clears: [0; SIZE],
            bars: [None; BARS],
            msix: None,
            msi: None,
        };
        space.put(VENDOR, &identity.vendor.to_le_bytes());
        space.put(DEVICE, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        space.put(REVISION, &class.to_le_bytes());
        space.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        space.allow(
            COMMAND,
            COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE,
        );
        space.allow(CACHE_LINE_SIZE, 0xffff);
        space.allow(INTERRUPT_LINE, 0x00ff);
        let status = usize::from(STATUS);
        space.clears[status..status + 2].copy_from_slice(&STATUS_ERRORS.to_le_bytes());
        Self {
            space,
            next: usize::from(HEADER_END),
            link: usize::from(CAPABILITIES),
        }
    }

    /// Adds a BAR at register `index`, with address 0.
    ///
    /// # Errors
    /// [`ConfigurationError::BarSize`], [`ConfigurationError::BarIndex`].
    pub fn bar(
        &mut self,
        index: usize,
        kind: BarKind,
        size: u64,
    ) -> Result<&mut Self, ConfigurationError> {
        if !kind.can_be(size) {
            return Err(ConfigurationError::BarSize { index, kind, size });
        }
        let taken = |index: usize| match self.space.bars.get(index) {
            Some(None) => {
                let below = index.checked_sub(1).and_then(|i| self.space.bars[i]);
                below.is_some_and(|(kind, _)| kind.is_64bit())
            }
            _ => true,
        };
        if taken(index) || (kind.is_64bit() && taken(index + 1)) {
            return Err(ConfigurationError::BarIndex(index));
        }
        self.space.bars[index] = Some((kind, size));
        let register = bar_register(index);
        self.space.put(register, &kind.bits().to_le_bytes());
        // The bits below the size stay as they are: writing all ones tells the size.
        let mask = (!(size - 1)).to_le_bytes();
        let bytes = if kind.is_64bit() { 8 } else { 4 };
        let at = usize::from(register);
        self.space.writable[at..at + bytes].copy_from_slice(&mask[..bytes]);
        self.space.allow(
            COMMAND,
            match kind.space() {
                AddressSpace::Io => COMMAND_IO,
                AddressSpace::Memory => COMMAND_MEMORY,
            },
        );
        Ok(self)
    }

    /// Adds a capability: `body` follows its id and next pointer, `writable` has the bits of `body` that the guest can
    /// write. Returns its offset.
    ///
    /// # Errors
    /// [`ConfigurationError::CapabilityRoom`], [`ConfigurationError::CapabilityMask`].
    pub fn capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, ConfigurationError> {
        if body.len() != writable.len() {
            return Err(ConfigurationError::CapabilityMask {
                id,
                body: body.len(),
                writable: writable.len(),
            });
        }
        let (at, size) = (self.next, body.len() + 2);
        let (Ok(offset), Some(end)) = (u8::try_from(at), at.checked_add(size)) else {
            return Err(ConfigurationError::CapabilityRoom { id, size });
        };
        if end > SIZE {
            return Err(ConfigurationError::CapabilityRoom { id, size });
        }
        let space = &mut self.space;
        space.bytes[self.link] = offset;
        space.bytes[at] = id;
        space.bytes[at + 2..end].copy_from_slice(body);
        space.writable[at + 2..end].copy_from_slice(writable);
        space.bytes[usize::from(STATUS)] |= STATUS_CAPABILITIES as u8;
        self.link = at + 1;
        self.next = end.next_multiple_of(4);
        Ok(offset)
    }

    /// Adds the MSI-X capability of `table`, whose control word configuration space then drives. The BARs of the table
    /// and of the pending bits come first. Returns its offset.
    ///
    /// # Errors
    /// [`ConfigurationError::Msix`], [`ConfigurationError::CapabilityRoom`].
    pub fn msix(&mut self, table: &Arc<MsixTable>) -> Result<u8, ConfigurationError> {
        let layout = table.layout();
        let places = [
            (
                "table",
                layout.table_bar,
                layout.table_offset,
                table.table_end(),
            ),
            (
                "pending bits",
                layout.pba_bar,
                layout.pba_offset,
                table.pba_end(),
            ),
        ];
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&table.control_word().to_le_bytes());
        for (field, (what, bar, offset, end)) in body[2..].chunks_exact_mut(4).zip(places) {
            match self.space.bars.get(bar) {
                Some(Some((kind, size)))
                    if kind.space() == AddressSpace::Memory && end <= *size =>
                {
                    // An index below 6 fits the three low bits, which are 0 in the offset.
                    field.copy_from_slice(&(offset | bar as u32).to_le_bytes());
                }
                _ => return Err(ConfigurationError::Msix { what, bar }),
            }
        }
        let mut writable = [0; 10];
        writable[1] = 0xc0;
        let offset = self.capability(CAPABILITY_MSIX, &body, &writable)?;
        self.space.msix = Some((usize::from(offset), table.clone()));
        Ok(offset)
    }

    /// Adds the MSI capability of `vectors`, whose registers configuration space then drives. Returns its offset.
    ///
    /// # Errors
    /// [`ConfigurationError::CapabilityRoom`].
    pub fn msi(&mut self, vectors: &Arc<Msi>) -> Result<u8, ConfigurationError> {
        let (body, writable) = vectors.body();
        let offset = self.capability(CAPABILITY_MSI, &body, &writable)?;
        self.space.msi = Some((usize::from(offset), vectors.clone()));
        Ok(offset)
    }

    /// Gives the function an interrupt pin: 1 is INTA#, 4 is INTD#, 0 none.
    pub fn interrupt_pin(&mut self, pin: u8) -> &mut Self {
        self.space.put(INTERRUPT_PIN, &[pin]);
        self
    }

    /// The finished space.
    #[must_use]
    pub fn build(self) -> ConfigurationSpace {
        self.space
    }
}

/// The configuration space of a function.
pub struct ConfigurationSpace {
    pub(crate) bytes: [u8; SIZE],
    /// Bits that the guest can write.
    pub(crate) writable: [u8; SIZE],
    /// Bits that the guest clears by writing 1.
    pub(crate) clears: [u8; SIZE],
    bars: [Option<(BarKind, u64)>; BARS],
    /// Offset of the capability, and what it drives.
    pub(crate) msix: Option<(usize, Arc<MsixTable>)>,
    pub(crate) msi: Option<(usize, Arc<Msi>)>,
}

impl ConfigurationSpace {
    /// The guest reads `data.len()` bytes at `offset`. What lies past the 256 bytes reads as 0: no extended capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let at = usize::from(offset);
        data.fill(0);
        for (byte, held) in data.iter_mut().zip(self.bytes.iter().skip(at)) {
            *byte = *held;
        }
        if let Some((capability, msi)) = &self.msi {
            let pending = capability + msi::PENDING;
            if overlaps(at, data.len(), pending..pending + 4) {
                for (at, bits) in (pending..).zip(msi.pending().to_le_bytes()) {
                    if let Some(byte) = at
                        .checked_sub(usize::from(offset))
                        .and_then(|i| data.get_mut(i))
                    {
                        *byte = bits;
                    }
                }
            }
        }
    }

    /// The guest writes `data` at `offset`. MSI and MSI-X follow at once; BARs are the bus's to look after
    /// ([`bars`](Self::bars)).
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let places = self.bytes.iter_mut().zip(&self.writable).zip(&self.clears);
        for (((held, writable), clears), new) in places.skip(at).zip(data) {
            *held = *held & !writable | new & writable;
            *held &= !(new & clears);
        }
        if let Some((capability, table)) = &self.msix
            && overlaps(at, data.len(), capability + 2..capability + 4)
        {
            table.set_control_word(self.word(capability + 2));
        }
        if let Some((capability, _)) = self.msi
            && overlaps(at, data.len(), capability + 2..capability + msi::PENDING)
        {
            self.drive_msi(None);
        }
    }

    /// Brings MSI in line with the registers.
    pub(crate) fn drive_msi(&self, pending: Option<u32>) {
        if let Some((capability, msi)) = &self.msi
            && let Some(body) = self.bytes[capability + 2..].first_chunk()
        {
            msi.set(body, pending);
        }
    }

    /// The device changes its own registers, read-only or not; what would lie past the 256 bytes is left out. BARs, MSI and
    /// MSI-X don't follow.
    pub fn put(&mut self, offset: u16, data: &[u8]) {
        for (held, new) in self.bytes.iter_mut().skip(usize::from(offset)).zip(data) {
            *held = *new;
        }
    }

    /// The BARs as the registers have them now.
    #[must_use]
    pub fn bars(&self) -> Bars {
        let command = self.command();
        std::array::from_fn(|index| {
            let (kind, size) = self.bars[index]?;
            let at = usize::from(bar_register(index));
            let low = u64::from(self.word(at)) | u64::from(self.word(at + 2)) << 16;
            let high = if kind.is_64bit() {
                u64::from(self.word(at + 4)) | u64::from(self.word(at + 6)) << 16
            } else {
                0
            };
            let enable = match kind.space() {
                AddressSpace::Io => COMMAND_IO,
                AddressSpace::Memory => COMMAND_MEMORY,
            };
            Some(Bar {
                index,
                kind,
                size,
                address: (high << 32 | low) & !(size - 1),
                decoded: command & enable != 0,
            })
        })
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.word(usize::from(COMMAND))
    }

    /// Whether the guest lets the function reach memory by itself, messages of MSI included. Nothing here depends on it.
    #[must_use]
    pub fn is_bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// Sets or clears the interrupt bit of the status register, and says whether the interrupt pin is asserted now: the bit
    /// is set and nothing disables the pin (PCI Local Bus 3.0 §6.2.3).
    pub fn set_interrupt(&mut self, wanted: bool) -> bool {
        let status = &mut self.bytes[usize::from(STATUS)];
        *status =
            *status & !(STATUS_INTERRUPT as u8) | if wanted { STATUS_INTERRUPT as u8 } else { 0 };
        self.interrupt_asserted()
    }

    /// Whether the interrupt pin is asserted: to be asked again after a write of the command register or of the control of
    /// MSI or MSI-X, which take the pin's place while they are enabled (PCI Local Bus 3.0 §6.8.3.3).
    #[must_use]
    pub fn interrupt_asserted(&self) -> bool {
        self.bytes[usize::from(INTERRUPT_PIN)] != 0
            && self.word(usize::from(STATUS)) & STATUS_INTERRUPT != 0
            && self.command() & COMMAND_INTX_DISABLE == 0
            && !self.msix.as_ref().is_some_and(|(_, table)| table.enabled())
            && !self.msi.as_ref().is_some_and(|(_, msi)| msi.enabled())
    }

    /// Adds to the bits of the two bytes at `offset` that the guest can write.
    fn allow(&mut self, offset: u16, bits: u16) {
        for (mask, bits) in self.writable[usize::from(offset)..]
            .iter_mut()
            .zip(bits.to_le_bytes())
        {
            *mask |= bits;
        }
    }

    pub(crate) fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }
}

/// Whether `len` bytes from `at` on reach into `range`.
fn overlaps(at: usize, len: usize, range: Range<usize>) -> bool {
    at < range.end && at.saturating_add(len) > range.start && len > 0
}

#[cfg(test)]
mod tests;
