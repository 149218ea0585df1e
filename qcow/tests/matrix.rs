//! Images by us, read and checked by QEMU, and the other way round, over the features of the format.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{
    Random, Verdict, assert_same, discard, qemu_check, qemu_img, qemu_io, qemu_read, write,
    write_zeroes,
};
use qcow::{CreateOptions, Image, OpenOptions};

/// A point of the matrix.
#[derive(Clone, Copy, Debug)]
struct Case {
    version: u32,
    cluster: u64,
    refcount: u32,
    extended: bool,
    lazy: bool,
    backing: Option<&'static str>,
}

fn cases() -> Vec<Case> {
    let base = Case {
        version: 3,
        cluster: 65536,
        refcount: 16,
        extended: false,
        lazy: false,
        backing: None,
    };
    let mut all = Vec::new();
    for cluster in [
        512,
        1024,
        2048,
        4096,
        8192,
        16384,
        32768,
        65536,
        262_144,
        2 << 20,
    ] {
        all.push(Case { cluster, ..base });
        all.push(Case {
            cluster,
            version: 2,
            ..base
        });
        if cluster >= 16384 {
            all.push(Case {
                cluster,
                extended: true,
                ..base
            });
        }
    }
    for refcount in [1, 2, 4, 8, 32, 64] {
        all.push(Case { refcount, ..base });
        all.push(Case {
            refcount,
            cluster: 512,
            ..base
        });
        all.push(Case {
            refcount,
            lazy: true,
            cluster: 4096,
            ..base
        });
    }
    for backing in ["raw", "qcow2"] {
        for version in [2, 3] {
            for cluster in [512, 4096, 65536] {
                all.push(Case {
                    version,
                    cluster,
                    backing: Some(backing),
                    ..base
                });
            }
        }
        all.push(Case {
            extended: true,
            backing: Some(backing),
            ..base
        });
        all.push(Case {
            lazy: true,
            backing: Some(backing),
            ..base
        });
    }
    all
}

/// A disk whose last cluster is not whole.
const SIZE: u64 = (6 << 20) + 1536;
const BACKING_SIZE: u64 = (4 << 20) + 512;

fn follow() -> OpenOptions {
    OpenOptions::new()
        .write(true)
        .follow_backing(true)
        .follow_data_file(true)
}

/// Makes the backing file; its content, as long as the disk.
fn backing(dir: &Path, case: Case, random: &mut Random) -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    let Some(format) = case.backing else {
        return content;
    };
    let bytes = random.bytes(BACKING_SIZE as usize);
    content[..bytes.len()].copy_from_slice(&bytes);
    let (raw, path) = (dir.join("base.raw"), dir.join("base"));
    std::fs::write(&raw, bytes).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        format,
        raw.to_str().unwrap(),
        path.to_str().unwrap(),
    ]);
    content
}

fn options(case: Case) -> CreateOptions {
    let o = CreateOptions::new(SIZE)
        .version(case.version)
        .cluster_size(case.cluster)
        .refcount_bits(case.refcount)
        .extended_l2(case.extended)
        .lazy_refcounts(case.lazy);
    match case.backing {
        Some(format) => o.backing("base", format),
        None => o,
    }
}

#[test]
fn ours_read_and_checked_by_qemu() {
    for (i, case) in cases().into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let mut random = Random::new(i as u64 + 1);
        let mut model = backing(dir.path(), case, &mut random);
        let image = Image::create(&path, &options(case)).unwrap();
        for _ in 0..40 {
            let (offset, length) = random.range(SIZE, 200_000);
            match random.below(6) {
                0 => discard(&image, &mut model, (offset, length)),
                1 => write_zeroes(&image, &mut model, (offset, length)),
                2 => image.flush().unwrap(),
                _ => write(&image, &mut model, (offset, length), &mut random),
            }
        }
        let mut ours = vec![0xff; SIZE as usize];
        image.read_at(&mut ours, 0).unwrap();
        assert_same(&ours, &model, &format!("{case:?}, ours"));
        image.close().unwrap();
        assert_eq!(qemu_check(&path), Verdict::Clean, "{case:?}");
        assert_same(&qemu_read(&path), &model, &format!("{case:?}, theirs"));
    }
}

#[test]
fn theirs_read_and_continued_by_us() {
    for (i, case) in cases().into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let mut random = Random::new(i as u64 + 1000);
        let mut model = backing(dir.path(), case, &mut random);
        let mut o = format!(
            "cluster_size={},compat={}",
            case.cluster,
            if case.version == 2 { "0.10" } else { "1.1" }
        );
        if case.version == 3 {
            let on = |b: bool| if b { "on" } else { "off" };
            o += &format!(
                ",refcount_bits={},extended_l2={},lazy_refcounts={}",
                case.refcount,
                on(case.extended),
                on(case.lazy)
            );
        }
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &o];
        if let Some(format) = case.backing {
            args.extend(["-b", "base", "-F", format]);
        }
        let size = SIZE.to_string();
        args.extend([path.to_str().unwrap(), &size]);
        qemu_img(&args);
        let mut commands = Vec::new();
        for _ in 0..15 {
            let (offset, length) = random.range(SIZE / 512, 300);
            let (offset, length) = (offset * 512, length * 512);
            let range = offset as usize..(offset + length) as usize;
            match random.below(4) {
                0 => {
                    commands.push(format!("write -z {offset} {length}"));
                    model[range].fill(0);
                }
                _ => {
                    let byte = random.below(255) as u8 + 1;
                    commands.push(format!("write -P {byte} {offset} {length}"));
                    model[range].fill(byte);
                }
            }
        }
        qemu_io(&path, &commands);
        let image = Image::open(&path, &follow()).unwrap();
        let mut ours = vec![0xff; SIZE as usize];
        image.read_at(&mut ours, 0).unwrap();
        assert_same(&ours, &model, &format!("{case:?}, {commands:?}"));
        for _ in 0..20 {
            let (offset, length) = random.range(SIZE, 100_000);
            let bytes = random.bytes(length as usize);
            image.write_at(&bytes, offset).unwrap();
            model[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
        }
        image.close().unwrap();
        assert_eq!(qemu_check(&path), Verdict::Clean, "{case:?}");
        assert_same(&qemu_read(&path), &model, &format!("{case:?}, continued"));
    }
}
