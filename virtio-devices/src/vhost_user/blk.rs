//! A block device (virtio 1.2 §5.2) that another process serves.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_migration::{MigrationError, Schema, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{Activation, DeviceError, DeviceQueue, VirtioDevice, read_config_bytes};

use super::front::{Front, Kind};
use super::memory::MappedMemory;
use super::{VhostUserConfig, VhostUserError};

const RO: u64 = 1 << VIRTIO_BLK_F_RO;
const MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
/// What is handed through.
const KNOWN: u64 = RING_FEATURES
    | RO
    | CONFIG_WCE
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Bytes of the configuration space, up to the fields of secure erase, which is not handed through (§5.2.4).
const CONFIG_LEN: usize = 60;
/// Where it says whether the cache is write-back: the one byte that a driver may write.
const WRITEBACK: usize = 32;
/// Where it says how many queues there are.
const NUM_QUEUES: usize = 34;

/// A disk that another process serves.
pub struct VhostUserBlock<M> {
    front: Front<M>,
    queues: u16,
    /// The cache as it was before the driver chose.
    writeback: u8,
}

impl<M> VhostUserBlock<M> {
    /// Connects to the back end of `config`, which is to serve a disk that cannot be written if `read_only` says so.
    ///
    /// # Errors
    /// [`VhostUserError`]: nobody is there, or not one that serves such a disk.
    pub fn new(config: VhostUserConfig, read_only: bool) -> Result<Self, VhostUserError> {
        let (socket, queues) = (config.socket.clone(), config.queues);
        let kind = Kind {
            features: if queues > 1 { KNOWN | MQ } else { KNOWN },
            config_len: CONFIG_LEN,
            answers_all: true,
        };
        let front = Front::connect(config, kind)?;
        if queues > 1 && front.features() & MQ == 0 {
            return Err(VhostUserError::Queues {
                socket,
                most: 1,
                wanted: queues,
            });
        }
        if read_only && front.features() & RO == 0 {
            return Err(VhostUserError::Writable { socket });
        }
        Ok(Self {
            queues,
            writeback: writeback(&front.space()),
            front,
        })
    }

    /// Has the back end write back, or through.
    fn set_writeback(&self, value: u8) {
        if self.front.features() & CONFIG_WCE != 0 && writeback(&self.front.space()) != value {
            self.front.write_config(WRITEBACK, &[value]);
        }
    }
}

/// The cache, as a configuration space has it.
fn writeback(space: &[u8]) -> u8 {
    space.get(WRITEBACK).copied().unwrap_or(0)
}

/// What is saved of a disk that another process serves: what the driver chose. The disk is the back end's.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserBlockV1 {
    /// 1 for write-back, 0 for write-through.
    pub writeback: u8,
}

impl Schema for VhostUserBlockV1 {
    const KIND: &'static str = "vhost-user-block";
    const VERSION: u32 = 1;
}

impl<M: MappedMemory> VirtioDevice<M> for VhostUserBlock<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.front.features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.front.queue_sizes()
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut space = self.front.space();
        // The back end may serve more than the device has.
        if let Some(field) = space.get_mut(NUM_QUEUES..NUM_QUEUES + 2) {
            field.copy_from_slice(&self.queues.to_le_bytes());
        }
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (WRITEBACK, [value]) = (offset, data) {
            self.set_writeback(u8::from(*value != 0));
        }
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        self.front.activate(activation)
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        self.front.deactivate()
    }

    fn reset(&mut self) {
        self.set_writeback(self.writeback);
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        let writeback = writeback(&self.front.space());
        Section::encode(id, &VhostUserBlockV1 { writeback })
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let VhostUserBlockV1 { writeback } = section.decode()?;
        self.set_writeback(u8::from(writeback != 0));
        Ok(())
    }
}
