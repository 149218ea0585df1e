//! Saved configuration space: the registers, BARs among them, with MSI and MSI-X.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_migration::Schema;

use crate::configuration::ConfigurationSpace;
use crate::msix::{MsixError, MsixVectorState};
use crate::registers::{STATUS, STATUS_INTERRUPT};

/// Why a saved state does not fit a function.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum StateError {
    /// Not as many bytes.
    #[error("the saved configuration space has {found} bytes, not {wanted}")]
    Size {
        /// In the state.
        found: usize,
        /// In the function.
        wanted: usize,
    },
    /// It is of another device: bits that never change differ.
    #[error(
        "the saved configuration space is of another device: byte {offset:#04x} is {found:#04x}, not {wanted:#04x}"
    )]
    OtherDevice {
        /// Offset of the first such byte.
        offset: usize,
        /// In the state.
        found: u8,
        /// In the function.
        wanted: u8,
    },
    /// One has MSI or MSI-X and the other has not.
    #[error("the saved state and the device do not both have {0}")]
    Capability(&'static str),
    /// Another MSI-X table.
    #[error(transparent)]
    Msix(#[from] MsixError),
}

/// The configuration space of a function, saved.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigurationState {
    /// All registers.
    pub registers: Vec<u8>,
    /// The MSI-X vectors, where there are any.
    pub msix: Option<Vec<MsixVectorState>>,
    /// The pending bits of MSI, where there is MSI.
    pub msi_pending: Option<u32>,
}

impl Schema for ConfigurationState {
    const KIND: &'static str = "pci-configuration";
    const VERSION: u32 = 1;
}

impl ConfigurationSpace {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> ConfigurationState {
        ConfigurationState {
            registers: self.bytes.to_vec(),
            msix: self.msix.as_ref().map(|(_, table)| table.save()),
            msi_pending: self.msi.as_ref().map(|(_, msi)| msi.pending()),
        }
    }

    /// Becomes what was saved of such a function: routes of MSI and MSI-X are made, what is pending and not masked is
    /// delivered. BARs answer once the function is on its bus, or after [`refresh`](crate::PciBus::refresh).
    ///
    /// # Errors
    /// It was another kind of function: nothing has changed.
    pub fn restore(&mut self, state: &ConfigurationState) -> Result<(), StateError> {
        if state.registers.len() != self.bytes.len() {
            return Err(StateError::Size {
                found: state.registers.len(),
                wanted: self.bytes.len(),
            });
        }
        let own = usize::from(STATUS);
        for (offset, (&found, &wanted)) in state.registers.iter().zip(&self.bytes).enumerate() {
            let mut changes = self.writable[offset] | self.clears[offset];
            if offset == own {
                changes |= STATUS_INTERRUPT as u8;
            }
            if (found ^ wanted) & !changes != 0 {
                return Err(StateError::OtherDevice {
                    offset,
                    found,
                    wanted,
                });
            }
        }
        if state.msix.is_some() != self.msix.is_some() {
            return Err(StateError::Capability("MSI-X"));
        }
        if state.msi_pending.is_some() != self.msi.is_some() {
            return Err(StateError::Capability("MSI"));
        }
        if let (Some((_, table)), Some(vectors)) = (&self.msix, &state.msix) {
            table.check(vectors)?;
        }
        self.bytes.copy_from_slice(&state.registers);
        if let (Some((at, table)), Some(vectors)) = (&self.msix, &state.msix) {
            table.restore(self.word(at + 2), vectors)?;
        }
        self.drive_msi(state.msi_pending);
        Ok(())
    }
}
