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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NONE, RecordingSink, Rig, message};
    use vm_migration::Section;

    /// A function with all there is, changed in every way that is saved.
    fn used() -> Rig {
        let mut rig = Rig::new();
        let (msix, msi) = (rig.msix_at, rig.msi_at);
        let config = &mut rig.config;
        config.write(0x04, &[0x07, 0x04]);
        config.write(0x10, &[0, 0, 0x80, 0xe0]);
        config.write(0x3c, &[11]);
        config.set_interrupt(true);
        rig.table.write(4, 16, &0xfee0_1000u64.to_le_bytes());
        rig.table
            .write(4, 24, &0x0000_0000_0000_0041u64.to_le_bytes());
        rig.table.write(4, 32, &0xfee0_2000u64.to_le_bytes());
        config.write(msix + 2, &[0, 0x80]);
        rig.table.trigger(2).unwrap();
        config.write(msi + 4, &0xfee0_3000u32.to_le_bytes());
        config.write(msi + 12, &[0x60, 0]);
        config.write(msi + 16, &[2, 0, 0, 0]);
        config.write(msi + 2, &[0x21, 0]);
        rig.msi.trigger(1).unwrap();
        rig
    }

    fn all(rig: &Rig) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        rig.config.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn everything_comes_back() {
        let before = used();
        let state = before.config.save();
        let section = Section::encode("_net0", &state).unwrap();
        let state: ConfigurationState = section.decode().unwrap();

        let mut after = Rig::new();
        after.config.restore(&state).unwrap();
        assert_eq!(all(&after), all(&before));
        assert_eq!(after.config.bars(), before.config.bars());
        assert_eq!(after.config.save(), state);
        let routes = |sink: &RecordingSink| sink.routes();
        assert_eq!(routes(&after.msix_sink), routes(&before.msix_sink));
        assert_eq!(
            routes(&after.msix_sink)[&1],
            Some(message(0xfee0_1000, 0x41))
        );
        assert_eq!(routes(&after.msi_sink), routes(&before.msi_sink));

        assert_eq!(after.msix_sink.take_triggered(), NONE);
        after.table.write(4, 2 * 16 + 12, &[0; 4]);
        assert_eq!(after.msix_sink.take_triggered(), [2]);
        after.config.write(after.msi_at + 16, &[0; 4]);
        assert_eq!(after.msi_sink.take_triggered(), [1]);
    }

    #[test]
    fn pending_without_a_mask_is_delivered() {
        let mut state = used().config.save();
        state.msix.as_mut().unwrap()[2].masked = false;
        let mut after = Rig::new();
        after.config.restore(&state).unwrap();
        assert_eq!(after.msix_sink.take_triggered(), [2]);
    }

    #[test]
    fn the_state_of_another_device_changes_nothing() {
        let good = used().config.save();
        let mut rig = Rig::new();
        let before = rig.config.save();
        let mut refuse = |change: &dyn Fn(&mut ConfigurationState)| {
            let mut state = good.clone();
            change(&mut state);
            let error = rig.config.restore(&state).unwrap_err();
            assert_eq!(rig.config.save(), before, "{error}");
            error
        };
        assert_eq!(
            refuse(&|state| state.registers[2] ^= 1),
            StateError::OtherDevice {
                offset: 2,
                found: 0x40,
                wanted: 0x41,
            }
        );
        // The size of a BAR: more bits than there can be.
        assert!(matches!(
            refuse(&|state| state.registers[0x11] |= 1),
            StateError::OtherDevice { offset: 0x11, .. }
        ));
        let short = StateError::Size {
            found: 255,
            wanted: 256,
        };
        assert_eq!(refuse(&|state| state.registers.truncate(255)), short);
        assert_eq!(
            refuse(&|state| state.msix = None),
            StateError::Capability("MSI-X")
        );
        assert_eq!(
            refuse(&|state| state.msi_pending = None),
            StateError::Capability("MSI")
        );
        assert!(matches!(
            refuse(&|state| {
                state.msix.as_mut().map(Vec::pop);
            }),
            StateError::Msix(MsixError::StateVectors {
                found: 3,
                wanted: 4
            })
        ));
    }
}
