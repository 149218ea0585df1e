//! What the tests of disks share: images on a real file system, and memory for requests.
#![allow(unsafe_code, dead_code, clippy::unwrap_used)]

use std::io;
use std::path::Path;

use block_util::{
    AlignedBuf, DiskFile, DiskIo, Engine, IoBuf, IoOptions, LockGranularity, Operation, RawDisk,
    RawOptions,
};
use tempfile::NamedTempFile;

/// Every engine has to pass every test.
pub const ENGINES: [Engine; 3] = [Engine::IoUring, Engine::Aio, Engine::Sync];

pub const BUFFERED: RawOptions = RawOptions {
    read_only: false,
    direct: false,
    sparse: true,
    protect_format: false,
    lock: LockGranularity::ByteRange,
};

pub const DIRECT: RawOptions = RawOptions {
    direct: true,
    ..BUFFERED
};

/// An image of `size` zero bytes on the file system of the build, where `O_DIRECT` and holes are real.
pub fn image(size: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

pub fn open(path: &Path, options: &RawOptions) -> RawDisk {
    RawDisk::open(path, options).unwrap()
}

pub fn queue(disk: &RawDisk, engine: Engine, depth: usize) -> Box<dyn DiskIo> {
    disk.open_io(&IoOptions { depth, engine }).unwrap()
}

/// Memory of one request: it starts `skew` bytes past an aligned address, and is told as pieces of the lengths given.
#[derive(Debug)]
pub struct Memory {
    own: AlignedBuf,
    skew: usize,
    len: usize,
}

impl Memory {
    pub fn new(len: usize, skew: usize) -> Memory {
        Memory {
            own: AlignedBuf::new(len + skew, 4096).unwrap(),
            skew,
            len,
        }
    }

    pub fn of(data: &[u8], skew: usize) -> Memory {
        let mut memory = Memory::new(data.len(), skew);
        memory.own.as_mut_slice()[skew..skew + data.len()].copy_from_slice(data);
        memory
    }

    pub fn bytes(&self) -> &[u8] {
        &self.own.as_slice()[self.skew..self.skew + self.len]
    }

    pub fn set(&mut self, at: usize, byte: u8) {
        self.own.as_mut_slice()[self.skew + at] = byte;
    }

    /// Pieces of `step` bytes.
    pub fn pieces(&mut self, step: usize) -> Vec<IoBuf> {
        let bytes = &mut self.own.as_mut_slice()[self.skew..self.skew + self.len];
        bytes
            .chunks_mut(step.max(1))
            // SAFETY: tests keep the memory, and look at it only when the request has completed.
            .map(|piece| unsafe { IoBuf::new(piece.as_mut_ptr(), piece.len()) })
            .collect()
    }
}

pub fn write(io: &mut dyn DiskIo, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut memory = Memory::of(data, 0);
    let buffers = memory.pieces(data.len());
    io.run(Operation::Write {
        offset,
        buffers: &buffers,
        durable: false,
    })
}

pub fn read(io: &mut dyn DiskIo, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut memory = Memory::new(len, 0);
    let buffers = memory.pieces(len);
    io.run(Operation::Read {
        offset,
        buffers: &buffers,
    })?;
    Ok(memory.bytes().to_vec())
}

/// Bytes that differ by place and by `seed`.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
