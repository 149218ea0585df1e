//! Once a queue has had a batch of requests, the next ones allocate nothing; with Linux AIO two lists a batch.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)]

#[path = "common/allocations.rs"]
mod allocations;

use block_util::{
    AlignedBuf, DiskFile, DiskIo, Engine, IoOptions, Operation, RawDisk, RawOptions, Request,
};

use allocations::ALLOCATIONS;

const DEPTH: u64 = 16;
const BLOCK: usize = 4096;

/// Writes or reads a block in each of `buffers`, all in flight at once.
fn batch(queue: &mut dyn DiskIo, buffers: &mut [AlignedBuf], write: bool) {
    for (n, buffer) in buffers.iter_mut().enumerate() {
        let offset = (n * BLOCK) as u64;
        // SAFETY: the buffer is left alone until all have completed, below.
        let pieces = [unsafe { buffer.io_buf() }];
        let operation = if write {
            Operation::Write {
                offset,
                buffers: &pieces,
                durable: false,
            }
        } else {
            Operation::Read {
                offset,
                buffers: &pieces,
            }
        };
        queue
            .submit(Request {
                operation,
                user_data: n as u64,
            })
            .unwrap();
    }
    queue.kick().unwrap();
    while queue.in_flight() > 0 {
        queue.wait().unwrap();
        while let Some(done) = queue.next_completion() {
            done.result.unwrap();
        }
    }
}

#[test]
fn requests_allocate_nothing() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = RawDisk::open(image.path(), &RawOptions::default()).unwrap();
    let mut engines = 0;
    for (engine, a_batch) in [(Engine::IoUring, 0), (Engine::Aio, 2), (Engine::Sync, 0)] {
        let options = IoOptions {
            depth: DEPTH as usize,
            engine,
        };
        // Not every kernel has each.
        let Ok(mut queue) = disk.open_io(&options) else {
            continue;
        };
        engines += 1;
        let new = || AlignedBuf::new(BLOCK, BLOCK).unwrap();
        let mut buffers: Vec<AlignedBuf> = (0..DEPTH).map(|_| new()).collect();
        let first = ALLOCATIONS.get();
        batch(&mut *queue, &mut buffers, true);
        batch(&mut *queue, &mut buffers, false);
        let warm = ALLOCATIONS.get();
        // The count works: lists of buffers are made the first time.
        assert!(warm > first, "{engine:?}");
        for round in 0..50 {
            batch(&mut *queue, &mut buffers, round % 2 == 0);
        }
        assert_eq!(ALLOCATIONS.get() - warm, 50 * a_batch, "{engine:?}");
    }
    assert!(engines > 0);
}
