//! A file below an image format: no bounds, zeroes past the end, growth.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io;

use block_util::{DataFile, DiskIo, IoOptions, Operation};
use common::{ENGINES, Memory, image};

fn queue(
    file: &tempfile::NamedTempFile,
    engine: block_util::Engine,
    read_only: bool,
) -> Box<dyn DiskIo> {
    let data = DataFile::new(file.reopen().unwrap(), file.path(), read_only, false).unwrap();
    data.open_io(&IoOptions { depth: 4, engine }).unwrap()
}

#[test]
fn past_the_end_there_are_zeroes_until_it_grows() {
    for engine in ENGINES {
        let file = image(0);
        fs::write(file.path(), [5; 1000]).unwrap();
        let mut io = queue(&file, engine, false);
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
fn offsets_that_no_file_has_are_refused() {
    for engine in ENGINES {
        let file = image(512);
        let mut io = queue(&file, engine, true);
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
