//! A kill, or a power failure, at every point of an image's life: what is left is a whole image with at worst leaks, and has all that was
//! flushed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/record.rs"]
mod record;

use std::sync::Arc;

use common::{Random, Verdict, qemu_check};
use qcow::{CreateOptions, Image, MemStorage, OpenOptions, Repair, check_storage};
use record::{Event, Recording, apply};

const SIZE: u64 = 400_000;

/// What the disk held when an event was about to happen, and what may have changed since the last flush.
struct Flushed {
    position: usize,
    content: Vec<u8>,
}

/// A run of operations on a recorded image.
struct Story {
    start: Vec<u8>,
    log: Vec<Event>,
    /// Contents that were flushed, with the position in the log from which that holds.
    flushed: Vec<Flushed>,
    /// Ranges written, with the position in the log at which the write began.
    touched: Vec<(usize, u64, u64)>,
    lazy: bool,
}

fn live(options: &CreateOptions, seed: u64, snapshots: bool) -> Story {
    let memory = Arc::new(MemStorage::default());
    Image::create_storage(Box::new(Arc::clone(&memory)), options)
        .unwrap()
        .close()
        .unwrap();
    let start = memory.to_vec();
    let storage = Arc::new(Recording::new(start.clone()));
    let image = Image::open_storage(
        Box::new(Arc::clone(&storage)),
        &OpenOptions::new().write(true).l2_cache(0),
    )
    .unwrap();
    let mut random = Random::new(seed);
    let mut model = vec![0; SIZE as usize];
    let mut saved: Option<Vec<u8>> = None;
    let mut flushed = vec![Flushed {
        position: 0,
        content: model.clone(),
    }];
    let mut touched = Vec::new();
    for step in 0..28 {
        let (offset, length) = random.range(SIZE, 30_000);
        let range = offset as usize..(offset + length) as usize;
        touched.push((storage.position(), offset, length));
        match random.below(12) {
            0 | 1 => {
                image.discard(offset, length).unwrap();
                model[range].fill(0);
            }
            2 => {
                image.write_zeroes(offset, length).unwrap();
                model[range].fill(0);
            }
            3 => {
                let size = image.cluster_size();
                let (first, end) = (offset / size * size, (offset + length) / size * size);
                if first < end {
                    touched.push((storage.position(), first, end - first));
                    let bytes = random.bytes((end - first) as usize);
                    image.write_compressed_at(&bytes, first).unwrap();
                    model[first as usize..end as usize].copy_from_slice(&bytes);
                }
            }
            7 => image
                .resize(image.len() + (3 << 20), qcow::Shrink::IfFree)
                .unwrap(),
            4 | 5 => {
                image.flush().unwrap();
                flushed.push(Flushed {
                    position: storage.position(),
                    content: model.clone(),
                });
            }
            6 if snapshots => {
                touched.push((storage.position(), 0, SIZE));
                match saved.take() {
                    None => {
                        image.create_snapshot(&format!("s{step}")).unwrap();
                        saved = Some(model.clone());
                    }
                    Some(content) if random.below(2) == 0 => {
                        let name = image.snapshots()[0].id.clone();
                        image.apply_snapshot(&name).unwrap();
                        model.clone_from(&content);
                        saved = Some(content);
                    }
                    Some(_) => {
                        let name = image.snapshots()[0].id.clone();
                        image.delete_snapshot(&name).unwrap();
                    }
                }
                flushed.push(Flushed {
                    position: storage.position(),
                    content: model.clone(),
                });
            }
            _ => {
                let bytes = random.bytes(length as usize);
                image.write_at(&bytes, offset).unwrap();
                model[range].copy_from_slice(&bytes);
            }
        }
    }
    image.close().unwrap();
    flushed.push(Flushed {
        position: storage.position(),
        content: model,
    });
    let lazy = format!("{options:?}").contains("lazy_refcounts: true");
    Story {
        start,
        log: storage.take_log(),
        flushed,
        touched,
        lazy,
    }
}

/// Checks a state that a failure after `position` events left behind.
fn judge(story: &Story, bytes: &[u8], position: usize, what: &str) {
    let report = check_storage(Box::new(MemStorage::new(bytes.to_vec())), Repair::Nothing)
        .unwrap_or_else(|e| panic!("{what}: does not open: {e}"));
    assert!(!report.marked_corrupt, "{what}: marked corrupt");
    if !(story.lazy && report.dirty) {
        assert_eq!(
            report.corruptions,
            0,
            "{what}: {:?}",
            report.findings.last()
        );
    }
    // Opened for writing, as the next start would: repaired where it says that it was not closed.
    let image = Image::open_storage(
        Box::new(MemStorage::new(bytes.to_vec())),
        &OpenOptions::new().write(true),
    )
    .unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut content = vec![0; SIZE as usize];
    image.read_at(&mut content, 0).unwrap();
    let last = story
        .flushed
        .iter()
        .rposition(|f| f.position <= position)
        .unwrap();
    let flushed = &story.flushed[last];
    let mut maybe = vec![false; SIZE as usize];
    // A write that began before the flush ended may be in or not; those after it too.
    let since = flushed.position;
    for (began, offset, length) in story
        .touched
        .iter()
        .filter(|t| t.0 >= since && t.0 <= position)
    {
        let _ = began;
        maybe[*offset as usize..(*offset + *length) as usize].fill(true);
    }
    for (at, (now, then)) in content
        .chunks(512)
        .zip(flushed.content.chunks(512))
        .enumerate()
    {
        if now == then {
            continue;
        }
        for (i, (now, then)) in now.iter().zip(then).enumerate() {
            let at = at * 512 + i;
            assert!(
                maybe[at] || now == then,
                "{what}: byte {at:#x} was flushed as {then:#x} and is {now:#x}"
            );
        }
    }
    assert_eq!(
        image.check().unwrap().corruptions,
        0,
        "{what}: after opening"
    );
}

