//! Requests through the library's blocking calls, on a helper's thread: what allocates clusters, copies on write, or reads what is
//! compressed or in a backing file.
//!
//! Data goes through a buffer of our own: the library works on slices, which the guest's memory, changing at any time, cannot be.

use std::io;
use std::sync::Arc;

use block_util::{AlignedBuf, IoBuf, Operation};
use qcow::Image;
use vm_memory::VolatileSlice;

/// Bytes of our own buffer.
pub(super) const CHUNK: usize = 1 << 20;
/// Of our own buffer, for direct I/O; nowhere is more asked for.
const ALIGNMENT: usize = 4096;

/// Carries requests out, one at a time.
pub(super) struct Copier {
    image: Arc<Image>,
    /// None until it is needed.
    chunk: Option<AlignedBuf>,
}

impl Copier {
    pub fn new(image: Arc<Image>) -> Self {
        Self { image, chunk: None }
    }

    pub fn carry_out(&mut self, operation: &Operation<'_>) -> io::Result<()> {
        let done = self.dispatch(operation);
        if let Err(e) = &done {
            log::debug!("{e}");
        }
        done
    }

    fn dispatch(&mut self, operation: &Operation<'_>) -> io::Result<()> {
        match *operation {
            Operation::Read { offset, buffers } => self.read(offset, buffers),
            Operation::Write {
                offset,
                buffers,
                durable,
            } => {
                self.write(offset, buffers)?;
                if durable {
                    self.image.flush().map_err(to_io)?;
                }
                Ok(())
            }
            Operation::Flush => self.image.flush().map_err(to_io),
            Operation::Discard { offset, len }
            | Operation::WriteZeroes {
                offset,
                len,
                may_unmap: true,
            } => self.image.discard(offset, len).map_err(to_io),
            Operation::WriteZeroes {
                offset,
                len,
                may_unmap: false,
            } => self.image.write_zeroes(offset, len).map_err(to_io),
        }
    }

    /// Fails as a whole before anything moves if the range is not the disk's.
    fn check(&self, offset: u64, buffers: &[IoBuf]) -> io::Result<()> {
        let end = super::length(buffers).and_then(|len| offset.checked_add(len));
        if end.is_some_and(|end| end <= self.image.len()) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn read(&mut self, mut offset: u64, buffers: &[IoBuf]) -> io::Result<()> {
        self.check(offset, buffers)?;
        let Self { image, chunk } = self;
        each_part(chunk, buffers, |part, chunk| {
            image.read_at(chunk, offset).map_err(to_io)?;
            part.copy_from(chunk);
            offset += chunk.len() as u64;
            Ok(())
        })
    }

    fn write(&mut self, mut offset: u64, buffers: &[IoBuf]) -> io::Result<()> {
        self.check(offset, buffers)?;
        let Self { image, chunk } = self;
        each_part(chunk, buffers, |part, chunk| {
            part.copy_to(chunk);
            image.write_at(chunk, offset).map_err(to_io)?;
            offset += chunk.len() as u64;
            Ok(())
        })
    }
}

/// Calls `each` with parts of the guest's memory, in order, and as much of `own`.
fn each_part(
    own: &mut Option<AlignedBuf>,
    buffers: &[IoBuf],
    mut each: impl FnMut(VolatileSlice<'_>, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let own = match own {
        Some(own) => own,
        none => none.insert(AlignedBuf::new(CHUNK, ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?),
    };
    for buffer in buffers {
        for from in (0..buffer.len()).step_by(CHUNK) {
            let part = buffer.part(from, CHUNK);
            let chunk = own.as_mut_slice().get_mut(..part.len()).unwrap_or_default();
            each(volatile(&part), chunk)?;
        }
    }
    Ok(())
}

/// The guest's memory behind a buffer of a request that is in flight.
#[allow(unsafe_code)]
pub(super) fn volatile(buffer: &IoBuf) -> VolatileSlice<'_> {
    // SAFETY: the contract of `IoBuf::new`: the memory stays mapped until the request's completion is taken, and no Rust
    // reference to it says otherwise. Accesses through the slice are volatile.
    unsafe { VolatileSlice::new(buffer.as_ptr(), buffer.len()) }
}

/// As [`block_util::Completion`] tells errors apart.
pub(super) fn to_io(error: qcow::Error) -> io::Error {
    let kind = match &error {
        qcow::Error::OutOfRange { .. } => io::ErrorKind::InvalidInput,
        qcow::Error::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
