//! Requests of the driver and the answers to them (virtio 1.2 §5.15.6).

use vm_memory::GuestMemory;
use vm_virtio::{Chain, Fault, Writer};

use super::blocks::Fill;

/// Bytes of a request: le16 type, 6 of padding, le64 address, le16 blocks, 6 of padding.
#[cfg(test)]
const REQUEST_LEN: usize = 24;
/// Bytes of an answer: le16 type, 6 of padding, le16 state.
pub(super) const ANSWER_LEN: usize = 10;

/// What the driver wants, with the first address and the number of blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Request {
    Plug(u64, u16),
    Unplug(u64, u16),
    UnplugAll,
    State(u64, u16),
    Unknown,
}

impl Request {
    /// Reads it. A type that is not known is no fault: it has an answer.
    pub fn read<M: GuestMemory>(memory: &M, chain: &Chain) -> Result<Self, Fault> {
        let mut reader = chain.reader(memory);
        let kind = u16::from_le(reader.read_obj()?);
        if !matches!(kind, 0 | 1 | 3) {
            return Ok(match kind {
                2 => Self::UnplugAll,
                _ => Self::Unknown,
            });
        }
        reader.skip(6)?;
        let address = u64::from_le(reader.read_obj()?);
        let count = u16::from_le(reader.read_obj()?);
        Ok(match kind {
            0 => Self::Plug(address, count),
            1 => Self::Unplug(address, count),
            _ => Self::State(address, count),
        })
    }

    /// Its bytes, as a driver makes them. What is not known has type 9.
    #[cfg(test)]
    pub fn bytes(self) -> Vec<u8> {
        let (kind, address, count) = match self {
            Self::Plug(address, count) => (0u16, address, count),
            Self::Unplug(address, count) => (1, address, count),
            Self::UnplugAll => (2, 0, 0),
            Self::State(address, count) => (3, address, count),
            Self::Unknown => (9, 0, 0),
        };
        let mut bytes = vec![0; REQUEST_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        bytes
    }
}

/// What the device says to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Answer {
    /// It is done.
    Ack,
    /// It would be more than is requested.
    Nack,
    /// It makes no sense.
    Error,
    /// How much of the range is plugged.
    State(Fill),
}

impl Answer {
    /// Its bytes.
    pub fn bytes(self) -> [u8; ANSWER_LEN] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
            Self::State(Fill::All) => (0, 0),
            Self::State(Fill::None) => (0, 1),
            Self::State(Fill::Some) => (0, 2),
        };
        let mut bytes = [0; ANSWER_LEN];
        bytes[0] = kind;
        bytes[8] = state;
        bytes
    }

    /// Writes it to where there is room for it.
    pub fn write<M: GuestMemory>(self, mut writer: Writer<'_, M>) -> Result<(), Fault> {
        writer.write(&self.bytes())
    }
}

/// Fails where a driver left no room for the answer, before anything is done.
pub(super) fn check_room(chain: &Chain) -> Result<(), Fault> {
    let left = chain.writable_len() as usize;
    if left < ANSWER_LEN {
        return Err(Fault::Short {
            wanted: ANSWER_LEN,
            left,
        });
    }
    Ok(())
}
