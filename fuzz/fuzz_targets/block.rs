//! The block device and a driver that offers it anything, through `virtio_devices::Block` on a raw disk in memory.
//!
//! Holds to what `fuzz::device` says; to the disk as a plain array of bytes, where requests come one by one; to a disk that keeps its
//! size, and its bytes where it is only to be read.

#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use arbitrary::Arbitrary;
use block_util::{
    DiskError, DiskFile, DiskIo, Engine, Geometry, IoOptions, LockMode, RawDisk, RawOptions,
};
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::{Block, BlockConfig};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

const SECTOR: usize = 512;
/// Of the disk.
const SECTORS: usize = 72;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;

thread_local! {
    /// What the disk is in; made once.
    static IMAGE: File = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).expect("a file");
}

#[derive(Arbitrary, Debug)]
struct Input {
    setup: Setup,
    case: Case<Ask, ()>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Setup {
    /// Mostly synchronous: the kernel takes long to make and end the others.
    engine: u8,
    /// The device must refuse writes: the file would take them.
    read_only: bool,
    sparse: bool,
    queues: u8,
}

/// A request with all its parts; where it lies on no disk, it fails.
#[derive(Arbitrary, Debug)]
struct Ask {
    queue: u8,
    what: What,
}

#[derive(Arbitrary, Debug)]
enum What {
    Read {
        sector: Sector,
        count: u8,
    },
    Write {
        sector: Sector,
        count: u8,
        byte: u8,
    },
    Flush,
    GetId,
    Discard {
        sector: Sector,
        count: u32,
    },
    WriteZeroes {
        sector: Sector,
        count: u32,
        flags: u8,
    },
    Other(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sector {
    Near(u8),
    Any(u64),
}

impl Sector {
    fn number(self) -> u64 {
        match self {
            Self::Near(sector) => u64::from(sector) % (SECTORS as u64 + 8),
            Self::Any(sector) => sector,
        }
    }
}

/// A disk that can be written, and says that it cannot.
#[derive(Debug)]
struct ReadOnly(RawDisk);

impl DiskFile for ReadOnly {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn resize(&self, size: u64) -> Result<(), DiskError> {
        self.0.resize(size)
    }

    fn lock(&self, mode: LockMode) -> Result<(), DiskError> {
        self.0.lock(mode)
    }

    fn unlock(&self) -> Result<(), DiskError> {
        self.0.unlock()
    }

    fn open_io(&self, options: &IoOptions) -> Result<Box<dyn DiskIo>, DiskError> {
        self.0.open_io(options)
    }
}

struct Disk<'a> {
    setup: Setup,
    image: &'a File,
    /// What the disk holds.
    bytes: Vec<u8>,
}

impl<'a> Disk<'a> {
    fn new(setup: Setup, image: &'a File) -> Self {
        let bytes: Vec<u8> = (0..SECTORS * SECTOR)
            .map(|at| (at / SECTOR) as u8 ^ at as u8)
            .collect();
        image.set_len(bytes.len() as u64).expect("sizing the image");
        image.write_all_at(&bytes, 0).expect("filling the image");
        Self {
            setup,
            image,
            bytes,
        }
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.image.as_raw_fd()).into()
    }

    /// What the image holds now.
    fn look(&self) -> Vec<u8> {
        let len = self.image.metadata().expect("asking for the size").len();
        assert_eq!(len, self.bytes.len() as u64, "the disk has another size");
        let mut bytes = vec![0; self.bytes.len()];
        self.image
            .read_exact_at(&mut bytes, 0)
            .expect("reading the image");
        bytes
    }

    /// Where so many sectors are, if they are on the disk.
    fn range(sector: Sector, count: u32) -> Option<std::ops::Range<usize>> {
        let end = sector.number().checked_add(count.into())?;
        let on_disk = count > 0 && end <= SECTORS as u64;
        on_disk.then(|| sector.number() as usize * SECTOR..end as usize * SECTOR)
    }
}

fn header(kind: u32, sector: Sector) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.number().to_le_bytes());
    header
}

fn range_request(kind: u32, sector: Sector, count: u32, flags: u32) -> Request {
    let mut readable = header(kind, Sector::Any(0));
    readable.extend(sector.number().to_le_bytes());
    readable.extend(count.to_le_bytes());
    readable.extend(flags.to_le_bytes());
    Request {
        readable,
        writable: 1,
    }
}

fn data(byte: u8, count: u8) -> impl Iterator<Item = u8> {
    (0..usize::from(count % 16) * SECTOR).map(move |at| byte ^ (at / 3) as u8)
}

