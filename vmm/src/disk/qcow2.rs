//! A qcow2 image as a disk. Requests are carried out on the worker's thread, in [`DiskIo::kick`].
//!
//! Data goes through a buffer of our own: the library works on slices, which the guest's memory, changing at any time, cannot be.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use block_util::{
    Completion, DiskError, DiskFile, DiskIo, Geometry, IoBuf, IoOptions, LockMode, Operation,
    QueueFull, Request, lock_file, unlock_file,
};
use qcow::Image;
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::DiskConfig;

const SECTOR: u32 = 512;
/// Bytes of our own buffer.
const CHUNK: usize = 1 << 20;

/// A qcow2 image.
pub struct QcowDisk {
    path: PathBuf,
    image: Arc<Image>,
    /// For the lock.
    file: File,
    read_only: bool,
}

impl QcowDisk {
    /// Opens the image of `config`. Its backing file is followed only if the config says so.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let path = config.path.clone();
        let file = OpenOptions::new()
            .read(true)
            .write(!config.readonly)
            .open(&path)
            .map_err(|source| DiskError::Open {
                path: path.clone(),
                source,
            })?;
        // Before the image is read: what another process is writing must not be.
        lock_file(&file, &path, super::lock_mode(config))?;
        let options = qcow::OpenOptions::new()
            .write(!config.readonly)
            .follow_backing(config.backing_files)
            .follow_data_file(config.backing_files);
        let image = Image::open(&path, &options).map_err(|source| DiskError::Format {
            path: path.clone(),
            source: Box::new(source),
        })?;
        Ok(Self {
            path,
            image: Arc::new(image),
            file,
            read_only: config.readonly,
        })
    }
}

impl fmt::Debug for QcowDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QcowDisk({:?})", self.path)
    }
}

impl DiskFile for QcowDisk {
    fn size(&self) -> u64 {
        self.image.len()
    }

    fn geometry(&self) -> Geometry {
        let cluster = u32::try_from(self.image.cluster_size()).unwrap_or(SECTOR);
        Geometry {
            logical_block_size: SECTOR,
            physical_block_size: 4096,
            minimum_io_size: 4096,
            optimal_io_size: cluster,
            discard_granularity: if self.read_only { 0 } else { cluster },
        }
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.image
            .resize(size, qcow::Shrink::Discard)
            .map_err(|source| DiskError::Resize {
                path: self.path.clone(),
                size,
                source: to_io(source),
            })
    }

    fn lock(&self, mode: LockMode) -> Result<(), DiskError> {
        lock_file(&self.file, &self.path, mode)
    }

    fn unlock(&self) -> Result<(), DiskError> {
        unlock_file(&self.file, &self.path)
    }

    fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
        let event =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| DiskError::Engine {
                path: self.path.clone(),
                depth: options.depth,
                engine: options.engine,
                source,
            })?;
        Ok(Box::new(QcowIo {
            image: self.image.clone(),
            depth: options.depth,
            queued: VecDeque::with_capacity(options.depth),
            done: VecDeque::with_capacity(options.depth),
            event,
            chunk: vec![0; CHUNK],
        }))
    }
}

/// What a request is, its list of buffers copied.
enum Work {
    Read(u64, Vec<IoBuf>),
    Write(u64, Vec<IoBuf>, bool),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

/// One queue.
struct QcowIo {
    image: Arc<Image>,
    depth: usize,
    queued: VecDeque<(u64, Work)>,
    done: VecDeque<Completion>,
    /// Readable while `done` holds something.
    event: EventFd,
    chunk: Vec<u8>,
}

impl fmt::Debug for QcowIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QcowIo({} in flight)", self.in_flight())
    }
}