fn options() -> Vec<(CreateOptions, bool)> {
    let o = CreateOptions::new(SIZE);
    vec![
        (o.clone().cluster_size(512), true),
        (o.clone().cluster_size(512).refcount_bits(64), true),
        (o.clone().cluster_size(4096).version(2), true),
        (o.clone().cluster_size(1024).refcount_bits(1), false),
        (o.clone().cluster_size(16384).extended_l2(true), true),
        (o.cluster_size(512).lazy_refcounts(true), true),
    ]
}

#[test]
fn a_kill_at_every_write_leaves_at_worst_leaks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.qcow2");
    let (mut states, mut by_qemu) = (0, 0);
    for (case, (options, snapshots)) in options().into_iter().enumerate() {
        for seed in 0..2 {
            let story = live(&options, seed * 100 + case as u64, snapshots);
            let mut bytes = story.start.clone();
            for (position, event) in story.log.iter().enumerate() {
                let what = format!("case {case}, seed {seed}, killed before event {position}");
                if !matches!(event, Event::Flush) {
                    judge(&story, &bytes, position, &what);
                    states += 1;
                    if states % 25 == 0 && !story.lazy {
                        std::fs::write(&path, &bytes).unwrap();
                        let verdict = qemu_check(&path);
                        assert!(
                            matches!(verdict, Verdict::Clean | Verdict::Leaks),
                            "{what}: {verdict:?}"
                        );
                        by_qemu += 1;
                    }
                }
                apply(&mut bytes, event);
            }
            judge(&story, &bytes, story.log.len(), "closed");
        }
    }
    println!("{states} states, {by_qemu} of them checked by qemu-img too");
    assert!(states > 2000, "only {states} states");
}

#[test]
fn a_power_failure_that_loses_some_of_what_was_not_flushed_leaves_at_worst_leaks() {
    let mut states = 0;
    for (case, (options, snapshots)) in options().into_iter().enumerate() {
        for seed in 0..2 {
            let story = live(&options, 7000 + seed * 100 + case as u64, snapshots);
            let mut random = Random::new(seed + 5);
            let mut durable = story.start.clone();
            let mut since_flush: Vec<&Event> = Vec::new();
            for (position, event) in story.log.iter().enumerate() {
                if !matches!(event, Event::Flush) {
                    since_flush.push(event);
                    continue;
                }
                for round in 0..4 {
                    let mut bytes = durable.clone();
                    for event in &since_flush {
                        // The length of a file is its file system's business, and comes in order.
                        if matches!(event, Event::SetLen(_)) || random.below(2) == 0 {
                            apply(&mut bytes, event);
                        }
                    }
                    let what = format!(
                        "case {case}, seed {seed}, power lost before event {position}, round {round}"
                    );
                    judge(&story, &bytes, position, &what);
                    states += 1;
                }
                since_flush.iter().for_each(|e| apply(&mut durable, e));
                since_flush.clear();
            }
        }
    }
    println!("{states} states");
    assert!(states > 1000, "only {states} states");
}

#[test]
fn a_kill_while_the_refcount_table_moves_leaves_at_worst_leaks() {
    let options = CreateOptions::new(8 << 20)
        .cluster_size(512)
        .refcount_bits(64);
    let memory = Arc::new(MemStorage::default());
    Image::create_storage(Box::new(Arc::clone(&memory)), &options)
        .unwrap()
        .close()
        .unwrap();
    let start = memory.to_vec();
    let storage = Arc::new(Recording::new(start.clone()));
    let image = Image::open_storage(
        Box::new(Arc::clone(&storage)),
        &OpenOptions::new().write(true),
    )
    .unwrap();
    let first_table = image.header().refcount_table_offset;
    // The first table counts 2 MiB. It moves in here.
    image.write_at(&[1; 1_900_000], 0).unwrap();
    image.flush().unwrap();
    let quiet = storage.position();
    for i in 0..8 {
        image
            .write_at(&[2; 40_000], 2_000_000 + i * 50_000)
            .unwrap();
    }
    assert_ne!(
        image.header().refcount_table_offset,
        first_table,
        "the table did not move"
    );
    image.close().unwrap();
    let mut bytes = start;
    let mut states = 0;
    for (position, event) in storage.take_log().iter().enumerate() {
        if position >= quiet && !matches!(event, Event::Flush) {
            let report =
                check_storage(Box::new(MemStorage::new(bytes.clone())), Repair::Nothing).unwrap();
            assert_eq!(
                report.corruptions,
                0,
                "killed before event {position}: {:?}",
                report.findings.last()
            );
            states += 1;
        }
        apply(&mut bytes, event);
    }
    let report = check_storage(Box::new(MemStorage::new(bytes)), Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "closed");
    assert!(states > 50, "only {states} states");
}