impl Subject for Disk<'_> {
    type Ask = Ask;
    type Event = ();

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let options = RawOptions {
            sparse: self.setup.sparse,
            ..RawOptions::default()
        };
        let disk = RawDisk::open(&self.path(), &options).expect("opening the image");
        let disk: Arc<dyn DiskFile> = match self.setup.read_only {
            true => Arc::new(ReadOnly(disk)),
            false => Arc::new(disk),
        };
        let config = BlockConfig {
            id: "disk".into(),
            queues: 1 + u16::from(self.setup.queues % 3),
            queue_size: 64,
            serial: "0123456789".into(),
            engine: match self.setup.engine {
                250..=252 => Engine::Auto,
                253..=255 => Engine::Aio,
                _ => Engine::Sync,
            },
            affinity: Vec::new(),
            poll: self.setup.queues % 2 == 0,
        };
        Box::new(Block::new(config, disk).expect("a block device"))
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        let queue = u16::from(ask.queue) % (1 + u16::from(self.setup.queues % 3));
        let plain = |kind, sector, writable| Request {
            readable: header(kind, sector),
            writable,
        };
        let request = match ask.what {
            What::Read { sector, count } => {
                plain(IN, sector, u32::from(count % 16) * SECTOR as u32 + 1)
            }
            What::Write {
                sector,
                count,
                byte,
            } => {
                let mut readable = header(OUT, sector);
                readable.extend(data(byte, count));
                Request {
                    readable,
                    writable: 1,
                }
            }
            What::Flush => plain(FLUSH, Sector::Any(0), 1),
            What::GetId => plain(GET_ID, Sector::Any(0), 21),
            What::Discard { sector, count } => range_request(DISCARD, sector, count, 0),
            What::WriteZeroes {
                sector,
                count,
                flags,
            } => range_request(WRITE_ZEROES, sector, count, flags.into()),
            What::Other(kind) => plain(kind, Sector::Any(0), 1),
        };
        (queue, request)
    }

    fn check(&mut self, ask: &Ask, answer: &[u8]) {
        let (status, answer) = answer.split_last().expect("a status");
        let writable = !self.setup.read_only;
        match ask.what {
            What::Read { sector, count } => {
                let range = Self::range(sector, u32::from(count % 16));
                assert_eq!(*status == OK, range.is_some());
                if let Some(range) = range {
                    assert!(answer == &self.bytes[range], "not what was written");
                }
            }
            What::Write {
                sector,
                count,
                byte,
            } => {
                let range = Self::range(sector, u32::from(count % 16)).filter(|_| writable);
                assert_eq!(*status == OK, range.is_some());
                if let Some(range) = range {
                    self.bytes[range].copy_from_slice(&data(byte, count).collect::<Vec<_>>());
                }
            }
            What::Flush => assert_eq!(*status, OK),
            What::GetId => assert_eq!((*status, &answer[..11]), (OK, &b"0123456789\0"[..])),
            What::Discard { sector, count } => {
                let range = Self::range(sector, count).filter(|_| writable);
                match range {
                    None => assert_ne!(*status, OK),
                    // Whatever it reads as now; the rest is as it was.
                    Some(range) => {
                        let now = self.look();
                        self.bytes[range.clone()].copy_from_slice(&now[range]);
                    }
                }
            }
            What::WriteZeroes {
                sector,
                count,
                flags,
            } => {
                let range = Self::range(sector, count).filter(|_| writable && flags < 2);
                assert_eq!(*status == OK, range.is_some());
                if let Some(range) = range {
                    self.bytes[range].fill(0);
                }
            }
            What::Other(kind) if [IN, OUT, FLUSH, GET_ID].contains(&kind) => {}
            What::Other(_) => assert_ne!(*status, OK),
        }
        assert!(self.look() == self.bytes, "the disk holds something else");
    }

    fn settled(&mut self) {
        let now = self.look();
        if self.setup.read_only {
            assert!(now == self.bytes, "a disk changed that is only to be read");
        }
        self.bytes = now;
    }

    fn alive(&mut self, guest: &mut Guest) {
        let ask = |what| Ask { queue: 0, what };
        let sector = Sector::Near(3);
        for what in [
            What::Write {
                sector,
                count: 2,
                byte: 7,
            },
            What::Read { sector, count: 2 },
            What::Flush,
        ] {
            let ask = ask(what);
            let answer = guest.ask(0, &self.request(&ask).1);
            self.check(&ask, &answer);
        }
    }
}

fuzz_target!(|input: Input| IMAGE.with(|image| {
    run(&input.case, &mut Disk::new(input.setup, image));
}));
