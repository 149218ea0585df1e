//! Two users of one image keep out of each other's way.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

use block_util::{DiskError, DiskFile, LockMode, RawOptions};
use common::{BUFFERED, ENGINES, image, open, queue, read};

const READ_ONLY: RawOptions = RawOptions {
    read_only: true,
    ..BUFFERED
};

fn in_use(result: Result<(), DiskError>) -> bool {
    match result {
        Ok(()) => false,
        Err(DiskError::InUse { .. }) => true,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn a_writer_is_alone_and_readers_share() {
    let file = image(4096);
    let writer = open(file.path(), &BUFFERED);
    let other = open(file.path(), &BUFFERED);
    let reader = open(file.path(), &READ_ONLY);
    let second_reader = open(file.path(), &READ_ONLY);

    writer.lock(LockMode::Exclusive).unwrap();
    // Once more is fine.
    writer.lock(LockMode::Exclusive).unwrap();
    let error = other.lock(LockMode::Exclusive).unwrap_err();
    let path = file.path().to_str().unwrap();
    assert_eq!(
        error.to_string(),
        format!("another process uses disk {path:?}: it holds a lock on it")
    );
    assert!(in_use(reader.lock(LockMode::Shared)));

    writer.unlock().unwrap();
    reader.lock(LockMode::Shared).unwrap();
    second_reader.lock(LockMode::Shared).unwrap();
    assert!(in_use(writer.lock(LockMode::Exclusive)));
    reader.unlock().unwrap();
    assert!(in_use(writer.lock(LockMode::Exclusive)));
    drop(second_reader);
    writer.lock(LockMode::Exclusive).unwrap();
    // Down to shared, for the target of a migration.
    writer.lock(LockMode::Shared).unwrap();
    reader.lock(LockMode::Shared).unwrap();
}

#[test]
fn a_lock_lasts_as_long_as_the_last_queue() {
    for engine in ENGINES {
        let file = image(4096);
        let disk = open(file.path(), &BUFFERED);
        disk.lock(LockMode::Exclusive).unwrap();
        let mut io = queue(&disk, engine, 4);
        read(&mut *io, 0, 4096).unwrap();
        drop(disk);
        let other = open(file.path(), &BUFFERED);
        assert!(in_use(other.lock(LockMode::Exclusive)));
        drop(io);
        other.lock(LockMode::Exclusive).unwrap();
    }
}

/// Runs this test program again as the other process.
#[test]
fn processes_keep_each_other_out() {
    const PATH: &str = "BLOCK_UTIL_TEST_LOCKED_PATH";
    if let Some(path) = std::env::var_os(PATH) {
        let disk = open(path.as_ref(), &BUFFERED);
        let taken = in_use(disk.lock(LockMode::Exclusive));
        std::process::exit(if taken { 42 } else { 43 });
    }
    let file = image(4096);
    let disk = open(file.path(), &BUFFERED);
    let other = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes_keep_each_other_out", "--nocapture"])
            .env(PATH, file.path())
            .output()
            .unwrap()
            .status
            .code()
    };
    disk.lock(LockMode::Exclusive).unwrap();
    assert_eq!(other(), Some(42));
    disk.unlock().unwrap();
    assert_eq!(other(), Some(43));
}
