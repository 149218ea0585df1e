//! Direct I/O (`O_DIRECT`) for callers whose memory, offsets and lengths are aligned to nothing.
//!
//! What is aligned goes straight to the kernel; all else through memory of our own. A write that covers parts of blocks reads these first.
//! A file ends with a whole block after that, with zeros behind what was written.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock};

/// Bytes of our own memory, at most; more only for blocks that are larger.
const CHUNK: usize = 256 << 10;
/// The largest block there can be.
const MAX_BLOCK: u64 = 1 << 20;
/// Where nothing is known, this suits all.
const PAGE: usize = 4096;

/// What direct I/O on a file has to be aligned to, and who writes parts of its blocks.
#[derive(Debug)]
pub(crate) struct Direct {
    /// Of the memory's address.
    memory: usize,
    /// Of offsets and lengths.
    block: u64,
    /// Who writes a part of a block writes back what it read of the rest, so it has to be alone: two of them would lose each other's
    /// bytes, and so would one who writes the whole block in between. Writers of whole blocks need not know of each other. Those who
    /// bypass this lock with I/O of their own write whole blocks, all bytes of which are theirs: no part of such a block is anybody
    /// else's to write.
    writes: RwLock<()>,
}

impl Direct {
    /// For a file that is open with `O_DIRECT`, in blocks of at least `block` bytes.
    pub fn new(file: &File, block: u64) -> io::Result<Self> {
        let (memory, offset) = told_alignment(file).unwrap_or_else(|| tried_alignment(file));
        if !block.is_power_of_two() || block.max(offset) > MAX_BLOCK {
            let block = block.max(offset);
            let why = format!(
                "direct I/O in blocks of {block} bytes; powers of two up to 1 MiB are possible"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Ok(Direct {
            memory,
            block: block.max(offset),
            writes: RwLock::new(()),
        })
    }

    pub fn block(&self) -> u64 {
        self.block
    }

    /// Fills `buf`, with zeros past the file's end.
    pub fn read_at(&self, file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        if self.takes(buf, offset) {
            return self.read_blocks(file, buf, offset);
        }
        let mut own = self.own(offset, buf.len());
        while !buf.is_empty() {
            let part = self.part(offset, buf.len());
            let blocks = own.first(part.blocks);
            self.read_blocks(file, blocks, part.start)?;
            let (now, rest) = buf.split_at_mut(part.length);
            now.copy_from_slice(&blocks[part.skip..part.skip + part.length]);
            (buf, offset) = (rest, offset + part.length as u64);
        }
        Ok(())
    }

    pub fn write_at(&self, file: &File, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        if self.takes(buf, offset) {
            let _others = self.writes.read().unwrap_or_else(PoisonError::into_inner);
            return file.write_all_at(buf, offset);
        }
        let mut own = self.own(offset, buf.len());
        while !buf.is_empty() {
            let part = self.part(offset, buf.len());
            let (now, rest) = buf.split_at(part.length);
            self.write_part(file, own.first(part.blocks), &part, now)?;
            (buf, offset) = (rest, offset + part.length as u64);
        }
        Ok(())
    }

    /// Writes the blocks of `part`, which are `own`: `data`, and around it what is there.
    fn write_part(&self, file: &File, own: &mut [u8], part: &Part, data: &[u8]) -> io::Result<()> {
        let block = self.block as usize;
        let end = part.skip + part.length;
        let (head, tail) = (part.skip > 0, end < part.blocks);
        let copy_and_write = |own: &mut [u8]| {
            own[part.skip..end].copy_from_slice(data);
            file.write_all_at(own, part.start)
        };
        if !head && !tail {
            let _others = self.writes.read().unwrap_or_else(PoisonError::into_inner);
            return copy_and_write(own);
        }
        let _alone = self.writes.write().unwrap_or_else(PoisonError::into_inner);
        let last = part.blocks - block;
        if head {
            self.read_blocks(file, &mut own[..block], part.start)?;
        }
        if tail && (last > 0 || !head) {
            self.read_blocks(file, &mut own[last..], part.start + last as u64)?;
        }
        copy_and_write(own)
    }

    /// The whole blocks within a range that is no longer needed; none if there are none. A file system's block is a page: to free
    /// parts of one, it would put it into the page cache.
    pub fn blocks_within(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = self.block.max(PAGE as u64);
        let end = offset.saturating_add(len) / block * block;
        let start = offset.checked_next_multiple_of(block).unwrap_or(end);
        (start, end.saturating_sub(start))
    }

    fn takes(&self, buf: &[u8], offset: u64) -> bool {
        buf.as_ptr().addr().is_multiple_of(self.memory)
            && (offset | buf.len() as u64).is_multiple_of(self.block)
    }

    /// Reads whole blocks into aligned memory.
    fn read_blocks(&self, file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        let block = self.block as usize;
        while !buf.is_empty() {
            let n = match file.read_at(buf, offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                n => n?,
            };
            if n < block {
                // The file ends in this block.
                buf[n..].fill(0);
                break;
            }
            // Where it ends in a later one, that is read again.
            let whole = n / block * block;
            (buf, offset) = (&mut buf[whole..], offset + whole as u64);
        }
        Ok(())
    }

    fn chunk(&self) -> usize {
        CHUNK.max(self.block as usize)
    }

    /// The next bytes that fit in our own memory, of `length` at `offset`.
    fn part(&self, offset: u64, length: usize) -> Part {
        let start = offset / self.block * self.block;
        let skip = (offset - start) as usize;
        let length = length.min(self.chunk() - skip);
        Part {
            start,
            skip,
            length,
            blocks: (skip + length).next_multiple_of(self.block as usize),
        }
    }

    /// Memory for all parts of a range: the first one is all of it, or as long as any.
    fn own(&self, offset: u64, length: usize) -> Own {
        Own::new(self.part(offset, length).blocks, self.memory)
    }
}

/// Bytes, and the blocks that they lie in.
struct Part {
    start: u64,
    /// Bytes of the first block before them.
    skip: usize,
    length: usize,
    /// Bytes of the blocks.
    blocks: usize,
}

/// Aligned memory.
struct Own {
    bytes: Vec<u8>,
    start: usize,
}

impl Own {
    fn new(length: usize, alignment: usize) -> Self {
        let bytes = vec![0; length + alignment];
        let start = bytes.as_ptr().addr().next_multiple_of(alignment) - bytes.as_ptr().addr();
        Own { bytes, start }
    }

    fn first(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

/// Alignment of memory and of offsets, as the kernel tells it.
#[allow(unsafe_code)]
fn told_alignment(file: &File) -> Option<(usize, u64)> {
    // SAFETY: all zeros is a `statx`, which is integers.
    let mut answer: libc::statx = unsafe { mem::zeroed() };
    // SAFETY: the path is an empty string that ends, and the kernel writes one `statx`.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
    let told = result == 0
        && answer.stx_mask & libc::STATX_DIOALIGN != 0
        && memory.is_power_of_two()
        && offset.is_power_of_two();
    told.then_some((memory as usize, u64::from(offset)))
}

/// For a kernel before 6.1, or a file system that does not tell: the smallest read that works.
fn tried_alignment(file: &File) -> (usize, u64) {
    let mut own = Own::new(PAGE, PAGE);
    let works = |size: &usize| file.read_at(own.first(*size), 0).is_ok();
    let block = [512, 1024, 2048].into_iter().find(works).unwrap_or(PAGE);
    (PAGE, block as u64)
}
