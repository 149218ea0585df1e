//! A storage that fails: once, or from some moment on. The caller gets the error, and the image is whole but for leaks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use common::Random;
use qcow::{
    CreateOptions, Error, Image, MemStorage, OpenOptions, Repair, Shrink, Storage, check_storage,
};

#[derive(Debug)]
struct Failing {
    memory: Arc<MemStorage>,
    /// Changes until one fails.
    left: AtomicI64,
    /// Whether all after it fail too.
    forever: bool,
}

impl Failing {
    fn step(&self) -> io::Result<()> {
        let left = self.left.fetch_sub(1, Ordering::Relaxed);
        if left == 0 || (left < 0 && self.forever) {
            Err(io::Error::other("told to fail"))
        } else {
            Ok(())
        }
    }
}

impl Storage for Failing {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        self.memory.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.step()
    }

    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.step()?;
        self.memory.set_len(len)
    }
}

const SIZE: u64 = 300_000;

/// Lives with a storage that fails after `n` changes; whether it came to that.
fn life(options: &CreateOptions, n: i64, forever: bool) -> bool {
    let memory = Arc::new(MemStorage::default());
    Image::create_storage(Box::new(Arc::clone(&memory)), options)
        .unwrap()
        .close()
        .unwrap();
    let storage = Arc::new(Failing {
        memory: Arc::clone(&memory),
        left: AtomicI64::new(n),
        forever,
    });
    let open = OpenOptions::new()
        .write(true)
        .l2_cache(0)
        .refcount_cache(0)
        .punch_holes(false);
    let image = match Image::open_storage(Box::new(Arc::clone(&storage)), &open) {
        Ok(image) => image,
        Err(e) => panic!("opening changes nothing: {e}"),
    };
    let mut random = Random::new(11);
    // What the disk must hold; None where a failed write leaves old, new or a mixture.
    let mut model: Vec<Option<u8>> = vec![Some(0); SIZE as usize];
    let mut errors = 0;
    for i in 0..40 {
        let (offset, length) = random.range(SIZE, 20_000);
        let range = offset as usize..(offset + length) as usize;
        let (kind, bytes) = (random.below(10), random.bytes(length as usize));
        let cluster = image.cluster_size();
        let first = offset / cluster * cluster;
        let result = match kind {
            0 | 1 => image.discard(offset, length),
            2 => image.flush(),
            3 => image.write_compressed_at(
                &random.bytes(cluster as usize),
                first.min(SIZE / cluster * cluster - cluster),
            ),
            4 if i % 3 == 0 => image.create_snapshot(&format!("s{i}")).map(drop),
            5 if i > 20 => image
                .snapshots()
                .first()
                .map_or(Ok(()), |s| image.delete_snapshot(&s.id)),
            6 if i > 30 => image.resize(SIZE + 100_000, Shrink::IfFree),
            _ => image.write_at(&bytes, offset),
        };
        errors += i64::from(result.is_err());
        match kind {
            0 | 1 => model[range].fill(result.is_ok().then_some(0)),
            2 => {}
            3 => {
                let at = first.min(SIZE / cluster * cluster - cluster) as usize;
                model[at..at + cluster as usize].fill(None);
            }
            4 if i % 3 == 0 => {}
            5 if i > 20 => {}
            6 if i > 30 => {}
            _ => model[range]
                .iter_mut()
                .zip(&bytes)
                .for_each(|(m, b)| *m = result.is_ok().then_some(*b)),
        }
        if matches!(
            result,
            Err(Error::Corrupt(_) | Error::MarkedCorrupt | Error::Malformed { .. })
        ) {
            panic!("after {n} changes, {result:?} blames the image for its storage");
        }
        // What is read back through the image is right, whatever reached the storage.
        if i % 8 != 7 {
            continue;
        }
        let mut content = vec![0; SIZE as usize];
        image.read_at(&mut content, 0).unwrap();
        let wrong = content
            .iter()
            .zip(&model)
            .position(|(c, m)| m.is_some_and(|m| m != *c));
        assert_eq!(wrong, None, "after {n} changes, step {i}, kind {kind}");
    }
    let closed = image.close();
    let failed = storage.left.load(Ordering::Relaxed) < 0;
    assert!(
        !failed || errors > 0 || closed.is_err(),
        "a failure after {n} changes was not told"
    );
    let report =
        check_storage(Box::new(MemStorage::new(memory.to_vec())), Repair::Nothing).unwrap();
    if !report.dirty {
        assert_eq!(
            report.corruptions,
            0,
            "after {n} changes: {:?}",
            report.findings.last()
        );
    }
    let image = Image::open_storage(
        Box::new(MemStorage::new(memory.to_vec())),
        &OpenOptions::new().write(true),
    )
    .unwrap();
    if closed.is_ok() {
        let mut content = vec![0; SIZE as usize];
        image.read_at(&mut content, 0).unwrap();
        let wrong = content
            .iter()
            .zip(&model)
            .position(|(c, m)| m.is_some_and(|m| m != *c));
        assert_eq!(wrong, None, "after {n} changes, closed without an error");
    }
    assert_eq!(image.check().unwrap().corruptions, 0);
    failed
}

