//! A file below an image format: no bounds, zeroes past the end, growth.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use block_util::{DataFile, DiskIo, IoOptions, Operation};
use common::{ENGINES, Memory, image};

fn queue(
    file: &tempfile::NamedTempFile,
    engine: block_util::Engine,
    read_only: bool,
    direct: bool,
) -> Box<dyn DiskIo> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(file.path())
        .unwrap();
    let data = DataFile::new(opened, file.path(), read_only, direct).unwrap();
    data.open_io(&IoOptions { depth: 4, engine }).unwrap()
}

#[test]
fn past_the_end_there_are_zeroes_until_it_grows() {
    for engine in ENGINES {
        let file = image(0);
        fs::write(file.path(), [5; 1000]).unwrap();
        let mut io = queue(&file, engine, false, false);
        let mut memory = Memory::of(&[9; 3000], 0);
        // Part of the first piece is there.
        let pieces = memory.pieces(1500);
        io.run(Operation::Read {
            offset: 200,
            buffers: &pieces,
        })
        .unwrap();
        assert!(memory.bytes()[..800].iter().all(|b| *b == 5), "{engine:?}");
        assert!(memory.bytes()[800..].iter().all(|b| *b == 0), "{engine:?}");
        let mut memory = Memory::of(&[7; 512], 0);
        let pieces = memory.pieces(512);
        let offset = 1 << 20;
        io.run(Operation::Write {
            offset,
            buffers: &pieces,
            durable: true,
        })
        .unwrap();
        io.run(Operation::Flush).unwrap();
        let bytes = fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), (1 << 20) + 512);
        assert!(
            bytes[1 << 20..].iter().all(|b| *b == 7)
                && bytes[1000..1 << 20].iter().all(|b| *b == 0)
        );
    }
}

#[test]
fn a_file_that_ends_within_a_block_is_read_past_the_page_cache() {
    for engine in ENGINES {
        // In the first block, in a later one, and at the end of one; from memory that is aligned and that is not.
        for (length, skew) in [(1000, 0), (1000, 8), (5000, 0), (5000, 8), (4096, 0)] {
            let file = image(0);
            fs::write(file.path(), vec![5; length]).unwrap();
            let mut io = queue(&file, engine, true, true);
            let mut memory = Memory::of(&[9; 16_384], skew);
            let pieces = memory.pieces(4096);
            io.run(Operation::Read {
                offset: 0,
                buffers: &pieces,
            })
            .unwrap();
            let (inside, outside) = memory.bytes().split_at(length);
            assert!(inside.iter().all(|b| *b == 5), "{engine:?}, {length}");
            assert!(outside.iter().all(|b| *b == 0), "{engine:?}, {length}");
            let unaligned = io.run(Operation::Read {
                offset: 100,
                buffers: &pieces,
            });
            assert_eq!(unaligned.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}

#[test]
fn offsets_that_no_file_has_are_refused() {
    for engine in ENGINES {
        let file = image(512);
        let mut io = queue(&file, engine, true, false);
        let mut memory = Memory::new(512, 0);
        let pieces = memory.pieces(512);
        for offset in [u64::MAX, u64::MAX - 511, i64::MAX as u64 - 100] {
            let error = io
                .run(Operation::Read {
                    offset,
                    buffers: &pieces,
                })
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{engine:?}");
        }
        let error = io
            .run(Operation::Write {
                offset: 0,
                buffers: &pieces,
                durable: false,
            })
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
}
