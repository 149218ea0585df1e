//! Saving and restoring: four sections of one id, the transport's two, the registers', and the device's own.

use pci::{ConfigurationState, StateError};
use serde::{Deserialize, Serialize};
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::{DeviceMemory, RegistersV1};

use super::{TransportError, VirtioPciDevice};

/// What the transport itself keeps.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciV1 {
    /// ISR status.
    pub isr: u8,
    /// MSI-X vector of the configuration; 0xffff is none.
    pub config_vector: u16,
    /// MSI-X vectors of the queues.
    pub queue_vectors: Vec<u16>,
}

impl Schema for VirtioPciV1 {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

impl<M: DeviceMemory> VirtioPciDevice<M> {
    /// The state, all of it with [`id`](Self::id). The device is paused.
    ///
    /// # Errors
    /// The device is at work, or its state cannot be written.
    pub fn save(&self) -> Result<Vec<Section>, TransportError> {
        let core = self.core();
        let device = core
            .save(&self.id)
            .map_err(|source| self.core_error(source))?;
        let (isr, config_vector, queue_vectors) = self.interrupt.save();
        let transport = VirtioPciV1 {
            isr,
            config_vector,
            queue_vectors,
        };
        drop(core);
        let configuration = self.config().save();
        let state = |source| self.state_error(source);
        let mut sections = vec![
            Section::encode(&self.id, &configuration).map_err(state)?,
            Section::encode(&self.id, &transport).map_err(state)?,
        ];
        sections.extend(device);
        Ok(sections)
    }

    /// Takes over what [`save`](Self::save) of an equal device gave: all of its sections, in whatever order.
    /// [`resume`](Self::resume) lets it work. Before the device is put on its bus, or with
    /// [`refresh`](pci::PciBus::refresh) after it.
    ///
    /// # Errors
    /// A section is missing, is one too many, or is not of such a device. The device must not be used then.
    pub fn restore(&self, sections: &[Section]) -> Result<(), TransportError> {
        let transport: VirtioPciV1 = self.decode(sections)?;
        let configuration: ConfigurationState = self.decode(sections)?;
        let registers = self.find::<RegistersV1>(sections)?;
        let mut others = sections.iter().filter(|section| {
            ![
                VirtioPciV1::KIND,
                ConfigurationState::KIND,
                RegistersV1::KIND,
            ]
            .contains(&section.kind.as_str())
        });
        let (Some(device), None) = (others.next(), others.next()) else {
            return Err(self.mismatch("no section of the device's own, or several"));
        };
        let mut core = self.core();
        core.restore(registers, device)
            .map_err(|source| self.core_error(source))?;
        let fits = self.interrupt.restore(
            transport.isr,
            transport.config_vector,
            &transport.queue_vectors,
        );
        drop(core);
        if !fits {
            return Err(self.mismatch("another number of queues"));
        }
        self.config()
            .restore(&configuration)
            .map_err(|source: StateError| TransportError::Fit {
                id: self.id.clone(),
                source,
            })
    }

    fn find<'a, S: Schema>(&self, sections: &'a [Section]) -> Result<&'a Section, TransportError> {
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

    fn decode<S: Schema>(&self, sections: &[Section]) -> Result<S, TransportError> {
        self.find::<S>(sections)?
            .decode()
            .map_err(|source| self.state_error(source))
    }

    fn mismatch(&self, what: &'static str) -> TransportError {
        TransportError::Mismatch {
            id: self.id.clone(),
            what,
        }
    }

    fn state_error(&self, source: MigrationError) -> TransportError {
        TransportError::State {
            id: self.id.clone(),
            source,
        }
    }
}
