//! Two users of one image keep out of each other's way.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use block_util::{DiskError, DiskFile, LockGranularity, LockMode, RawOptions};
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

/// The ranges of `path` that are locked, as the kernel shows them: first byte, and last one or `EOF`.
fn ranges(path: &Path) -> Vec<String> {
    let inode = format!(":{} ", std::fs::metadata(path).unwrap().ino());
    let all = std::fs::read_to_string("/proc/locks").unwrap();
    let ours = all.lines().filter(|line| line.contains(&inode));
    ours.map(|line| line.split(&inode).nth(1).unwrap().to_owned())
        .collect()
}

#[test]
fn what_is_locked() {
    const FULL: RawOptions = RawOptions {
        lock: LockGranularity::Full,
        ..BUFFERED
    };
    let file = image(8192);
    let disk = open(file.path(), &BUFFERED);
    disk.lock(LockMode::Exclusive).unwrap();
    assert_eq!(ranges(file.path()), ["0 8191"]);
    disk.resize(16384).unwrap();
    assert_eq!(ranges(file.path()), ["0 16383"]);
    // What it had is not given up, and changes its mode as one.
    disk.resize(4096).unwrap();
    disk.lock(LockMode::Shared).unwrap();
    assert_eq!(ranges(file.path()), ["0 16383"]);
    disk.unlock().unwrap();
    assert_eq!(ranges(file.path()), [""; 0]);
    disk.resize(8192).unwrap();
    assert_eq!(ranges(file.path()), [""; 0]);

    let full = open(file.path(), &FULL);
    full.lock(LockMode::Exclusive).unwrap();
    assert_eq!(ranges(file.path()), ["0 EOF"]);
    full.resize(16384).unwrap();
    assert_eq!(ranges(file.path()), ["0 EOF"]);
    // Either keeps the other out.
    assert!(in_use(disk.lock(LockMode::Exclusive)));
    full.unlock().unwrap();
    disk.lock(LockMode::Exclusive).unwrap();
    assert!(in_use(full.lock(LockMode::Shared)));

    let empty = image(0);
    let disk = open(empty.path(), &BUFFERED);
    disk.lock(LockMode::Exclusive).unwrap();
    assert_eq!(ranges(empty.path()), ["0 EOF"]);
    disk.resize(4096).unwrap();
    assert_eq!(ranges(empty.path()), ["0 EOF"]);
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