impl QcowIo {
    fn carry_out(&mut self, work: &Work) -> io::Result<()> {
        match work {
            Work::Read(offset, buffers) => self.read(*offset, buffers),
            Work::Write(offset, buffers, durable) => {
                self.write(*offset, buffers)?;
                if *durable {
                    self.image.flush().map_err(to_io)?;
                }
                Ok(())
            }
            Work::Flush => self.image.flush().map_err(to_io),
            Work::Discard(offset, len) | Work::WriteZeroes(offset, len, true) => {
                self.image.discard(*offset, *len).map_err(to_io)
            }
            Work::WriteZeroes(offset, len, false) => {
                self.image.write_zeroes(*offset, *len).map_err(to_io)
            }
        }
    }

    /// Fails as a whole before anything moves if the range is not the disk's.
    fn check(&self, offset: u64, buffers: &[IoBuf]) -> io::Result<()> {
        let len = buffers
            .iter()
            .try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
        let end = len.and_then(|len| offset.checked_add(len));
        if end.is_some_and(|end| end <= self.image.len()) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn read(&mut self, mut offset: u64, buffers: &[IoBuf]) -> io::Result<()> {
        self.check(offset, buffers)?;
        for buffer in buffers {
            let guest = volatile(buffer);
            let mut done = 0;
            while done < guest.len() {
                let count = (guest.len() - done).min(CHUNK);
                let chunk = self.chunk.get_mut(..count).unwrap_or_default();
                self.image.read_at(chunk, offset).map_err(to_io)?;
                let part = guest.subslice(done, count).map_err(io::Error::other)?;
                part.copy_from(chunk);
                done += count;
                offset += count as u64;
            }
        }
        Ok(())
    }

    fn write(&mut self, mut offset: u64, buffers: &[IoBuf]) -> io::Result<()> {
        self.check(offset, buffers)?;
        for buffer in buffers {
            let guest = volatile(buffer);
            let mut done = 0;
            while done < guest.len() {
                let count = (guest.len() - done).min(CHUNK);
                let chunk = self.chunk.get_mut(..count).unwrap_or_default();
                let part = guest.subslice(done, count).map_err(io::Error::other)?;
                part.copy_to(chunk);
                self.image.write_at(chunk, offset).map_err(to_io)?;
                done += count;
                offset += count as u64;
            }
        }
        Ok(())
    }
}

#[allow(unsafe_code)]
fn volatile(buffer: &IoBuf) -> VolatileSlice<'_> {
    // SAFETY: the contract of `IoBuf::new`: the memory stays mapped until the request's completion is taken, and no Rust
    // reference to it says otherwise. Accesses through the slice are volatile.
    unsafe { VolatileSlice::new(buffer.as_ptr(), buffer.len()) }
}

