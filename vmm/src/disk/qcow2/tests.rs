//! A qcow2 disk through its queues: data, errors, locks, several queues at once.
#![allow(unsafe_code)]

use std::path::Path;
use std::sync::Barrier;

use block_util::{Engine, QueueFull, Request};

use qcow::{Piece, Place};

use super::copy::CHUNK;
use super::queue::is_helped;
use super::*;

fn spawn() -> Spawn {
    Arc::new(|name, job| std::thread::Builder::new().name(name).spawn(job).map(drop))
}

fn disk(dir: &Path, readonly: bool) -> QcowDisk {
    let path = dir.join("d.qcow2");
    if !path.exists() {
        Image::create(&path, &qcow::CreateOptions::new(4 << 20))
            .unwrap()
            .close()
            .unwrap();
    }
    let config = DiskConfig {
        path,
        readonly,
        ..DiskConfig::default()
    };
    QcowDisk::open(&config, "d", &spawn()).unwrap()
}

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
        QcowDisk::open(&config, "d", &spawn()),
        Err(DiskError::InUse { .. })
    ));
    drop(first);
    QcowDisk::open(&config, "d", &spawn()).unwrap();
}

#[test]
fn the_event_is_readable_exactly_while_completions_wait() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), false);
    let options = IoOptions {
        depth: 2,
        ..IoOptions::default()
    };
    let mut io = disk.open_io(&options).unwrap();
    let readable = |io: &dyn DiskIo, timeout| {
        let mut fd = libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&io.completion_fd()),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which lives through the call.
        (unsafe { libc::poll(&raw mut fd, 1, timeout) }) == 1
    };
    let mut sector = [1; 512];
    let buffers = [buffer(&mut sector)];
    let write = |user_data| Request {
        operation: Operation::Write {
            offset: 0,
            buffers: &buffers,
            durable: false,
        },
        user_data,
    };
    // The first goes to a helper, the other ones straight to the file.
    for _ in 0..3 {
        assert!(!readable(&*io, 0));
        io.submit(write(1)).unwrap();
        io.submit(write(2)).unwrap();
        assert_eq!(io.submit(write(3)), Err(QueueFull { depth: 2 }));
        io.kick().unwrap();
        let mut done = Vec::new();
        while done.len() < 2 {
            assert!(readable(&*io, -1));
            done.extend(io.drain().map(|c| (c.user_data, c.result.is_ok())));
        }
        done.sort_unstable();
        assert_eq!(done, [(1, true), (2, true)]);
        assert!(io.next_completion().is_none());
        assert_eq!(io.in_flight(), 0);
    }
}

/// Where `O_DIRECT` is real.
fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// Requests at random, of all kinds, several in flight and none over another, against a flat copy of the disk. `direct` is the least
/// block of direct I/O, with requests of multiples of `BLOCK`.
fn story<const BLOCK: usize>(engine: Engine, cluster: u64, direct: Option<u64>, seed: u64) {
    const BLOCKS: usize = 200;
    let dir = on_disk();
    let path = dir.path().join("d.qcow2");
    let size = (BLOCK * BLOCKS) as u64;
    let create = qcow::CreateOptions::new(size).cluster_size(cluster);
    let image = Image::create(&path, &create).unwrap();
    image
        .write_compressed_at(&vec![3; cluster as usize], 0)
        .unwrap();
    image.create_snapshot("first").unwrap();
    image.close().unwrap();
    let config = DiskConfig {
        path: path.clone(),
        direct: direct.is_some(),
        ..DiskConfig::default()
    };
    let disk = QcowDisk::open_in_blocks(&config, direct.unwrap_or(1), "d", &spawn()).unwrap();
    let options = IoOptions { depth: 8, engine };
    let mut io = disk.open_io(&options).unwrap();
    let mut model = vec![0_u8; BLOCK * BLOCKS];
    model[..cluster as usize].fill(3);
    let mut random = seed;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize % below
    };
    let mut memory = vec![vec![0_u8; BLOCK * 8]; 8];
    for round in 0..60 {
        let mut checks = Vec::new();
        // Eight requests in eight parts of the disk.
        for (slot, memory) in memory.iter_mut().enumerate() {
            let first = slot * (BLOCKS / 8) + next(BLOCKS / 8 - 8);
            let count = (1 + next(8)) * BLOCK;
            let (offset, range) = (first * BLOCK, first * BLOCK..first * BLOCK + count);
            let bytes = &mut memory[..count];
            let kind = next(8);
            let value = next(256) as u8;
            bytes.fill(value);
            let (a, b) = bytes.split_at_mut(next(count / 512) * 512);
            let buffers = [buffer(a), buffer(b)];
            let (offset, len) = (offset as u64, count as u64);
            let operation = match kind {
                0..3 => Operation::Read {
                    offset,
                    buffers: &buffers,
                },
                3..6 => Operation::Write {
                    offset,
                    buffers: &buffers,
                    durable: value < 16,
                },
                6 => Operation::Discard { offset, len },
                _ => Operation::WriteZeroes {
                    offset,
                    len,
                    may_unmap: value < 128,
                },
            };
            match kind {
                0..3 => checks.push((slot, range)),
                3..6 => model[range].fill(value),
                _ => model[range].fill(0),
            }
            io.submit(Request {
                operation,
                user_data: slot as u64,
            })
            .unwrap();
        }
        while io.in_flight() > 0 {
            io.wait().unwrap();
            io.drain().for_each(|c| c.result.unwrap());
        }
        for (slot, range) in checks {
            let read = &memory[slot][..range.len()];
            assert!(
                read == &model[range],
                "{engine:?}, {cluster}, {direct:?}, round {round}"
            );
        }
        if round % 7 == 0 {
            io.run(Operation::Flush).unwrap();
        }
        if round == 30 {
            disk.shared.image.create_snapshot("second").unwrap();
        }
    }
    drop(io);
    drop(disk);
    let image = Image::open(&path, &qcow::OpenOptions::new().write(true)).unwrap();
    let mut content = vec![0; model.len()];
    image.read_at(&mut content, 0).unwrap();
    assert!(content == model);
    let report = image.check().unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

