//! Raw disks, feature by feature, with every engine.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use block_util::{
    DiskError, DiskFile, DiskIo, Engine, IoOptions, Operation, RawDisk, RawOptions, Request,
};
use common::{BUFFERED, DIRECT, ENGINES, Memory, image, open, pattern, queue, read, write};

fn poll(io: &dyn DiskIo, timeout: i32) -> bool {
    let mut fd = libc::pollfd {
        fd: io.completion_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        // SAFETY: one pollfd, which lives through the call.
        let count = unsafe { libc::poll(&raw mut fd, 1, timeout) };
        // A completion may interrupt the call.
        if count >= 0 || std::io::Error::last_os_error().kind() != ErrorKind::Interrupted {
            return count == 1;
        }
    }
}

#[test]
fn the_descriptor_is_readable_while_completions_wait() {
    let file = image(1 << 20);
    for options in [BUFFERED, DIRECT] {
        let disk = open(file.path(), &options);
        for engine in ENGINES {
            let mut io = queue(&disk, engine, 32);
            assert!(!poll(&*io, 0));
            let mut memory = Memory::new(16 * 4096, 0);
            for (index, piece) in memory.pieces(4096).into_iter().enumerate() {
                io.submit(Request {
                    operation: Operation::Read {
                        offset: index as u64 * 8192,
                        buffers: &[piece],
                    },
                    user_data: index as u64,
                })
                .unwrap();
            }
            // Outside the disk: this one never gets to the kernel, and yet wakes the caller.
            io.submit(Request {
                operation: Operation::Discard {
                    offset: 1 << 20,
                    len: 512,
                },
                user_data: 99,
            })
            .unwrap();
            io.kick().unwrap();
            let mut seen = Vec::new();
            while io.in_flight() > 0 {
                assert!(poll(&*io, -1));
                for done in io.drain() {
                    assert_eq!(done.result.is_ok(), done.user_data != 99);
                    seen.push(done.user_data);
                }
            }
            seen.sort_unstable();
            let all: Vec<u64> = (0..16).chain([99]).collect();
            assert_eq!(seen, all);
            // The kernel may tell of the last one once more, just after it was taken.
            let mut again = 0;
            while again < 2 && poll(&*io, 0) {
                assert!(io.next_completion().is_none());
                again += 1;
            }
            assert!(again < 2, "{engine:?}: readable with nothing there");
        }
    }
}

#[test]
fn what_is_outside_the_disk_is_refused() {
    let file = image(8192);
    let disk = open(file.path(), &BUFFERED);
    for engine in ENGINES {
        let mut io = queue(&disk, engine, 4);
        for offset in [8191, 8192, u64::MAX - 100, u64::MAX] {
            let error = write(&mut *io, offset, &[1; 512]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let error = read(&mut *io, offset, 512).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            for operation in [
                Operation::Discard { offset, len: 512 },
                Operation::WriteZeroes {
                    offset,
                    len: u64::MAX,
                    may_unmap: true,
                },
            ] {
                let error = io.run(operation).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput);
            }
        }
        // Nothing at the very end is fine.
        assert!(read(&mut *io, 8192, 0).unwrap().is_empty());
        write(&mut *io, 8192 - 512, &[7; 512]).unwrap();
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 8192);
}

#[test]
fn a_file_cut_short_behind_our_back_is_an_error() {
    let file = image(1 << 20);
    for engine in ENGINES {
        file.as_file().set_len(1 << 20).unwrap();
        let disk = open(file.path(), &BUFFERED);
        let mut io = queue(&disk, engine, 4);
        file.as_file().set_len(4096).unwrap();
        assert!(read(&mut *io, 0, 8192).is_err());
        assert_eq!(read(&mut *io, 0, 4096).unwrap(), [0; 4096]);
    }
}

