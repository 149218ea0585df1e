//! MSI-X (PCI Local Bus 3.0 §6.8.2): the table, the pending bit array, and the control word of the capability.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_device::Trigger;

use crate::vectors::{Control, MsiMessage, MsiSink, Vector, Vectors};

/// The most vectors that a table can have.
pub const MAX_MSIX_VECTORS: u16 = 2048;
/// Bytes a vector in the table.
const ENTRY: u64 = 16;
/// Message control: all vectors masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X in use.
const ENABLE: u16 = 1 << 15;

/// Why a table cannot be.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum MsixError {
    /// No vectors, or too many.
    #[error("{0} MSI-X vectors are not between 1 and {MAX_MSIX_VECTORS}")]
    Vectors(u16),
    /// Table or pending bits at an odd place.
    #[error(
        "MSI-X {what} at {offset:#x} of BAR {bar}: no multiple of 8, or table and pending bits overlap"
    )]
    Layout {
        /// "table" or "pending bits".
        what: &'static str,
        /// BAR.
        bar: usize,
        /// Offset in it.
        offset: u32,
    },
    /// The saved state is of another table.
    #[error("the saved state has {found} MSI-X vectors, the device {wanted}")]
    StateVectors {
        /// In the state.
        found: usize,
        /// In the table.
        wanted: u16,
    },
}

/// Where table and pending bits lie.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MsixLayout {
    /// BAR of the table.
    pub table_bar: usize,
    /// Offset of the table in it: a multiple of 8.
    pub table_offset: u32,
    /// BAR of the pending bits.
    pub pba_bar: usize,
    /// Offset of the pending bits in it: a multiple of 8.
    pub pba_offset: u32,
}

/// One vector, saved.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MsixVectorState {
    /// Its message.
    pub message: MsiMessage,
    /// Its mask bit.
    pub masked: bool,
    /// Its pending bit.
    pub pending: bool,
}

/// The vectors of a function and their control word. The table and the pending bits answer to [`read`](Self::read) and
/// [`write`](Self::write) of BARs; configuration space brings the control word.
pub struct MsixTable {
    layout: MsixLayout,
    vectors: Vectors,
    control: Mutex<u16>,
}

impl MsixTable {
    /// A table of `vectors` masked entries, MSI-X disabled, that delivers through `sink`.
    ///
    /// # Errors
    /// [`MsixError::Vectors`], [`MsixError::Layout`].
    pub fn new(
        vectors: u16,
        layout: MsixLayout,
        sink: Arc<dyn MsiSink>,
    ) -> Result<Arc<Self>, MsixError> {
        if !(1..=MAX_MSIX_VECTORS).contains(&vectors) {
            return Err(MsixError::Vectors(vectors));
        }
        let table = Self {
            layout,
            vectors: Vectors::new(vectors, true, sink),
            control: Mutex::new(0),
        };
        let (table_end, pba_end) = (table.table_end(), table.pba_end());
        let apart = layout.table_bar != layout.pba_bar
            || table_end <= u64::from(layout.pba_offset)
            || pba_end <= u64::from(layout.table_offset);
        if !layout.table_offset.is_multiple_of(8) {
            return Err(MsixError::Layout {
                what: "table",
                bar: layout.table_bar,
                offset: layout.table_offset,
            });
        }
        if !layout.pba_offset.is_multiple_of(8) || !apart {
            return Err(MsixError::Layout {
                what: "pending bits",
                bar: layout.pba_bar,
                offset: layout.pba_offset,
            });
        }
        Ok(Arc::new(table))
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.vectors.len()
    }

    /// Where table and pending bits lie.
    #[must_use]
    pub fn layout(&self) -> MsixLayout {
        self.layout
    }

    /// Where the table ends in its BAR.
    #[must_use]
    pub fn table_end(&self) -> u64 {
        u64::from(self.layout.table_offset) + ENTRY * u64::from(self.vectors())
    }

    /// Where the pending bits end in their BAR.
    #[must_use]
    pub fn pba_end(&self) -> u64 {
        u64::from(self.layout.pba_offset) + 8 * u64::from(self.vectors().div_ceil(64))
    }