#[test]
fn a_storage_that_fails_leaves_at_worst_leaks() {
    let o = CreateOptions::new(SIZE);
    let cases = [
        o.clone().cluster_size(512),
        o.clone().cluster_size(4096).version(2),
        o.clone().cluster_size(16384).extended_l2(true),
        o.cluster_size(512).lazy_refcounts(true).refcount_bits(64),
    ];
    for options in &cases {
        for forever in [false, true] {
            let mut n = 0;
            while life(options, n, forever) {
                n += if n < 40 { 1 } else { 17 };
            }
            assert!(n > 40, "the story is too short: {n} changes");
        }
    }
}

/// What changes all of the metadata at once, with a storage that fails after `n` changes; whether it came to that.
fn switch(kind: &str, n: i64, forever: bool) -> bool {
    let memory = Arc::new(MemStorage::default());
    let options = CreateOptions::new(SIZE).cluster_size(512);
    let image = Image::create_storage(Box::new(Arc::clone(&memory)), &options).unwrap();
    image.write_at(&[1; 50_000], 1000).unwrap();
    image.create_snapshot("old").unwrap();
    image.write_at(&[2; 20_000], 7000).unwrap();
    image.close().unwrap();
    let storage = Arc::new(Failing {
        memory,
        left: AtomicI64::new(n),
        forever,
    });
    let open = OpenOptions::new().write(true);
    let image = Image::open_storage(Box::new(Arc::clone(&storage)), &open).unwrap();
    let result = match kind {
        "create" => image.create_snapshot("new").map(drop),
        "apply" => image.apply_snapshot("old"),
        _ => image.delete_snapshot("old"),
    };
    if result.is_ok() {
        return storage.left.load(Ordering::Relaxed) < 0;
    }
    let mut content = vec![0; 60_000];
    image.read_at(&mut content, 0).unwrap();
    let expected = |at: usize| match at {
        7000..27_000 => 2,
        1000..51_000 => 1,
        _ => 0,
    };
    let wrong = content
        .iter()
        .enumerate()
        .find(|(at, b)| **b != expected(*at));
    assert_eq!(wrong, None, "{kind} after {n} changes");
    assert_eq!(image.snapshots().len(), 1);
    match image.check() {
        Ok(report) => assert_eq!(
            report.corruptions, 0,
            "{kind} after {n}: {:?}",
            report.findings
        ),
        Err(Error::Stopped | Error::Io { .. }) => {}
        Err(e) => panic!("{kind} after {n} changes: {e}"),
    }
    true
}

#[test]
fn a_snapshot_that_fails_leaves_the_image_in_memory_whole() {
    for kind in ["create", "apply", "delete"] {
        for forever in [false, true] {
            let mut n = 0;
            while switch(kind, n, forever) {
                n += 1;
            }
            assert!(n > 10, "{kind}: the story is too short, {n} changes");
        }
    }
}