#[test]
fn any_requests_leave_what_a_flat_disk_has() {
    for engine in [Engine::IoUring, Engine::Aio, Engine::Sync] {
        for (seed, cluster) in [(5, 512), (6, 4096), (7, 65536)] {
            story::<1536>(engine, cluster, None, seed);
        }
    }
}

#[test]
fn any_requests_past_the_page_cache_do_so_too() {
    for engine in [Engine::IoUring, Engine::Aio, Engine::Sync] {
        for (seed, cluster) in [(8, 512), (9, 4096), (10, 65536)] {
            story::<1536>(engine, cluster, Some(1), seed);
            // As a guest makes them that was told of 4096, and as one that does not listen.
            story::<4096>(engine, cluster, Some(4096), seed);
            story::<1536>(engine, cluster, Some(4096), seed);
        }
    }
}

#[test]
fn parts_of_blocks_are_no_work_for_the_data_files_engine() {
    let helped = |at, length, block| {
        let place = Place::File(at);
        is_helped(&Piece { length, place }, block)
    };
    assert!(!helped(8192, 4096, 4096) && !helped(512, 1536, 512) && !helped(3, 5, 1));
    assert!(helped(512, 4096, 4096) && helped(4096, 512, 4096) && helped(100, 412, 512));
}

#[test]
fn the_guest_is_told_of_the_blocks_of_direct_io() {
    let dir = on_disk();
    drop(disk(dir.path(), false));
    let config = |direct| DiskConfig {
        path: dir.path().join("d.qcow2"),
        direct,
        ..DiskConfig::default()
    };
    for (direct, block, logical) in [(false, 1, 512), (true, 4096, 4096), (true, 65536, 65536)] {
        let disk = QcowDisk::open_in_blocks(&config(direct), block, "d", &spawn()).unwrap();
        let told = disk.geometry();
        assert_eq!(told.logical_block_size, logical);
        assert_eq!(told.physical_block_size, logical.max(4096));
        assert_eq!(
            (told.optimal_io_size, told.discard_granularity),
            (65536, 65536)
        );
    }
    // As a raw disk says it.
    let nowhere = DiskConfig {
        path: "/proc/version".into(),
        readonly: true,
        ..config(true)
    };
    let refused = QcowDisk::open(&nowhere, "d", &spawn()).unwrap_err();
    assert!(matches!(refused, DiskError::Open { .. }), "{refused:?}");
}

#[test]
fn queues_write_while_snapshots_are_taken_and_the_disk_grows() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), false);
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for queue in 0..3_u64 {
            let (disk, start) = (&disk, &start);
            scope.spawn(move || {
                let options = IoOptions {
                    depth: 16,
                    ..IoOptions::default()
                };
                let mut io = disk.open_io(&options).unwrap();
                let mut memory = vec![queue as u8 + 1; 16 * 4096];
                let buffers: Vec<_> = memory.chunks_mut(4096).map(buffer).collect();
                start.wait();
                for round in 0..40 {
                    for (i, buffer) in buffers.iter().enumerate() {
                        let at = (queue << 20) + (i as u64 * 16 + round % 16) * 4096;
                        io.submit(Request {
                            operation: Operation::Write {
                                offset: at,
                                buffers: std::slice::from_ref(buffer),
                                durable: false,
                            },
                            user_data: 0,
                        })
                        .unwrap();
                    }
                    while io.in_flight() > 0 {
                        io.wait().unwrap();
                        io.drain().for_each(|c| c.result.unwrap());
                    }
                }
            });
        }
        start.wait();
        for i in 0..10_u64 {
            disk.shared.image.create_snapshot(&format!("s{i}")).unwrap();
            disk.resize((4 + i) << 20).unwrap();
        }
    });
    let mut back = vec![0; 3 << 20];
    disk.shared.image.read_at(&mut back, 0).unwrap();
    for (queue, part) in back.chunks(1 << 20).enumerate() {
        assert!(part.iter().all(|b| *b == queue as u8 + 1));
    }
    assert_eq!(disk.shared.image.check().unwrap().corruptions, 0);
}

#[test]
fn a_queue_that_is_dropped_half_way_leaves_a_whole_image() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), false);
    let mut memory = vec![1; 64 * 4096];
    let buffers: Vec<_> = memory.chunks_mut(4096).map(buffer).collect();
    for _ in 0..2 {
        let mut io = disk.open_io(&IoOptions::default()).unwrap();
        for (i, buffer) in buffers.iter().enumerate() {
            io.submit(Request {
                operation: Operation::Write {
                    offset: i as u64 * 8192,
                    buffers: std::slice::from_ref(buffer),
                    durable: false,
                },
                user_data: 0,
            })
            .unwrap();
        }
        io.kick().unwrap();
        drop(io);
        // Nothing is held any more.
        disk.shared.image.create_snapshot("s").unwrap();
        disk.shared.image.delete_snapshot("s").unwrap();
    }
    let mut back = [0; 4096];
    disk.shared.image.read_at(&mut back, 63 * 8192).unwrap();
    assert_eq!(back, [1; 4096]);
}