fn to_io(error: qcow::Error) -> io::Error {
    let kind = match &error {
        qcow::Error::OutOfRange { .. } => io::ErrorKind::InvalidInput,
        qcow::Error::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

impl DiskIo for QcowIo {
    fn submit(&mut self, request: Request<'_>) -> Result<(), QueueFull> {
        if self.in_flight() >= self.depth {
            return Err(QueueFull { depth: self.depth });
        }
        let work = match request.operation {
            Operation::Read { offset, buffers } => Work::Read(offset, buffers.to_vec()),
            Operation::Write {
                offset,
                buffers,
                durable,
            } => Work::Write(offset, buffers.to_vec(), durable),
            Operation::Flush => Work::Flush,
            Operation::Discard { offset, len } => Work::Discard(offset, len),
            Operation::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => Work::WriteZeroes(offset, len, may_unmap),
        };
        self.queued.push_back((request.user_data, work));
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        while let Some((user_data, work)) = self.queued.pop_front() {
            let result = self.carry_out(&work);
            if let Err(e) = &result {
                log::debug!("{e}");
            }
            if self.done.is_empty() {
                self.event.write(1)?;
            }
            self.done.push_back(Completion { user_data, result });
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let completion = self.done.pop_front()?;
        if self.done.is_empty() {
            // It was written once for all of them.
            let _ = self.event.read();
        }
        Some(completion)
    }

    #[allow(unsafe_code)]
    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    fn wait(&mut self) -> io::Result<()> {
        self.kick()
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.done.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(dir: &std::path::Path, readonly: bool) -> QcowDisk {
        let path = dir.join("d.qcow2");
        if !path.exists() {
            Image::create(&path, &qcow::CreateOptions::new(4 << 20))
                .unwrap()
                .close()
                .unwrap();
        }
        QcowDisk::open(&DiskConfig {
            path,
            readonly,
            ..DiskConfig::default()
        })
        .unwrap()
    }

    #[allow(unsafe_code)]
    fn buffer(bytes: &mut [u8]) -> IoBuf {
        // SAFETY: the tests keep the bytes until the request is done, and leave them alone meanwhile.
        unsafe { IoBuf::new(bytes.as_mut_ptr(), bytes.len()) }
    }

    #[test]
    fn what_is_written_in_parts_is_read_in_others() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path(), false);
        let mut io = disk.open_io(&IoOptions::default()).unwrap();
        let mut data: Vec<u8> = (0..CHUNK + 5120).map(|i| (i / 7) as u8).collect();
        let (a, b) = data.split_at_mut(512);
        let buffers = [buffer(a), buffer(b)];
        let offset = 70_000 / 512 * 512;
        io.run(Operation::Write {
            offset,
            buffers: &buffers,
            durable: true,
        })
        .unwrap();
        let mut back = vec![0; data.len()];
        let (a, b) = back.split_at_mut(CHUNK + 1024);
        let buffers = [buffer(a), buffer(b)];
        io.run(Operation::Read {
            offset,
            buffers: &buffers,
        })
        .unwrap();
        assert!(back == data);
        io.run(Operation::Discard {
            offset: 0,
            len: 4 << 20,
        })
        .unwrap();
        io.run(Operation::Read {
            offset,
            buffers: &buffers,
        })
        .unwrap();
        assert!(back.iter().all(|b| *b == 0));
    }

    #[test]
    fn wrong_requests_complete_with_their_kind_of_error() {
        let dir = tempfile::tempdir().unwrap();
        drop(disk(dir.path(), false));
        let disk = disk(dir.path(), true);
        let mut io = disk.open_io(&IoOptions::default()).unwrap();
        let mut sector = [1; 512];
        let buffers = [buffer(&mut sector)];
        let mut write = |offset| {
            io.run(Operation::Write {
                offset,
                buffers: &buffers,
                durable: false,
            })
            .unwrap_err()
            .kind()
        };
        assert_eq!(write(4 << 20), io::ErrorKind::InvalidInput);
        assert_eq!(write(u64::MAX - 100), io::ErrorKind::InvalidInput);
        assert_eq!(write(0), io::ErrorKind::ReadOnlyFilesystem);
    }

    #[test]
    fn an_image_in_use_is_not_opened_twice() {
        let dir = tempfile::tempdir().unwrap();
        let first = disk(dir.path(), false);
        let config = DiskConfig {
            path: dir.path().join("d.qcow2"),
            ..DiskConfig::default()
        };
        assert!(matches!(
            QcowDisk::open(&config),
            Err(DiskError::InUse { .. })
        ));
        drop(first);
        QcowDisk::open(&config).unwrap();
    }

    #[test]
    fn the_event_is_readable_exactly_while_completions_wait() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path(), false);
        let mut io = disk
            .open_io(&IoOptions {
                depth: 2,
                ..IoOptions::default()
            })
            .unwrap();
        let flush = |user_data| Request {
            operation: Operation::Flush,
            user_data,
        };
        io.submit(flush(1)).unwrap();
        io.submit(flush(2)).unwrap();
        assert_eq!(io.submit(flush(3)), Err(QueueFull { depth: 2 }));
        io.kick().unwrap();
        let done: Vec<u64> = io.drain().map(|c| c.user_data).collect();
        assert_eq!(done, [1, 2]);
        assert!(io.next_completion().is_none());
        io.submit(flush(4)).unwrap();
        io.wait().unwrap();
        assert_eq!(io.in_flight(), 1);
    }
}
