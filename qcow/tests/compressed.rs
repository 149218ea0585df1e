//! Compressed clusters that are kept unpacked: how often they are read from the file, and that none outlives what it was made of.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::Random;
use qcow::{CreateOptions, Image, MemStorage, OpenOptions, Shrink, Storage};

/// Memory that counts reads.
#[derive(Debug, Default)]
struct Counting {
    bytes: MemStorage,
    reads: AtomicU64,
}

impl Storage for Counting {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.bytes.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.bytes.flush()
    }

    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes.set_len(len)
    }
}

/// Reads of the storage that 16 reads of 4 KiB in each of `clusters` clusters take, all of them `turns` times.
fn reads(cache: usize, clusters: u64, turns: u64, writable: bool) -> u64 {
    let storage = Arc::new(Counting::default());
    let size = clusters * 65536;
    let image =
        Image::create_storage(Box::new(Arc::clone(&storage)), &CreateOptions::new(size)).unwrap();
    let model = Random::new(1).bytes(size as usize);
    image.write_compressed_at(&model, 0).unwrap();
    image.close().unwrap();
    let options = OpenOptions::new().write(writable).unpacked_cache(cache);
    let image = Image::open_storage(Box::new(Arc::clone(&storage)), &options).unwrap();
    // The L2 table comes into memory; a cluster that is read as a whole is not kept.
    image.read_at(&mut [0; 65536], 0).unwrap();
    let before = storage.reads.load(Ordering::Relaxed);
    for at in (0..turns).flat_map(|_| (0..size).step_by(4096)) {
        let mut part = [0xee; 4096];
        image.read_at(&mut part, at).unwrap();
        assert_eq!(part, model[at as usize..at as usize + 4096], "at {at:#x}");
    }
    storage.reads.load(Ordering::Relaxed) - before
}

#[test]
fn small_reads_unpack_a_cluster_once() {
    for writable in [false, true] {
        assert_eq!(reads(4 << 20, 3, 2, writable), 3);
        assert_eq!(reads(1, 3, 2, writable), 6, "one is kept at least");
        assert_eq!(reads(0, 3, 2, writable), 96, "turned off");
    }
}

/// A compressed cluster at `guest` that is `byte` all over, and reads so, in parts.
fn put(image: &Image, guest: u64, byte: u8) {
    let size = image.cluster_size();
    image
        .write_compressed_at(&vec![byte; size as usize], guest * size)
        .unwrap();
    expect(image, guest, byte);
}

fn expect(image: &Image, guest: u64, byte: u8) {
    let size = image.cluster_size();
    for at in [0, size / 2] {
        let mut part = [0xee; 64];
        image.read_at(&mut part, guest * size + at).unwrap();
        assert_eq!(part, [byte; 64], "guest cluster {guest}");
    }
}

/// Fills clusters, makes the host's free by `free`, and fills others, which come to lie in the same places.
fn reused(free: impl Fn(&Image)) {
    let storage = MemStorage::default();
    let options = CreateOptions::new(1 << 20).cluster_size(4096);
    let image = Image::create_storage(Box::new(storage), &options).unwrap();
    for byte in 1..=200 {
        put(&image, u64::from(byte), byte);
    }
    free(&image);
    image.flush().unwrap();
    for byte in 1..=200u8 {
        put(&image, u64::from(byte), 255 - byte);
    }
    for byte in 1..=200u8 {
        expect(&image, u64::from(byte), 255 - byte);
    }
    assert_eq!(image.check().unwrap().leaks, 0);
}

#[test]
fn what_was_discarded_is_not_read_from_memory() {
    reused(|image| image.discard(0, 1 << 20).unwrap());
}

#[test]
fn what_was_written_over_is_not_read_from_memory() {
    reused(|image| {
        let noise = Random::new(3).bytes(1 << 20);
        image.write_at(&noise, 0).unwrap();
        image.flush().unwrap();
        image.discard(0, 1 << 20).unwrap();
    });
}

#[test]
fn what_a_deleted_snapshot_had_is_not_read_from_memory() {
    reused(|image| {
        image.create_snapshot("s").unwrap();
        for turn in 0..8 {
            image.discard(0, 1 << 20).unwrap();
            for byte in 1..=200u8 {
                put(image, u64::from(byte), byte.wrapping_add(turn).max(1));
            }
            image.delete_snapshot("s").unwrap();
            image.create_snapshot("s").unwrap();
        }
        image.discard(0, 1 << 20).unwrap();
        image.delete_snapshot("s").unwrap();
    });
}

#[test]
fn what_a_snapshot_took_back_is_not_read_from_memory() {
    reused(|image| {
        image.create_snapshot("s").unwrap();
        image.discard(0, 1 << 20).unwrap();
        image.create_snapshot("empty").unwrap();
        for byte in 1..=200 {
            put(image, u64::from(byte), byte ^ 0x55);
        }
        image.apply_snapshot("s").unwrap();
        for byte in 1..=200 {
            expect(image, u64::from(byte), byte);
        }
        image.apply_snapshot("empty").unwrap();
        image.delete_snapshot("s").unwrap();
        image.delete_snapshot("empty").unwrap();
    });
}

#[test]
fn what_was_cut_off_is_not_read_from_memory() {
    reused(|image| {
        image.resize(4096, Shrink::Discard).unwrap();
        image.resize(1 << 20, Shrink::IfFree).unwrap();
    });
}
