//! MSI (PCI Local Bus 3.0 §6.8.1): 64-bit address and per-vector masking, always.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 2 | 2 | message control |
//! | 4 | 8 | message address |
//! | 12 | 2 | message data; its low bits are the vector |
//! | 16 | 4 | mask bits |
//! | 20 | 4 | pending bits |

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use thiserror::Error;

use crate::vectors::{Control, MsiMessage, MsiSink, Vectors};

/// Bytes of the capability after its id and next pointer.
pub(crate) const BODY: usize = 22;
/// Where the pending bits lie from the start of the capability.
pub(crate) const PENDING: usize = 20;
/// Message control: in use.
const ENABLE: u16 = 1;
/// Message control: 64-bit address, per-vector masking.
const FORM: u16 = 1 << 7 | 1 << 8;

/// Why there can be no such vectors.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("{0} MSI vectors are not 1, 2, 4, 8, 16 or 32")]
pub struct MsiError(pub u8);

/// The MSI vectors of a function. Configuration space brings all registers.
pub struct Msi {
    vectors: Vectors,
    /// How many vectors the guest has given us, as a power of two.
    given: AtomicU8,
}

impl Msi {
    /// `vectors` vectors (1, 2, 4, 8, 16 or 32), MSI disabled, that deliver through `sink`.
    ///
    /// # Errors
    /// Another number of vectors.
    pub fn new(vectors: u8, sink: Arc<dyn MsiSink>) -> Result<Arc<Self>, MsiError> {
        if !vectors.is_power_of_two() || vectors > 32 {
            return Err(MsiError(vectors));
        }
        Ok(Arc::new(Self {
            vectors: Vectors::new(u16::from(vectors), false, sink),
            given: AtomicU8::new(0),
        }))
    }

    /// Number of vectors the function would like.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.vectors.len()
    }

    /// Whether the guest uses MSI: its function then has no interrupt pin.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.vectors
            .with(0, |vector| vector.control != Control::Disabled)
            .unwrap_or(false)
    }

    /// Raises `vector`; where the guest gave us fewer vectors they are shared (§6.8.3.1). While it is masked it becomes
    /// pending; with MSI disabled it is lost.
    ///
    /// # Errors
    /// There is no such vector, or the sink fails.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        let shared = if vector < self.vectors() {
            vector & (self.given() - 1)
        } else {
            vector
        };
        self.vectors.trigger(shared)
    }

    /// The pending bits.
    #[must_use]
    pub fn pending(&self) -> u32 {
        (0..self.vectors()).fold(0, |bits, vector| {
            bits | u32::from(self.vectors.pending(vector)) << vector
        })
    }

    fn given(&self) -> u16 {
        1 << self.given.load(Ordering::Relaxed)
    }

    /// The capability after its id and next pointer, and which of its bits the guest can write.
    pub(crate) fn body(&self) -> ([u8; BODY], [u8; BODY]) {
        let log2 = self.vectors().trailing_zeros() as u16;
        let (mut body, mut writable) = ([0; BODY], [0; BODY]);
        body[0..2].copy_from_slice(&(FORM | log2 << 1).to_le_bytes());
        writable[0..2].copy_from_slice(&(7u16 << 4 | ENABLE).to_le_bytes());
        writable[2..10].copy_from_slice(&(!3u64).to_le_bytes());
        writable[10..12].fill(0xff);
        let masks = u32::MAX >> (32 - u32::from(self.vectors()));
        writable[14..18].copy_from_slice(&masks.to_le_bytes());
        (body, writable)
    }

    /// The guest wrote some of the registers: now they are `body`. `pending` replaces the pending bits.
    pub(crate) fn set(&self, body: &[u8; BODY], pending: Option<u32>) {
        let control = u16::from_le_bytes([body[0], body[1]]);
        let address = body[2..10]
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        let data = u16::from_le_bytes([body[10], body[11]]);
        let masks = u32::from_le_bytes([body[14], body[15], body[16], body[17]]);
        let most = self.vectors().trailing_zeros() as u8;
        let given = ((control >> 4 & 7) as u8).min(most);
        self.given.store(given, Ordering::Relaxed);
        let used = 1u16 << given;
        self.vectors.update_all(|index, vector| {
            vector.control = if control & ENABLE != 0 && index < used {
                Control::Enabled
            } else {
                Control::Disabled
            };
            vector.message = MsiMessage {
                address,
                data: u32::from(data & !(used - 1) | index),
            };
            vector.masked = masks >> index & 1 != 0;
            if let Some(pending) = pending {
                vector.pending = pending >> index & 1 != 0;
            }
        });
    }
}

#[cfg(test)]
mod tests;
