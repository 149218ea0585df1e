//! One request to a raw disk as a sequence of steps, each one call into the kernel. The engines only carry steps out, so
//! what is done about short transfers, alignment, missing features and guarded sectors is the same in all of them.
//!
//! ```text
//! start ─▶ step ─▶ (engine) ─▶ finish_step ─▶ step ─▶ … ─▶ Done
//!
//! read, write:     Move* (direct, or through our own memory a chunk at a time)
//! discard:         Punch ─ a device that cannot ─▶ DiscardDevice
//! write zeroes:    Punch or ZeroRange ─ storage that cannot ─▶ WriteZeroes*
//! ```
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::bounce::{self, CHUNK};
use super::sys::{self, Direction};
use super::target::Target;
use crate::buffer::{AlignedBuf, IoBuf};
use crate::image_type::{ImageType, SECTOR};
use crate::io::{Operation, Request};

/// How often in a row the kernel may say "again" before it is an error.
const RETRIES: u32 = 64;

/// What the kernel is to do next.
#[derive(Debug)]
pub enum Step<'a> {
    /// Move bytes between the disk at `offset` and `pieces`.
    Move {
        direction: Direction,
        pieces: &'a [IoBuf],
        offset: u64,
        /// RWF_.
        flags: i32,
    },
    /// `fdatasync`.
    Sync,
    /// `fallocate`.
    Fallocate { mode: i32, offset: u64, len: u64 },
    /// BLKDISCARD, for which io_uring has no operation in most kernels.
    DiscardDevice { offset: u64, len: u64 },
    /// Nothing: the request ends like this.
    Done(Result<(), i32>),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Move(Direction),
    Sync,
    Punch { then_zeroes: bool },
    ZeroRange,
    WriteZeroes,
    DiscardDevice,
    Done(Result<(), i32>),
}

/// A request on its way. Used again for the next one, so that its list of buffers is allocated once.
#[derive(Debug)]
pub struct Transfer {
    stage: Stage,
    user_data: u64,
    /// What is not done yet.
    offset: u64,
    remaining: u64,
    durable: bool,
    /// The caller's memory; those before `first` are done.
    buffers: Vec<IoBuf>,
    first: usize,
    /// Our own memory and how much of it the present step uses.
    own: Option<AlignedBuf>,
    through_own: bool,
    piece: [IoBuf; 1],
    retries: u32,
}

impl Transfer {
    pub fn new() -> Transfer {
        Transfer {
            stage: Stage::Done(Ok(())),
            user_data: 0,
            offset: 0,
            remaining: 0,
            durable: false,
            buffers: Vec::new(),
            first: 0,
            own: None,
            through_own: false,
            piece: [empty()],
            retries: 0,
        }
    }

    /// The request's.
    pub fn user_data(&self) -> u64 {
        self.user_data
    }

    /// Takes a request.
    pub fn start(&mut self, target: &Target, request: &Request<'_>) {
        self.user_data = request.user_data;
        self.remaining = 0;
        self.durable = false;
        self.buffers.clear();
        self.first = 0;
        self.own = None;
        self.through_own = false;
        self.retries = 0;
        self.stage = self
            .plan(target, &request.operation)
            .unwrap_or_else(|errno| Stage::Done(Err(errno)));
        self.prepare(target);
    }

    fn plan(&mut self, target: &Target, operation: &Operation<'_>) -> Result<Stage, i32> {
        let writes = !matches!(operation, Operation::Read { .. } | Operation::Flush);
        if writes && target.options.read_only {
            return Err(libc::EROFS);
        }
        match *operation {
            Operation::Read { offset, buffers } => {
                self.plan_move(target, Direction::Read, offset, buffers)
            }
            Operation::Write {
                offset,
                buffers,
                durable,
            } => {
                self.durable = durable;
                self.plan_move(target, Direction::Write, offset, buffers)
            }
            Operation::Flush if target.options.read_only => Ok(Stage::Done(Ok(()))),
            Operation::Flush => Ok(Stage::Sync),
            Operation::Discard { offset, len } => {
                self.range(target, offset, len)?;
                if target.geometry.discard_granularity == 0 {
                    return Err(libc::EOPNOTSUPP);
                }
                Ok(if !target.no_punch.load(Ordering::Relaxed) {
                    Stage::Punch { then_zeroes: false }
                } else {
                    cannot_punch(target)
                })
            }
            Operation::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => {
                self.range(target, offset, len)?;
                let punch = may_unmap && target.options.sparse;
                Ok(if punch && !target.no_punch.load(Ordering::Relaxed) {
                    Stage::Punch { then_zeroes: true }
                } else if !target.no_zero_range.load(Ordering::Relaxed) {
                    Stage::ZeroRange
                } else {
                    Stage::WriteZeroes
                })
            }
        }
    }

    /// Takes a range that has to be within the disk.
    fn range(&mut self, target: &Target, offset: u64, len: u64) -> Result<(), i32> {
        let end = offset.checked_add(len).ok_or(libc::EINVAL)?;
        let most = if target.bounded {
            target.size()
        } else {
            i64::MAX as u64
        };
        if end > most {
            return Err(libc::EINVAL);
        }
        if let Some(direct) = target.direct
            && !(offset | len).is_multiple_of(u64::from(direct.offset))
        {
            return Err(libc::EINVAL);
        }
        self.offset = offset;
        self.remaining = len;
        Ok(())
    }