    /// Whether the guest uses MSI-X: its function then has no interrupt pin (PCI Local Bus 3.0 §6.8.3.3).
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.control_word() & ENABLE != 0
    }

    /// Raises `vector`. While it is masked it becomes pending; with MSI-X disabled it is lost.
    ///
    /// # Errors
    /// There is no such vector, or the sink fails.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        self.vectors.trigger(vector)
    }

    /// `vector` as an interrupt for whoever raises it.
    #[must_use]
    pub fn vector(self: &Arc<Self>, vector: u16) -> MsixVector {
        MsixVector {
            table: self.clone(),
            vector,
        }
    }

    /// The message control word of the capability.
    #[must_use]
    pub fn control_word(&self) -> u16 {
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) | (self.vectors() - 1)
    }

    /// The guest writes the message control word. What is not masked any more and pending is delivered.
    pub fn set_control_word(&self, word: u16) {
        let new = word & (ENABLE | FUNCTION_MASK);
        let mut held = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if *held == new {
            return;
        }
        *held = new;
        self.vectors
            .update_all(|_, vector| vector.control = control(new));
    }

    /// Reads BAR `bar` where table or pending bits lie, any size, and says whether they do: false, and `data` untouched,
    /// where `offset` is not theirs. Bytes past their end read as 0.
    pub fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> bool {
        if let Some(at) = self.in_table(bar, offset) {
            self.read_table(at, data);
            return true;
        }
        if let Some(at) = self.in_pba(bar, offset) {
            for (byte, at) in data.iter_mut().zip(at..) {
                *byte = self.pba_byte(at);
            }
            return true;
        }
        false
    }

    /// Writes BAR `bar` where table or pending bits lie and says whether they do. Only aligned accesses of 4 and 8 bytes
    /// to the table change anything; others are undefined (§6.8.2), and the pending bits are read-only.
    pub fn write(&self, bar: usize, offset: u64, data: &[u8]) -> bool {
        let Some(at) = self.in_table(bar, offset) else {
            return self.in_pba(bar, offset).is_some();
        };
        // At most 2048 entries.
        let (index, field) = ((at / ENTRY) as u16, at % ENTRY);
        if let Ok(bytes) = <[u8; 4]>::try_from(data) {
            let value = u32::from_le_bytes(bytes);
            self.vectors
                .update(index, |vector| set_field(vector, field, value));
        } else if let Ok(bytes) = <[u8; 8]>::try_from(data)
            && field.is_multiple_of(8)
        {
            let value = u64::from_le_bytes(bytes);
            self.vectors.update(index, |vector| {
                set_field(vector, field, value as u32);
                set_field(vector, field + 4, (value >> 32) as u32);
            });
        }
        true
    }

    /// The vectors to save.
    #[must_use]
    pub fn save(&self) -> Vec<MsixVectorState> {
        (0..self.vectors())
            .filter_map(|index| {
                let pending = self.vectors.pending(index);
                self.vectors.with(index, |vector| MsixVectorState {
                    message: vector.message,
                    masked: vector.masked,
                    pending,
                })
            })
            .collect()
    }

    /// Checks that `state` is of such a table.
    pub(crate) fn check(&self, state: &[MsixVectorState]) -> Result<(), MsixError> {
        if state.len() == usize::from(self.vectors()) {
            Ok(())
        } else {
            Err(MsixError::StateVectors {
                found: state.len(),
                wanted: self.vectors(),
            })
        }
    }

    /// Becomes what was saved: `control` is the message control word, `state` the vectors. Routes are made, and what
    /// is pending and not masked is delivered.
    ///
    /// # Errors
    /// [`MsixError::StateVectors`]: nothing has changed.
    pub fn restore(&self, word: u16, state: &[MsixVectorState]) -> Result<(), MsixError> {
        self.check(state)?;
        let word = word & (ENABLE | FUNCTION_MASK);
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = word;
        for (index, saved) in (0..).zip(state) {
            self.vectors.update(index, |vector| {
                vector.message = saved.message;
                vector.masked = saved.masked;
                vector.pending = saved.pending;
                vector.control = control(word);
            });
        }
        Ok(())
    }

    fn in_table(&self, bar: usize, offset: u64) -> Option<u64> {
        let start = u64::from(self.layout.table_offset);
        (bar == self.layout.table_bar && (start..self.table_end()).contains(&offset))
            .then(|| offset - start)
    }

    fn in_pba(&self, bar: usize, offset: u64) -> Option<u64> {
        let start = u64::from(self.layout.pba_offset);
        (bar == self.layout.pba_bar && (start..self.pba_end()).contains(&offset))
            .then(|| offset - start)
    }

    fn read_table(&self, at: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(at..) {
            let entry = u16::try_from(at / ENTRY)
                .ok()
                .and_then(|index| self.vectors.with(index, entry))
                .unwrap_or_default();
            *byte = entry[(at % ENTRY) as usize];
        }
    }

    fn pba_byte(&self, at: u64) -> u8 {
        let Ok(first) = u16::try_from(at.saturating_mul(8)) else {
            return 0;
        };
        (0..8).fold(0, |byte, bit| {
            byte | u8::from(self.vectors.pending(first.saturating_add(bit))) << bit
        })
    }
}

fn control(word: u16) -> Control {
    match (word & ENABLE != 0, word & FUNCTION_MASK != 0) {
        (false, _) => Control::Disabled,
        (true, true) => Control::Masked,
        (true, false) => Control::Enabled,
    }
}

/// A table entry's bytes.
fn entry(vector: &Vector) -> [u8; ENTRY as usize] {
    let mut bytes = [0; ENTRY as usize];
    bytes[0..8].copy_from_slice(&vector.message.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
    bytes[12] = u8::from(vector.masked);
    bytes
}

/// Writes the dword at `field` of an entry.
fn set_field(vector: &mut Vector, field: u64, value: u32) {
    let message = &mut vector.message;
    match field {
        // The two low bits must be 0 (§6.8.2.1).
        0 => message.address = message.address & !0xffff_ffff | u64::from(value & !3),
        4 => message.address = message.address & 0xffff_ffff | u64::from(value) << 32,
        8 => message.data = value,
        12 => vector.masked = value & 1 != 0,
        _ => {}
    }
}

/// One vector of an [`MsixTable`], an interrupt.
#[derive(Clone)]
pub struct MsixVector {
    table: Arc<MsixTable>,
    vector: u16,
}

impl Trigger for MsixVector {
    fn trigger(&self) -> io::Result<()> {
        self.table.trigger(self.vector)
    }
}

#[cfg(test)]
mod tests;
