//! Requests of a driver (virtio 1.2 §5.2.6), out of a chain: a header of 16 bytes, what is to be written or the segment of a discard,
//! room for what is read, and the status as the last byte that the device can write.

use block_util::Operation;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{GuestMemory, Le32, Le64};
use vm_virtio::{Chain, Fault};

/// Bytes of a sector, the unit of offsets and of lengths, whatever the size of the disk's blocks.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the header.
const HEADER: u32 = 16;
/// Bytes of the segment of a discard.
const SEGMENT: u32 = 16;

/// How a request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Status {
    /// All is done.
    Ok,
    /// It went wrong, or cannot be.
    IoError,
    /// The device knows no such request.
    Unsupported,
}

impl Status {
    /// The byte that the driver reads.
    pub fn byte(self) -> u8 {
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Limits {
    /// Bytes of the disk.
    pub capacity: u64,
    /// Nothing may change.
    pub read_only: bool,
    /// Discards are offered, of so many sectors at most.
    pub discard: Option<u32>,
    /// Writing of zeroes is offered, of so many sectors at most.
    pub write_zeroes: Option<u32>,
}

/// A request that may be done: it lies on the disk, which offers it. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Request {
    /// Fill the writable buffers, but for the status.
    Read { offset: u64, len: u32 },
    /// Write the readable buffers, but for the header.
    Write { offset: u64, len: u32 },
    /// Make what was written stable.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Give a range up.
    Discard { offset: u64, len: u64 },
    /// Make a range read as zeroes.
    WriteZeroes {
        offset: u64,
        len: u64,
        may_unmap: bool,
    },
}

impl Request {
    /// The request that is in `chain`, or the status of one that cannot be done.
    ///
    /// # Errors
    /// There is no room for a status, or the buffers are no longer in memory.
    pub fn parse<M: GuestMemory>(
        memory: &M,
        chain: &Chain,
        limits: &Limits,
    ) -> Result<Result<Self, Status>, Fault> {
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(Fault::Request("a block request without room for a status"));
        };
        let Some(payload) = chain.readable_len().checked_sub(HEADER) else {
            return Ok(Err(Status::IoError));
        };
        let mut reader = chain.reader(memory);
        // Type, something reserved, and sector.
        let [low, sector] = reader.read_obj::<[u64; 2]>()?.map(u64::from_le);
        Ok(match low as u32 {
            VIRTIO_BLK_T_IN => limits
                .transfer(sector, room)
                .map(|offset| Self::Read { offset, len: room }),
            VIRTIO_BLK_T_OUT if limits.read_only => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => limits.transfer(sector, payload).map(|offset| Self::Write {
                offset,
                len: payload,
            }),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                // One segment: that is the most the device says it takes.
                if payload != SEGMENT {
                    return Ok(Err(Status::IoError));
                }
                let sector = u64::from(reader.read_obj::<Le64>()?);
                let count = u32::from(reader.read_obj::<Le32>()?);
                let flags = u32::from(reader.read_obj::<Le32>()?);
                limits.range(kind, sector, count, flags)
            }
            _ => Err(Status::Unsupported),
        })
    }
}

impl Limits {
    /// Offset of a transfer of `len` bytes from `sector` on.
    fn transfer(&self, sector: u64, len: u32) -> Result<u64, Status> {
        if !u64::from(len).is_multiple_of(SECTOR) {
            return Err(Status::IoError);
        }
        self.place(sector, u64::from(len))
    }

    /// Offset of `len` bytes from `sector` on, if there are some and all of them are on the disk.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Status> {
        sector
            .checked_mul(SECTOR)
            .filter(|offset| {
                len > 0
                    && offset
                        .checked_add(len)
                        .is_some_and(|end| end <= self.capacity)
            })
            .ok_or(Status::IoError)
    }

    fn range(&self, kind: u32, sector: u64, count: u32, flags: u32) -> Result<Request, Status> {
        let discards = kind == VIRTIO_BLK_T_DISCARD;
        let (most, known) = if discards {
            (self.discard, 0)
        } else {
            (self.write_zeroes, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
        };
        let most = most.ok_or(Status::Unsupported)?;
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if count > most {
            return Err(Status::IoError);
        }
        let len = u64::from(count) * SECTOR;
        let offset = self.place(sector, len)?;
        Ok(if discards {
            Request::Discard { offset, len }
        } else {
            Request::WriteZeroes {
                offset,
                len,
                may_unmap: flags != 0,
            }
        })
    }
}

impl Request {
    /// Bytes of data that move, which a rate limiter counts.
    pub fn bytes(&self) -> u64 {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => u64::from(len),
            _ => 0,
        }
    }

    /// What the disk has to do for it, with the chain's data in `buffers`. Writes are `durable`, or wait for a flush.
    pub fn operation<'a>(
        &self,
        buffers: &'a [block_util::IoBuf],
        durable: bool,
    ) -> Option<Operation<'a>> {
        Some(match *self {
            Self::Read { offset, .. } => Operation::Read { offset, buffers },
            Self::Write { offset, .. } => Operation::Write {
                offset,
                buffers,
                durable,
            },
            Self::Flush => Operation::Flush,
            Self::Discard { offset, len } => Operation::Discard { offset, len },
            Self::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => Operation::WriteZeroes {
                offset,
                len,
                may_unmap,
            },
            Self::GetId => return None,
        })
    }
}

#[cfg(test)]
mod tests;