    fn plan_move(
        &mut self,
        target: &Target,
        direction: Direction,
        offset: u64,
        buffers: &[IoBuf],
    ) -> Result<Stage, i32> {
        let len = buffers
            .iter()
            .try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64))
            .ok_or(libc::EINVAL)?;
        self.range(target, offset, len)?;
        self.buffers
            .extend(buffers.iter().filter(|b| !b.is_empty()));
        let unaligned = target.direct.is_some_and(|direct| {
            self.buffers.iter().any(|b| {
                !b.as_ptr().addr().is_multiple_of(direct.memory as usize)
                    || !b.len().is_multiple_of(direct.offset as usize)
            })
        });
        let guarded = direction == Direction::Write
            && target.options.protect_format
            && magics(target)
                .iter()
                .any(|(at, magic)| !overlap(offset, len, *at, magic.len()).is_empty());
        self.through_own = unaligned || guarded;
        Ok(Stage::Move(direction))
    }

    /// Readies the next step: ends what has nothing left to do, fills our own memory.
    fn prepare(&mut self, target: &Target) {
        let needs_bytes = !matches!(self.stage, Stage::Sync | Stage::Done(_));
        if needs_bytes && self.remaining == 0 {
            self.stage = Stage::Done(Ok(()));
        }
        if let Stage::Done(_) = self.stage {
            self.own = None;
            return;
        }
        if let Stage::Move(direction) = self.stage
            && self.through_own
            && let Err(errno) = self.prepare_own(target, direction)
        {
            self.stage = Stage::Done(Err(errno));
            self.own = None;
        }
        if self.stage == Stage::WriteZeroes {
            let count = self.remaining.min(CHUNK as u64) as usize;
            let start = target.zeroes.as_slice().as_ptr().cast_mut();
            // SAFETY: `count` bytes are there, as long as the target is, which the engine keeps. The buffer is only
            // ever written out, so shared references to it do no harm.
            self.piece = [unsafe { IoBuf::new(start, count) }];
        }
    }

    fn prepare_own(&mut self, target: &Target, direction: Direction) -> Result<(), i32> {
        let own = match &mut self.own {
            Some(own) => own,
            none => none.insert(AlignedBuf::new(CHUNK, bounce::ALIGNMENT).ok_or(libc::ENOMEM)?),
        };
        let count = self.remaining.min(CHUNK as u64) as usize;
        let bytes = own.as_mut_slice();
        if direction == Direction::Write {
            // SAFETY: these are the request's buffers, and the request is in flight.
            unsafe { bounce::gather(&self.buffers[self.first..], &mut bytes[..count]) };
            if target.options.protect_format && !may_write(target, self.offset, &bytes[..count]) {
                return Err(libc::EPERM);
            }
        }
        // SAFETY: `own` is kept, and its slices left alone, until the step has finished.
        self.piece = [unsafe { IoBuf::new(bytes.as_mut_ptr(), count) }];
        Ok(())
    }

    /// What to do next. The same until [`Self::finish_step`].
    pub fn step(&self) -> Step<'_> {
        let (offset, len) = (self.offset, self.remaining);
        let flags = if self.durable { libc::RWF_DSYNC } else { 0 };
        match self.stage {
            Stage::Move(direction) => Step::Move {
                direction,
                pieces: if self.through_own {
                    &self.piece
                } else {
                    let rest = &self.buffers[self.first..];
                    &rest[..rest.len().min(libc::UIO_MAXIOV as usize)]
                },
                offset,
                flags: if direction == Direction::Write {
                    flags
                } else {
                    0
                },
            },
            Stage::WriteZeroes => Step::Move {
                direction: Direction::Write,
                pieces: &self.piece,
                offset,
                flags: 0,
            },
            Stage::Sync => Step::Sync,
            Stage::Punch { .. } => Step::Fallocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            },
            Stage::ZeroRange => Step::Fallocate {
                mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            },
            Stage::DiscardDevice => Step::DiscardDevice { offset, len },
            Stage::Done(result) => Step::Done(result),
        }
    }

    /// Takes what the kernel answered to the step: bytes moved (0 where none are), or errno.
    pub fn finish_step(&mut self, target: &Target, answer: Result<usize, i32>) {
        match answer {
            Ok(count) => {
                self.retries = 0;
                self.advance(target, count);
            }
            Err(libc::EINTR | libc::EAGAIN) if self.retries < RETRIES => self.retries += 1,
            Err(errno) => self.stage = self.without(target, errno),
        }
        self.prepare(target);
    }

    fn advance(&mut self, target: &Target, count: usize) {
        self.stage = match self.stage {
            Stage::Move(Direction::Read) if count == 0 && !target.bounded => {
                self.clear_rest();
                self.stage
            }
            // Within the disk by its size: the file was cut short behind our back.
            Stage::Move(_) | Stage::WriteZeroes if count == 0 => Stage::Done(Err(libc::EIO)),
            Stage::Move(direction) => {
                self.advance_move(direction, count);
                if direction == Direction::Read && ends_in_block(target, count) {
                    self.clear_rest();
                }
                self.stage
            }
            Stage::WriteZeroes => {
                self.offset += count as u64;
                self.remaining = self.remaining.saturating_sub(count as u64);
                self.stage
            }
            _ => Stage::Done(Ok(())),
        };
    }

    /// The file has ended: what is not read is zeroes.
    fn clear_rest(&mut self) {
        let rest = self.buffers.get(self.first..).unwrap_or_default();
        // SAFETY: these are the request's buffers, and the request is in flight.
        unsafe { bounce::clear(rest) };
        self.remaining = 0;
    }

    fn advance_move(&mut self, direction: Direction, count: usize) {
        if self.through_own
            && direction == Direction::Read
            && let Some(own) = &self.own
        {
            let bytes = own.as_slice();
            // SAFETY: these are the request's buffers, and the request is in flight.
            unsafe {
                bounce::scatter(
                    &bytes[..count.min(bytes.len())],
                    &self.buffers[self.first..],
                )
            };
        }
        self.offset += count as u64;
        self.remaining = self.remaining.saturating_sub(count as u64);
        let mut count = count;
        while let Some(buffer) = self.buffers.get_mut(self.first)
            && count > 0
        {
            let step = count.min(buffer.len());
            buffer.advance(step);
            count -= step;
            if buffer.is_empty() {
                self.first += 1;
            }
        }
    }

    /// The stage that does without what the storage just refused.
    fn without(&self, target: &Target, errno: i32) -> Stage {
        let refused = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY);
        match self.stage {
            Stage::Punch { then_zeroes } if refused => {
                target.no_punch.store(true, Ordering::Relaxed);
                if then_zeroes {
                    Stage::ZeroRange
                } else {
                    cannot_punch(target)
                }
            }
            Stage::ZeroRange if refused => {
                target.no_zero_range.store(true, Ordering::Relaxed);
                Stage::WriteZeroes
            }
            Stage::DiscardDevice if refused => Stage::Done(Err(libc::EOPNOTSUPP)),
            _ => Stage::Done(Err(errno)),
        }
    }

    /// Carries the present step out, waiting for it.
    pub fn run_step(&mut self, target: &Target) {
        let done = match self.step() {
            Step::Move {
                direction,
                pieces,
                offset,
                flags,
            } => {
                // SAFETY: the pieces are the request's, which is in flight, or our own, which are kept.
                unsafe { sys::transfer(&target.file, direction, pieces, offset, flags) }
            }
            Step::Sync => target.file.sync_data().map(|()| 0),
            Step::Fallocate { mode, offset, len } => {
                sys::fallocate(&target.file, mode, offset, len).map(|()| 0)
            }
            Step::DiscardDevice { offset, len } => {
                sys::device_discard(&target.file, offset, len).map(|()| 0)
            }
            Step::Done(_) => return,
        };
        self.finish_step(target, done.map_err(|e| errno(&e)));
    }
}

