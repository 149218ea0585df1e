//! A hostile qcow2 image, or a good one that was damaged, and random operations on it.
//!
//! Holds to: no panic, no endless loop, no allocation without bound. An image that was sound when it was opened is sound
//! but for leaks after any operations, also where the storage fails in their midst; and without such failures every byte
//! reads as it was written, through snapshots, resizes and reopening.
//!
//! The input is a length (two bytes, little-endian), a program of that length for `arbitrary`, and an image. Without an image, one is made.

#![no_main]

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use qcow::{
    CheckReport, Compression, CreateOptions, Image, MemStorage, OpenOptions, Repair, Shrink,
    Storage, check_storage,
};

/// The storage is never longer than this.
const MOST_BYTES: u64 = 16 << 20;
/// Disks up to this size are compared byte by byte.
const MOST_COMPARED: u64 = 256 << 10;
/// Longest program, in operations.
const MOST_OPERATIONS: usize = 64;
/// Longest extent that `map` looks through.
const MOST_MAPPED: u64 = 1 << 30;

/// What happens to the image before it is opened, and then.
#[derive(Arbitrary, Debug)]
struct Program {
    made: Made,
    before: Vec<Op>,
    damage: Vec<(u32, u8)>,
    fails: Option<(u16, u8)>,
    small_caches: bool,
    writable: bool,
    operations: Vec<Op>,
}

/// How an image is made where the input has none.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Made {
    size: u32,
    cluster_bits: u8,
    refcount_order: u8,
    version_2: bool,
    subclusters: bool,
    lazy: bool,
    zstd: bool,
}

