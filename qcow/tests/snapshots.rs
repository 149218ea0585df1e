//! Internal snapshots, by us and by QEMU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{Random, Verdict, assert_same, qemu_check, qemu_img, qemu_io, qemu_read};
use qcow::{CreateOptions, Image, OpenOptions, Repair, check};

const SIZE: u64 = 3 << 20;

fn scribble(image: &Image, model: &mut [u8], random: &mut Random, times: usize) {
    for _ in 0..times {
        let (offset, length) = random.range(SIZE, 150_000);
        let range = offset as usize..(offset + length) as usize;
        if random.below(5) == 0 {
            image.discard(offset, length).unwrap();
            model[range].fill(0);
        } else {
            let bytes = random.bytes(length as usize);
            image.write_at(&bytes, offset).unwrap();
            model[range].copy_from_slice(&bytes);
        }
    }
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.len() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn clean(path: &Path) {
    let ours = check(path, Repair::Nothing).unwrap();
    assert_eq!(
        (ours.corruptions, ours.leaks),
        (0, 0),
        "{:?}",
        ours.findings
    );
    assert_eq!(qemu_check(path), Verdict::Clean);
}

fn all_options() -> Vec<CreateOptions> {
    let o = CreateOptions::new(SIZE);
    vec![
        o.clone(),
        o.clone().version(2),
        o.clone().cluster_size(512),
        o.clone().cluster_size(4096).refcount_bits(2),
        o.clone().cluster_size(4096).refcount_bits(64),
        o.clone().extended_l2(true),
        o.lazy_refcounts(true).cluster_size(1024),
    ]
}

#[test]
fn a_write_after_a_snapshot_does_not_change_the_snapshot() {
    for (i, options) in all_options().into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let mut random = Random::new(77 + i as u64);
        let image = Image::create(&path, &options).unwrap();
        let mut model = vec![0; SIZE as usize];
        scribble(&image, &mut model, &mut random, 15);
        image.create_snapshot("one").unwrap();
        let one = model.clone();
        scribble(&image, &mut model, &mut random, 15);
        image.create_snapshot("two").unwrap();
        let two = model.clone();
        scribble(&image, &mut model, &mut random, 15);
        assert_same(&read_all(&image), &model, "active");
        image.close().unwrap();
        clean(&path);
        for (name, content) in [("one", &one), ("two", &two)] {
            let view = Image::open(&path, &OpenOptions::new().snapshot(name)).unwrap();
            assert_same(&read_all(&view), content, name);
            let raw = dir.path().join("raw");
            let list = format!("snapshot.name={name}");
            let args = [
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "-l",
                &list,
                path.to_str().unwrap(),
                raw.to_str().unwrap(),
            ];
            qemu_img(&args);
            assert_same(
                &std::fs::read(raw).unwrap(),
                content,
                "as QEMU reads the snapshot",
            );
        }
        let image = Image::open(&path, &OpenOptions::new().write(true)).unwrap();
        image.apply_snapshot("one").unwrap();
        let mut model = one.clone();
        assert_same(&read_all(&image), &model, "applied");
        scribble(&image, &mut model, &mut random, 5);
        image.delete_snapshot("1").unwrap();
        assert_same(&read_all(&image), &model, "after deletion of the first");
        scribble(&image, &mut model, &mut random, 5);
        image.close().unwrap();
        clean(&path);
        let view = Image::open(&path, &OpenOptions::new().snapshot("two")).unwrap();
        assert_same(&read_all(&view), &two, "two, to the end");
        assert_same(&qemu_read(&path), &model, "as QEMU reads the active disk");
        let image = Image::open(&path, &OpenOptions::new().write(true)).unwrap();
        image.delete_snapshot("two").unwrap();
        assert!(image.snapshots().is_empty());
        assert!(image.delete_snapshot("two").is_err());
        assert_same(&read_all(&image), &model, "after deletion of all");
        image.close().unwrap();
        clean(&path);
    }
}

#[test]
fn snapshots_of_qemu_are_kept_and_continued() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let p = path.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        p,
        "3M",
    ]);
    qemu_io(&path, &["write -P 1 0 1M".into()]);
    qemu_img(&["snapshot", "-c", "first", p]);
    qemu_io(&path, &["write -P 2 512k 1M".into()]);
    let image = Image::open(&path, &OpenOptions::new().write(true)).unwrap();
    image.write_at(&[3; 10000], 100_000).unwrap();
    let id = image.create_snapshot("second").unwrap();
    assert_eq!(id, "2");
    image.write_at(&[4; 10000], 105_000).unwrap();
    let active = read_all(&image);
    image.close().unwrap();
    clean(&path);
    qemu_img(&["snapshot", "-a", "second", p]);
    let second = qemu_read(&path);
    assert_eq!(
        (
            second[99_999],
            second[100_000],
            second[109_999],
            second[110_000]
        ),
        (1, 3, 3, 1)
    );
    qemu_img(&["snapshot", "-d", "second", p]);
    clean(&path);
    qemu_img(&["snapshot", "-a", "first", p]);
    let first = qemu_read(&path);
    assert!(first[..1 << 20].iter().all(|b| *b == 1) && first[1 << 20..].iter().all(|b| *b == 0));
    assert_eq!((active[104_999], active[105_000]), (3, 4));
    clean(&path);
}

#[test]
fn narrow_refcounts_refuse_what_they_cannot_hold() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(SIZE).refcount_bits(1)).unwrap();
    assert!(image.create_snapshot("s").is_err());
    drop(image);
    std::fs::remove_file(&path).unwrap();
    let image = Image::create(&path, &CreateOptions::new(SIZE).refcount_bits(2)).unwrap();
    image.write_at(b"data", 0).unwrap();
    image.create_snapshot("a").unwrap();
    image.create_snapshot("b").unwrap();
    assert!(image.create_snapshot("a").is_err(), "names are unique");
    // Two bits count to three: this one is the fourth reference.
    assert!(image.create_snapshot("c").is_err());
    image.close().unwrap();
    let report = check(&path, Repair::Leaks).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.findings);
    clean(&path);
}

#[test]
fn a_snapshot_brings_back_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(SIZE).cluster_size(512)).unwrap();
    image.write_at(&[9; 512], SIZE - 512).unwrap();
    image.create_snapshot("small").unwrap();
    image.resize(100 << 20, qcow::Shrink::IfFree).unwrap();
    image.write_at(&[8; 512], (100 << 20) - 512).unwrap();
    image.apply_snapshot("small").unwrap();
    assert_eq!(image.len(), SIZE);
    assert_eq!(read_all(&image)[SIZE as usize - 1], 9);
    image.close().unwrap();
    clean(&path);
}