/// Whether a direct read of `count` bytes met the end of a file that grows as it is written: past it nothing aligned is left to read.
fn ends_in_block(target: &Target, count: usize) -> bool {
    let direct = target.direct.filter(|_| !target.bounded);
    direct.is_some_and(|d| !count.is_multiple_of(d.offset as usize))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn empty() -> IoBuf {
    // SAFETY: no bytes are named.
    unsafe { IoBuf::new(std::ptr::null_mut(), 0) }
}

/// How storage discards that punches no holes.
fn cannot_punch(target: &Target) -> Stage {
    if target.is_device {
        Stage::DiscardDevice
    } else {
        Stage::Done(Err(libc::EOPNOTSUPP))
    }
}

/// Where in a disk of the present size another format's magic would be found, and what it is.
fn magics(target: &Target) -> [(u64, &'static [u8]); 4] {
    let footer = target.size().saturating_sub(SECTOR);
    [
        (0, ImageType::QCOW),
        (0, ImageType::VHDX),
        (0, ImageType::VHD),
        (footer, ImageType::VHD),
    ]
}

/// The part of `at..at + count` that a write of `len` bytes at `offset` covers, counted from `at`.
fn overlap(offset: u64, len: u64, at: u64, count: usize) -> Range<usize> {
    let end = offset.saturating_add(len);
    let from = offset.saturating_sub(at).min(count as u64);
    let to = end.saturating_sub(at).min(count as u64);
    from as usize..(to as usize).max(from as usize)
}

/// Whether `bytes` at `offset` leave the disk looking raw: where a part of a magic is written alone, it must differ.
fn may_write(target: &Target, offset: u64, bytes: &[u8]) -> bool {
    magics(target).iter().all(|(at, magic)| {
        let part = overlap(offset, bytes.len() as u64, *at, magic.len());
        if part.is_empty() {
            return true;
        }
        let start = (*at + part.start as u64 - offset) as usize;
        bytes.get(start..start + part.len()) != magic.get(part)
    })
}