/// A place on the disk.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Start(u16),
    Cluster(u8),
    End(u16),
    Anywhere(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Op {
    Read(Place, u16),
    Write(Place, u16, u8),
    Compress(Place, u8, u8),
    Zero(Place, u32),
    Discard(Place, u32),
    Snapshot(u8),
    Apply(u8),
    Delete(u8),
    Resize(Place, bool),
    Map(Place),
    Look,
    Check,
    Flush,
    Reopen,
    Repair(bool),
}

/// Memory with an end, which fails for some changes once its countdown is over, and then works again.
#[derive(Debug)]
struct Fragile {
    bytes: MemStorage,
    /// Changes until it fails.
    left: AtomicI64,
    /// How many of them fail.
    failures: AtomicI64,
}

impl Fragile {
    fn new(bytes: Vec<u8>) -> Self {
        Fragile {
            bytes: MemStorage::new(bytes),
            left: AtomicI64::new(i64::MAX),
            failures: AtomicI64::new(0),
        }
    }

    fn failing(&self) -> bool {
        let left = self.left.load(Ordering::Relaxed);
        left <= 0 && left > -self.failures.load(Ordering::Relaxed)
    }

    fn change(&self, end: u64) -> io::Result<()> {
        let failing = self.failing();
        self.left.fetch_sub(1, Ordering::Relaxed);
        if failing {
            return Err(io::Error::other("the storage was made to fail"));
        }
        if end > MOST_BYTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl Storage for Fragile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(offset.saturating_add(buf.len() as u64))?;
        self.bytes.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.change(0)
    }

    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(len)?;
        self.bytes.set_len(len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(0)?;
        let end = offset.saturating_add(len).min(self.len()?);
        match end.checked_sub(offset) {
            // What is given up reads as something else, to be sure that nobody wants it.
            Some(len) => self.bytes.write_at(&vec![0xdd; len as usize], offset),
            None => Ok(()),
        }
    }
}

/// An open image and what is known about it.
struct Run {
    storage: Arc<Fragile>,
    options: OpenOptions,
    image: Image,
    /// Nothing but leaks was wrong with it.
    sound: bool,
    /// The disk as it must read.
    disk: Option<Vec<u8>>,
    /// The same for snapshots, by id.
    snapshots: HashMap<String, Vec<u8>>,
}

impl Run {
    fn open(storage: &Arc<Fragile>, options: &OpenOptions, sound: bool) -> Option<Run> {
        let image = Image::open_storage(Box::new(Arc::clone(storage)), options).ok()?;
        let mut run = Run {
            storage: Arc::clone(storage),
            options: options.clone(),
            image,
            sound,
            disk: None,
            snapshots: HashMap::new(),
        };
        run.disk = sound.then(|| run.whole()).flatten();
        Some(run)
    }

    /// The whole disk, if it is small and can be read.
    fn whole(&self) -> Option<Vec<u8>> {
        let len = self.image.len();
        let mut bytes = vec![0; (len <= MOST_COMPARED).then_some(len)? as usize];
        self.image.read_at(&mut bytes, 0).ok()?;
        Some(bytes)
    }

    fn failing(&self) -> bool {
        self.storage.failing()
    }

    fn at(&self, place: Place) -> u64 {
        match place {
            Place::Start(n) => u64::from(n),
            Place::Cluster(n) => u64::from(n) * self.image.cluster_size(),
            Place::End(n) => self.image.len().saturating_sub(u64::from(n)),
            Place::Anywhere(n) => n,
        }
    }

    /// Keeps the model in step with a change that went well, and gives it up after one that did not.
    fn changed(&mut self, at: u64, len: u64, byte: u8, result: qcow::Result<()>) {
        let was_inside = at
            .checked_add(len)
            .is_some_and(|end| end <= self.image.len());
        match result {
            Ok(()) => {
                assert!(
                    was_inside,
                    "{len} bytes at {at:#x} of {} accepted",
                    self.image.len()
                );
                if let Some(disk) = &mut self.disk {
                    disk[at as usize..(at + len) as usize].fill(byte);
                }
            }
            // Refused before anything was done.
            Err(
                qcow::Error::OutOfRange { .. } | qcow::Error::Invalid(_) | qcow::Error::ReadOnly,
            ) => {}
            Err(_) => self.disk = None,
        }
    }

    fn snapshot_id(&self, pick: u8) -> String {
        let snapshots = self.image.snapshots();
        let named = match snapshots.len() {
            0 => return name(pick),
            n => &snapshots[usize::from(pick) % n],
        };
        named.id.clone()
    }

    fn step(&mut self, op: Op) -> Option<()> {
        fuzz::show(&op);
        match op {
            Op::Read(place, len) => {
                let at = self.at(place);
                let mut buf = vec![0xee; usize::from(len)];
                let read = self.image.read_at(&mut buf, at);
                if let (Ok(()), Some(disk)) = (read, &self.disk) {
                    assert_eq!(
                        buf,
                        disk[at as usize..at as usize + buf.len()],
                        "read at {at:#x}"
                    );
                }
            }
            Op::Write(place, len, byte) => {
                let at = self.at(place);
                let result = self.image.write_at(&vec![byte; usize::from(len)], at);
                self.changed(at, u64::from(len), byte, result);
            }
            Op::Compress(place, clusters, byte) => {
                let size = self.image.cluster_size();
                let at = self.at(place) / size * size;
                let len = (u64::from(clusters % 4) * size).min(self.image.len().saturating_sub(at));
                let result = self
                    .image
                    .write_compressed_at(&vec![byte; len as usize], at);
                self.changed(at, len, byte, result);
            }
            Op::Zero(place, len) => {
                let at = self.at(place);
                let result = self.image.write_zeroes(at, u64::from(len));
                self.changed(at, u64::from(len), 0, result);
            }
            Op::Discard(place, len) => {
                let at = self.at(place);
                let result = self.image.discard(at, u64::from(len));
                self.changed(at, u64::from(len), 0, result);
            }
            Op::Snapshot(n) => {
                if let (Ok(id), Some(disk)) = (self.image.create_snapshot(&name(n)), &self.disk) {
                    self.snapshots.insert(id, disk.clone());
                }
            }
            Op::Apply(pick) => {
                let id = self.snapshot_id(pick);
                match self.image.apply_snapshot(&id) {
                    Ok(()) => {
                        let now = self.whole();
                        if let (true, Some(then)) = (self.disk.is_some(), self.snapshots.get(&id)) {
                            assert!(
                                now.as_ref() == Some(then),
                                "snapshot {id:?} reads otherwise"
                            );
                        }
                        self.disk = self.sound.then_some(now).flatten();
                    }
                    Err(_) => self.disk = None,
                }
            }
            Op::Delete(pick) => {
                let id = self.snapshot_id(pick);
                if self.image.delete_snapshot(&id).is_ok() {
                    self.snapshots.remove(&id);
                }
            }
            Op::Resize(place, discard) => {
                let size = self.at(place);
                let how = if discard {
                    Shrink::Discard
                } else {
                    Shrink::IfFree
                };
                match (self.image.resize(size, how), &mut self.disk) {
                    (Ok(()), Some(disk)) if size <= MOST_COMPARED => disk.resize(size as usize, 0),
                    (Err(qcow::Error::Invalid(_)), _) => {}
                    _ => self.disk = None,
                }
            }
            Op::Map(place) => {
                let at = self.at(place);
                let len = self.image.len().saturating_sub(at).min(MOST_MAPPED);
                let mut next = at;
                let mapped = self.image.map(at, len, |extent| {
                    assert_eq!(extent.start, next, "extents leave no gap");
                    next += extent.length;
                    Ok(())
                });
                assert!(mapped.is_err() || next == at + len, "extents reach the end");
            }
            Op::Look => {
                let _ = self.image.info();
                let _ = self.image.bitmaps();
            }
            Op::Check => {
                if let Ok(report) = self.image.check() {
                    self.judge(&report);
                }
            }
            Op::Flush => {
                let _ = self.image.flush();
            }
            Op::Reopen => self.reopen(None)?,
            Op::Repair(all) => {
                self.reopen(Some(if all { Repair::All } else { Repair::Leaks }))?;
            }
        }
        Some(())
    }

    /// Closes the image, repairs it if asked to, and opens it again.
    fn reopen(&mut self, repair: Option<Repair>) -> Option<()> {
        let _ = self.image.flush();
        let blank = Arc::new(Fragile::new(Vec::new()));
        let other = Image::create_storage(Box::new(blank), &CreateOptions::new(0)).ok()?;
        let closed = std::mem::replace(&mut self.image, other).close();
        if let Some(repair) = repair {
            self.repair(repair);
        }
        let may_fail = !self.sound || closed.is_err() || self.failing();
        let again = Image::open_storage(Box::new(Arc::clone(&self.storage)), &self.options);
        match again {
            Ok(image) => self.image = image,
            Err(e) => {
                assert!(may_fail, "a sound image does not open again: {e:?}");
                return None;
            }
        }
        if may_fail {
            self.disk = None;
        } else if let Some(disk) = &self.disk {
            assert!(
                self.whole().as_ref() == Some(disk),
                "the disk reads otherwise after reopening"
            );
        }
        Some(())
    }

    /// What was repaired in full has nothing wrong with it that repair said it had mended.
    fn repair(&self, repair: Repair) {
        let Ok(done) = check_storage(Box::new(Arc::clone(&self.storage)), repair) else {
            return;
        };
        if repair == Repair::All && done.corruptions == 0 && !self.failing() {
            let after = check_storage(Box::new(Arc::clone(&self.storage)), Repair::Nothing);
            let after = after.expect("a repaired image can be checked");
            assert_eq!(
                after.corruptions,
                0,
                "repaired, but {:?}",
                beyond_leaks(&after)
            );
        }
    }

    fn judge(&self, report: &CheckReport) {
        // One that gave up after a failure knows less than the disk does.
        let excused = report.dirty || !self.sound || !self.image.is_writable();
        assert!(
            excused || report.corruptions == 0,
            "was sound, now {:?}",
            beyond_leaks(report)
        );
        assert!(
            !report.marked_corrupt || !self.sound,
            "a sound image was marked corrupt"
        );
    }

    fn finish(self) {
        let _ = self.image.flush();
        let Run {
            storage,
            image,
            sound,
            ..
        } = self;
        let _ = image.close();
        let report = check_storage(Box::new(storage), Repair::Nothing);
        if sound {
            let report = report.expect("a sound image can be checked");
            assert!(
                report.dirty || report.corruptions == 0,
                "was sound, now {:?}",
                beyond_leaks(&report)
            );
        }
    }
}

fn name(n: u8) -> String {
    // "1" and "2" are names that could be ids.
    ["", "1", "2", "a", "bb", "\u{fc}"][usize::from(n) % 6].to_owned()
}

fn make(made: Made) -> Option<Arc<Fragile>> {
    let storage = Arc::new(Fragile::new(Vec::new()));
    // Large clusters only make it slow: a check looks at each entry of a refcount block.
    let compression = if made.zstd {
        Compression::Zstd
    } else {
        Compression::Zlib
    };
    let options = CreateOptions::new(u64::from(made.size) % (4 * MOST_COMPARED))
        .cluster_size(1 << (9 + made.cluster_bits % 6))
        .version(if made.version_2 { 2 } else { 3 })
        .refcount_bits(1 << (made.refcount_order % 7))
        .extended_l2(made.subclusters)
        .lazy_refcounts(made.lazy)
        .compression(compression);
    let image = Image::create_storage(Box::new(Arc::clone(&storage)), &options).ok()?;
    image.close().ok()?;
    Some(storage)
}

fn run(data: &[u8]) -> Option<()> {
    let (length, rest) = data.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (program, image) = rest.split_at(length);
    let program = Program::arbitrary(&mut Unstructured::new(program)).ok()?;

    fuzz::show(&program);
    let storage = if image.is_empty() {
        make(program.made)?
    } else {
        Arc::new(Fragile::new(image.to_vec()))
    };
    if !program.before.is_empty() {
        let report = check_storage(Box::new(Arc::clone(&storage)), Repair::Nothing).ok()?;
        let sound = is_sound(&report);
        let mut run = Run::open(&storage, &OpenOptions::new().write(true), sound)?;
        for op in program.before.iter().take(MOST_OPERATIONS) {
            run.step(*op)?;
        }
        run.finish();
    }
    if !program.damage.is_empty() {
        let len = storage.len().ok()?.max(1);
        for (at, byte) in program.damage {
            storage.write_at(&[byte], u64::from(at) % len).ok()?;
        }
    }

    let report = check_storage(Box::new(Arc::clone(&storage)), Repair::Nothing);
    let sound = report.is_ok_and(|r| is_sound(&r));
    if let Some((after, failures)) = program.fails {
        let failures = if failures == u8::MAX {
            i64::MAX
        } else {
            i64::from(failures)
        };
        storage.failures.store(failures, Ordering::Relaxed);
        storage.left.store(after.into(), Ordering::Relaxed);
    }
    let mut options = OpenOptions::new().write(program.writable);
    if program.small_caches {
        options = options.l2_cache(0).refcount_cache(0).unpacked_cache(1);
    }
    let mut run = Run::open(&storage, &options, sound)?;
    for op in program.operations.into_iter().take(MOST_OPERATIONS) {
        run.step(op)?;
    }
    run.finish();
    Some(())
}

/// The findings that are no leaks.
fn beyond_leaks(report: &CheckReport) -> Vec<&String> {
    let findings = report.findings.iter();
    findings.filter(|f| !f.contains("too high")).collect()
}

fn is_sound(report: &CheckReport) -> bool {
    report.corruptions == 0 && !report.dirty && !report.marked_corrupt
}

fuzz_target!(|data: &[u8]| {
    // `None` is an input that leads nowhere.
    let _ = run(data);
});