#[test]
fn read_only_disks_are_not_written() {
    let file = image(1 << 16);
    let options = RawOptions {
        read_only: true,
        ..BUFFERED
    };
    let disk = open(file.path(), &options);
    assert!(disk.is_read_only());
    assert_eq!(disk.geometry().discard_granularity, 0);
    for engine in ENGINES {
        let mut io = queue(&disk, engine, 4);
        let error = write(&mut *io, 0, &[1; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
        for operation in [
            Operation::Discard {
                offset: 0,
                len: 512,
            },
            Operation::WriteZeroes {
                offset: 0,
                len: 512,
                may_unmap: false,
            },
        ] {
            let error = io.run(operation).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
        }
        io.run(Operation::Flush).unwrap();
        assert_eq!(read(&mut *io, 0, 512).unwrap(), [0; 512]);
    }
    assert!(matches!(
        disk.resize(1 << 20),
        Err(DiskError::Resize { .. })
    ));
}

#[test]
fn the_queue_holds_what_it_was_opened_for() {
    let file = image(1 << 16);
    let disk = open(file.path(), &BUFFERED);
    for depth in [0, IoOptions::MAX_DEPTH + 1] {
        for engine in ENGINES {
            let error = disk.open_io(&IoOptions { depth, engine }).unwrap_err();
            assert!(matches!(error, DiskError::Engine { .. }), "{error}");
        }
    }
    for engine in ENGINES {
        for depth in [1, 3] {
            let mut io = queue(&disk, engine, depth);
            let flush = Request {
                operation: Operation::Flush,
                user_data: 1,
            };
            for _ in 0..3 {
                for _ in 0..depth {
                    io.submit(flush).unwrap();
                }
                assert_eq!(io.submit(flush).unwrap_err().depth, depth);
                assert_eq!((io.in_flight(), io.depth()), (depth, depth));
                io.kick().unwrap();
                while io.in_flight() > 0 {
                    io.wait().unwrap();
                    while io.next_completion().is_some() {}
                }
            }
        }
    }
}

#[test]
fn dropping_a_queue_waits_for_what_is_in_flight() {
    let file = image(4 << 20);
    for options in [BUFFERED, DIRECT] {
        let disk = open(file.path(), &options);
        for engine in ENGINES {
            let data = pattern(4 << 20, engine as u64 + 17);
            let mut memory = Memory::of(&data, 0);
            let mut io = queue(&disk, engine, 64);
            for (index, piece) in memory.pieces(1 << 16).into_iter().enumerate() {
                io.submit(Request {
                    operation: Operation::Write {
                        offset: (index as u64) << 16,
                        buffers: &[piece],
                        durable: false,
                    },
                    user_data: 0,
                })
                .unwrap();
            }
            // Some are with the kernel, none is taken, and the memory is gone after the drop.
            io.kick().unwrap();
            drop(io);
            drop(memory);
            assert!(std::fs::read(file.path()).unwrap() == data);
        }
    }
}

#[test]
fn direct_disks_take_any_memory_but_whole_blocks_only() {
    let file = image(1 << 20);
    let disk = open(file.path(), &DIRECT);
    let block = disk.geometry().logical_block_size as usize;
    for engine in ENGINES {
        let mut io = queue(&disk, engine, 4);
        // Longer than what is copied at a time, in pieces that straddle every chunk.
        let data = pattern(600 * 1024, 5);
        let mut memory = Memory::of(&data, 1);
        let buffers = memory.pieces(777);
        io.run(Operation::Write {
            offset: 4096,
            buffers: &buffers,
            durable: true,
        })
        .unwrap();
        let mut back = Memory::new(data.len(), 3);
        let buffers = back.pieces(10_001);
        io.run(Operation::Read {
            offset: 4096,
            buffers: &buffers,
        })
        .unwrap();
        assert!(back.bytes() == data);
        for (offset, len) in [(1, block), (0, block - 1), (block as u64 / 2, block)] {
            let error = write(&mut *io, offset, &vec![9; len]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }
}

#[test]
fn discards_give_space_back_and_read_zeroes() {
    let file = image(1 << 20);
    let blocks = || file.as_file().metadata().unwrap().blocks();
    for options in [BUFFERED, DIRECT] {
        let disk = open(file.path(), &options);
        assert!(disk.geometry().discard_granularity >= 512);
        for engine in ENGINES {
            for zeroes in [false, true] {
                let mut io = queue(&disk, engine, 4);
                write(&mut *io, 0, &pattern(1 << 20, 3)).unwrap();
                io.run(Operation::Flush).unwrap();
                let full = blocks();
                let (offset, len) = (1 << 16, 1 << 19);
                let operation = if zeroes {
                    Operation::WriteZeroes {
                        offset,
                        len,
                        may_unmap: true,
                    }
                } else {
                    Operation::Discard { offset, len }
                };
                io.run(operation).unwrap();
                assert!(blocks() + 900 < full, "{} of {full} left", blocks());
                let bytes = read(&mut *io, 0, 1 << 20).unwrap();
                let mut expected = pattern(1 << 20, 3);
                expected[1 << 16..(1 << 16) + (1 << 19)].fill(0);
                assert!(bytes == expected);
            }
        }
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
}

#[test]
fn dense_disks_keep_their_space() {
    let file = image(1 << 20);
    let blocks = || file.as_file().metadata().unwrap().blocks();
    let options = RawOptions {
        sparse: false,
        ..BUFFERED
    };
    let disk = open(file.path(), &options);
    assert_eq!(disk.geometry().discard_granularity, 0);
    for engine in ENGINES {
        let mut io = queue(&disk, engine, 4);
        write(&mut *io, 0, &pattern(1 << 20, 4)).unwrap();
        io.run(Operation::Flush).unwrap();
        let full = blocks();
        let discard = Operation::Discard {
            offset: 0,
            len: 1 << 20,
        };
        assert_eq!(io.run(discard).unwrap_err().kind(), ErrorKind::Unsupported);
        io.run(Operation::WriteZeroes {
            offset: 0,
            len: 1 << 20,
            may_unmap: true,
        })
        .unwrap();
        assert!(read(&mut *io, 0, 1 << 20).unwrap().iter().all(|&b| b == 0));
        assert!(blocks() >= full, "{} of {full} left", blocks());
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_knows_no_zeroing() {
    // tmpfs punches holes, but zeroes no ranges.
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let disk = open(file.path(), &BUFFERED);
    for engine in ENGINES {
        for may_unmap in [false, true] {
            let mut io = queue(&disk, engine, 4);
            write(&mut *io, 0, &pattern(1 << 20, 6)).unwrap();
            // Longer than what is written at a time, and not a multiple of it.
            for _ in 0..2 {
                io.run(Operation::WriteZeroes {
                    offset: 100,
                    len: 700_000,
                    may_unmap,
                })
                .unwrap();
            }
            let mut expected = pattern(1 << 20, 6);
            expected[100..700_100].fill(0);
            assert!(read(&mut *io, 0, 1 << 20).unwrap() == expected);
        }
    }
}

#[test]
fn disks_grow_and_shrink_under_a_queue() {
    for engine in ENGINES {
        let file = image(8192);
        let disk = open(file.path(), &BUFFERED);
        let mut io = queue(&disk, engine, 4);
        write(&mut *io, 0, &[1; 8192]).unwrap();
        assert!(write(&mut *io, 8192, &[2; 4096]).is_err());
        disk.resize(16384).unwrap();
        assert_eq!(disk.size(), 16384);
        write(&mut *io, 8192, &[2; 4096]).unwrap();
        assert_eq!(read(&mut *io, 12288, 4096).unwrap(), [0; 4096]);
        disk.resize(4096).unwrap();
        assert!(read(&mut *io, 4096, 1).is_err());
        assert_eq!(read(&mut *io, 0, 4096).unwrap(), [1; 4096]);
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
        let error = disk.resize(u64::MAX).unwrap_err();
        assert!(matches!(error, DiskError::Resize { .. }), "{error}");
        assert_eq!(disk.size(), 4096);
    }
}

fn magic_sector(magic: &[u8], at: usize) -> Vec<u8> {
    let mut sector = vec![0xee; 512];
    sector[at..at + magic.len()].copy_from_slice(magic);
    sector
}

#[test]
fn a_probed_image_never_looks_like_another_format() {
    const SIZE: u64 = 1 << 20;
    let options = RawOptions {
        protect_format: true,
        ..BUFFERED
    };
    for options in [
        options,
        RawOptions {
            direct: true,
            ..options
        },
    ] {
        for engine in ENGINES {
            let file = image(SIZE);
            let disk = open(file.path(), &options);
            let mut io = queue(&disk, engine, 4);
            let last = SIZE - 512;
            for (offset, sector) in [
                (0, magic_sector(b"QFI\xfb", 0)),
                (0, magic_sector(b"vhdxfile", 0)),
                (0, magic_sector(b"conectix", 0)),
                (last, magic_sector(b"conectix", 0)),
                // In the last sector of a longer write.
                (
                    last - 512,
                    [vec![1; 512], magic_sector(b"conectix", 0)].concat(),
                ),
                (0, [magic_sector(b"QFI\xfb", 0), vec![1; 1 << 19]].concat()),
            ] {
                let error = write(&mut *io, offset, &sector).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            }
            // A boot sector is fine, and so is a magic anywhere else.
            write(&mut *io, 0, &magic_sector(b"QFI\xfb", 1)).unwrap();
            write(&mut *io, 512, &magic_sector(b"QFI\xfb", 0)).unwrap();
            write(&mut *io, last, &magic_sector(b"conectix", 8)).unwrap();
            write(&mut *io, 8192 - 512, &magic_sector(b"conectix", 0)).unwrap();
            let bytes = read(&mut *io, 0, 1024).unwrap();
            assert_eq!(bytes[..512], magic_sector(b"QFI\xfb", 1));
            assert_eq!(bytes[512..], magic_sector(b"QFI\xfb", 0));
            // But not where it would come to be the last sector.
            assert!(matches!(disk.resize(8192), Err(DiskError::Resize { .. })));
            assert_eq!(disk.size(), SIZE);
            disk.resize(16384).unwrap();
            let error = write(&mut *io, 16384 - 512, &magic_sector(b"conectix", 0)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        }
    }
}

#[test]
fn a_magic_in_parts_is_refused_as_well() {
    let file = image(1 << 16);
    let options = RawOptions {
        protect_format: true,
        ..BUFFERED
    };
    let disk = open(file.path(), &options);
    for engine in ENGINES {
        let mut io = queue(&disk, engine, 4);
        assert!(write(&mut *io, 0, b"QF").is_err());
        assert!(write(&mut *io, 2, b"I\xfb").is_err());
        assert!(write(&mut *io, (1 << 16) - 510, b"nectix").is_err());
        write(&mut *io, 2, b"XX").unwrap();
    }
}

#[test]
fn what_holds_no_disk_is_named() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let options = RawOptions {
        read_only: true,
        ..BUFFERED
    };
    let error = RawDisk::open(directory, &options).unwrap_err();
    assert!(matches!(error, DiskError::NotADisk { .. }), "{error}");
    let error = RawDisk::open(&directory.join("no-such-disk"), &options).unwrap_err();
    assert!(matches!(error, DiskError::Open { .. }));
    assert!(error.to_string().contains("no-such-disk"), "{error}");
}

#[test]
fn queues_in_threads_share_a_disk() {
    let file = image(4 << 20);
    for engine in [Engine::Auto, Engine::IoUring, Engine::Aio, Engine::Sync] {
        let disk = open(file.path(), &BUFFERED);
        std::thread::scope(|scope| {
            for part in 0..4u64 {
                let disk = &disk;
                scope.spawn(move || {
                    let mut io = queue(disk, engine, 16);
                    for round in 0..8 {
                        let data = pattern(1 << 20, part * 100 + round);
                        write(&mut *io, part << 20, &data).unwrap();
                        io.run(Operation::Flush).unwrap();
                        assert!(read(&mut *io, part << 20, 1 << 20).unwrap() == data);
                    }
                });
            }
        });
    }
}
