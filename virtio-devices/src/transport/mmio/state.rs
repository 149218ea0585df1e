//! Saving and restoring: three sections of one id, the transport's, the registers', and the device's own.

use serde::{Deserialize, Serialize};
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::{DeviceMemory, RegistersV1};

use super::{MmioError, VirtioMmioDevice};

/// What the transport itself keeps.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioMmioV1 {
    /// The interrupt status.
    pub interrupt_status: u32,
}

impl Schema for VirtioMmioV1 {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioMmioDevice<M> {
    /// The state, all of it with [`id`](Self::id). The device is paused.
    ///
    /// # Errors
    /// The device is at work, or its state cannot be written.
    pub fn save(&self) -> Result<Vec<Section>, MmioError> {
        let device = self
            .core()
            .save(&self.id)
            .map_err(|source| self.core_error(source))?;
        let transport = VirtioMmioV1 {
            interrupt_status: self.interrupt.status(),
        };
        let transport = Section::encode(&self.id, &transport);
        let mut sections = vec![transport.map_err(|source| self.state_error(source))?];
        sections.extend(device);
        Ok(sections)
    }

    /// Takes over what [`save`](Self::save) of an equal device gave: all of its sections, in whatever order.
    /// [`resume`](Self::resume) lets it work.
    ///
    /// # Errors
    /// A section is missing, is one too many, or is not of such a device. The device must not be used then.
    pub fn restore(&self, sections: &[Section]) -> Result<(), MmioError> {
        let transport: VirtioMmioV1 = self
            .find::<VirtioMmioV1>(sections)?
            .decode()
            .map_err(|source| self.state_error(source))?;
        let registers = self.find::<RegistersV1>(sections)?;
        let known = [VirtioMmioV1::KIND, RegistersV1::KIND];
        let mut others = sections
            .iter()
            .filter(|section| !known.contains(&section.kind.as_str()));
        let (Some(device), None) = (others.next(), others.next()) else {
            return Err(MmioError::Mismatch {
                id: self.id.clone(),
                what: "no section of the device's own, or several",
            });
        };
        self.core()
            .restore(registers, device)
            .map_err(|source| self.core_error(source))?;
        self.interrupt.set(transport.interrupt_status);
        Ok(())
    }

    fn find<'a, S: Schema>(&self, sections: &'a [Section]) -> Result<&'a Section, MmioError> {
        sections
            .iter()
            .find(|section| section.kind == S::KIND)
            .ok_or_else(|| {
                self.state_error(MigrationError::Absent {
                    kind: S::KIND.to_owned(),
                    id: self.id.clone(),
                })
            })
    }

    fn state_error(&self, source: MigrationError) -> MmioError {
        MmioError::State {
            id: self.id.clone(),
            source,
        }
    }
}
