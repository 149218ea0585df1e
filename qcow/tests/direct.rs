//! Images past the page cache: direct I/O of any bytes, in blocks of the disk and in larger ones, against a flat array and QEMU.
//!
//! The files are on the file system of the build, which has to know `O_DIRECT`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use common::{
    Random, Verdict, assert_same, discard, qemu_check, qemu_img, qemu_read, write, write_zeroes,
};
use qcow::{CreateOptions, Error, FileStorage, Image, OpenOptions, Shrink, Storage};

/// `O_DIRECT`, as x86-64 has it.
const O_DIRECT: i32 = 0o40000;
const SIZE: u64 = 700_000;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn storage(path: &Path, block: u64) -> FileStorage {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(O_DIRECT)
        .open(path)
        .expect("the file system of the build takes no O_DIRECT");
    FileStorage::direct_in_blocks(file, block).unwrap()
}

#[test]
fn any_bytes_by_any_thread_are_as_on_a_flat_file() {
    const THREADS: usize = 4;
    // Stripes of no multiple of any block, so that threads meet in the blocks between.
    const STRIPE: usize = 1237;
    const STRIPES: usize = 400;
    for block in [1, 4096, 1 << 20] {
        let dir = directory();
        let storage = storage(&dir.path().join("file"), block);
        let threads: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let work = |thread: usize| {
                let mut random = Random::new(block + thread as u64);
                let mut model = vec![0; STRIPE * STRIPES];
                let mut memory = vec![0; 8192];
                for _ in 0..150 {
                    // One stripe of this thread, in part or all of it, from memory anywhere.
                    let stripe =
                        random.below((STRIPES / THREADS) as u64) as usize * THREADS + thread;
                    let skip = random.below(STRIPE as u64) as usize;
                    let length = 1 + random.below((STRIPE - skip) as u64) as usize;
                    let at = stripe * STRIPE + skip;
                    let shift = random.below(64) as usize;
                    let part = &mut memory[shift..shift + length];
                    if random.below(3) == 0 {
                        storage.read_at(part, at as u64).unwrap();
                        assert_same(part, &model[at..at + length], "while others write");
                    } else {
                        part.copy_from_slice(&random.bytes(length));
                        storage.write_at(part, at as u64).unwrap();
                        model[at..at + length].copy_from_slice(part);
                    }
                }
                model
            };
            let running: Vec<_> = (0..THREADS).map(|t| scope.spawn(move || work(t))).collect();
            running.into_iter().map(|t| t.join().unwrap()).collect()
        });
        // Each has zeros where the others wrote.
        let mut model = vec![0; STRIPE * STRIPES];
        for thread in &threads {
            model.iter_mut().zip(thread).for_each(|(m, b)| *m |= b);
        }
        storage.flush().unwrap();
        let mut back = vec![0xee; model.len() + 12_345];
        storage.read_at(&mut back[..], 0).unwrap();
        model.resize(back.len(), 0);
        assert_same(&back, &model, "past the end too");
        let mut file = fs::read(dir.path().join("file")).unwrap();
        assert_eq!(file.len() as u64 % storage.block(), 0, "whole blocks");
        file.resize(file.len().max(model.len()), 0);
        model.resize(file.len(), 0);
        assert_same(&file, &model, "as others see it");
    }
}

#[test]
fn a_write_of_a_whole_block_survives_writes_of_its_parts() {
    let dir = directory();
    let storage = storage(&dir.path().join("file"), 4096);
    let mut memory = vec![7; 8192];
    let start = memory.as_ptr().addr().next_multiple_of(4096) - memory.as_ptr().addr();
    let whole = &mut memory[start..start + 4096];
    for round in 1..200 {
        whole.fill(round);
        std::thread::scope(|scope| {
            scope.spawn(|| storage.write_at(&[round; 100], 50).unwrap());
            storage.write_at(whole, 0).unwrap();
        });
        let mut back = [0; 4096];
        storage.read_at(&mut back, 0).unwrap();
        assert_eq!(back, [round; 4096]);
    }
}

#[test]
fn large_transfers_and_odd_ends() {
    let dir = directory();
    let path = dir.path().join("file");
    let storage = storage(&path, 4096);
    let bytes = Random::new(3).bytes(1_000_001);
    for (offset, length) in [
        (0, 1_000_001),
        (4096, 524_288),
        (513, 900_000),
        (5000, 4096),
    ] {
        storage.set_len(0).unwrap();
        storage.write_at(&bytes[..length], offset).unwrap();
        let end = offset + length as u64;
        assert_eq!(storage.len().unwrap(), end.next_multiple_of(4096));
        let mut back = vec![0xee; length + 10_000];
        storage.read_at(&mut back, offset).unwrap();
        assert_same(&back[..length], &bytes[..length], "what was written");
        assert!(back[length..].iter().all(|b| *b == 0));
    }
    // A file that others left with an end within a block.
    for length in [1, 511, 512, 4095, 4097, 262_144 + 513] {
        fs::write(&path, &bytes[..length]).unwrap();
        let mut back = vec![0xee; length + 5000];
        storage.read_at(&mut back, 0).unwrap();
        assert_same(&back[..length], &bytes[..length], "what is there");
        assert!(back[length..].iter().all(|b| *b == 0));
        storage.write_at(b"end", length as u64).unwrap();
        let mut expected = bytes[..length].to_vec();
        expected.extend(b"end");
        expected.resize((length + 3).next_multiple_of(4096), 0);
        assert_same(&fs::read(&path).unwrap(), &expected, "with an end");
    }
    // Parts of blocks stay.
    storage.set_len(0).unwrap();
    storage.write_at(&[1; 20_000], 0).unwrap();
    storage.discard(100, 9000).unwrap();
    let mut back = vec![0; 20_000];
    storage.read_at(&mut back, 0).unwrap();
    assert!(back[..4096].iter().all(|b| *b == 1) && back[8192..].iter().all(|b| *b == 1));
    assert_eq!(back[4096..8192], [0; 4096]);
    storage.discard(4097, 4095).unwrap();
}

#[test]
fn blocks_that_cannot_be() {
    let dir = directory();
    let path = dir.path().join("image");
    Image::create(&path, &CreateOptions::new(SIZE)).unwrap();
    for block in [0, 3, 2 << 20] {
        let open = OpenOptions::new().direct(true).direct_block(block);
        let refused = Image::open(&path, &open).map(drop);
        assert!(matches!(refused, Err(Error::Open { .. })), "{block}");
    }
    // What has no O_DIRECT.
    let refused = Image::open("/proc/version", &OpenOptions::new().direct(true)).unwrap_err();
    let Error::Open { source, .. } = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(source.kind(), std::io::ErrorKind::InvalidInput);
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.len() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A new image's life in direct I/O, and what QEMU and buffered I/O find in it. `model` is what the disk holds at first.
fn life(path: &Path, options: &CreateOptions, mut model: Vec<u8>, packs: bool, seed: u64) {
    let what = format!("{options:?}");
    Image::create(path, options).unwrap().close().unwrap();
    let files = OpenOptions::new()
        .follow_backing(true)
        .follow_data_file(true);
    let open = files.clone().write(true).l2_cache(0).refcount_cache(0);
    let mut random = Random::new(seed);
    let mut saved: Option<Vec<u8>> = None;
    for round in 0..3 {
        // The disk's own blocks, and larger ones.
        let block = if round == 1 { 1 } else { 4096 };
        let image = Image::open(path, &open.clone().direct(true).direct_block(block)).unwrap();
        assert!(image.data_block() >= block.max(512));
        assert_same(&read_all(&image), &model, &what);
        for _ in 0..40 {
            let (offset, length) = random.range(image.len(), 50_000);
            match random.below(12) {
                0 => discard(&image, &mut model, (offset, length)),
                1 => write_zeroes(&image, &mut model, (offset, length)),
                2 | 3 if packs => {
                    let c = image.cluster_size();
                    let end = (offset + length).div_ceil(c) * c;
                    let (first, end) = (offset / c * c, end.min(image.len()));
                    let bytes = random.bytes((end - first) as usize);
                    image.write_compressed_at(&bytes, first).unwrap();
                    model[first as usize..end as usize].copy_from_slice(&bytes);
                }
                4 => image.flush().unwrap(),
                5 if packs && saved.is_none() => {
                    image.create_snapshot("s").unwrap();
                    saved = Some(model.clone());
                }
                6 => {
                    let mut part = vec![0; length as usize];
                    image.read_at(&mut part, offset).unwrap();
                    let range = offset as usize..(offset + length) as usize;
                    assert_same(&part, &model[range], &what);
                }
                _ => write(&image, &mut model, (offset, length), &mut random),
            }
        }
        let size = SIZE + round * 1000;
        image.resize(size, Shrink::Discard).unwrap();
        model.resize(size as usize, 0);
        assert_same(&read_all(&image), &model, &what);
        let report = image.check().unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}");
        image.close().unwrap();
        assert_eq!(qemu_check(path), Verdict::Clean, "{what}");
        // QEMU counts in whole sectors.
        let sectors = &model[..model.len() / 512 * 512];
        assert_same(&qemu_read(path), sectors, &what);
        let image = Image::open(path, &files).unwrap();
        assert_same(&read_all(&image), &model, &what);
    }
    if let Some(saved) = saved {
        let view = files.direct(true).direct_block(4096).snapshot("s");
        assert_same(&read_all(&Image::open(path, &view).unwrap()), &saved, &what);
    }
}

#[test]
fn images_of_all_shapes_live_without_the_page_cache() {
    let plain = CreateOptions::new(SIZE);
    let shapes = [
        plain.clone().cluster_size(512),
        plain.clone().cluster_size(4096).refcount_bits(4),
        plain.clone(),
        plain.clone().cluster_size(16384).extended_l2(true),
        plain.clone().cluster_size(32768).extended_l2(true),
        plain.clone().cluster_size(2048).lazy_refcounts(true),
        plain
            .cluster_size(4096)
            .compression(qcow::Compression::Zstd),
    ];
    for (seed, options) in shapes.iter().enumerate() {
        let dir = directory();
        let path = dir.path().join("image");
        life(&path, options, vec![0; SIZE as usize], true, seed as u64);
    }
}

#[test]
fn backing_and_data_files_of_odd_lengths() {
    for cluster in [512, 65536] {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        let bytes = Random::new(cluster).bytes(333_333);
        fs::write(at("raw"), &bytes).unwrap();
        let over_raw = CreateOptions::new(500_001)
            .cluster_size(cluster)
            .backing("raw", "raw");
        let middle = Image::create(at("middle"), &over_raw);
        middle.unwrap().close().unwrap();
        let open = OpenOptions::new().write(true).follow_backing(true);
        let middle = Image::open(at("middle"), &open).unwrap();
        middle.write_at(&[9; 777], 300_000).unwrap();
        middle.close().unwrap();
        let mut model = bytes;
        model[300_000..300_777].fill(9);
        model.resize(SIZE as usize, 0);
        let options = CreateOptions::new(SIZE)
            .cluster_size(cluster)
            .backing("middle", "qcow2");
        life(&at("top"), &options, model, true, 11);

        for raw in [false, true] {
            let data = at(&format!("data-{raw}"));
            let options = CreateOptions::new(SIZE).cluster_size(cluster);
            let options = options.data_file(&data).raw_data_file(raw);
            let path = at(&format!("image-{raw}"));
            life(&path, &options, vec![0; SIZE as usize], false, 12);
            if raw {
                // The end of the last cluster or block may be there too.
                let image = Image::open(&path, &OpenOptions::new().follow_data_file(true));
                let disk = read_all(&image.unwrap());
                let file = fs::read(&data).unwrap();
                assert_same(&file[..disk.len()], &disk, "the data file alone");
                let end = (disk.len() as u64).next_multiple_of(cluster.max(4096));
                assert!(file.len() as u64 <= end);
                assert!(file[disk.len()..].iter().all(|b| *b == 0));
            }
        }
    }
}

#[test]
fn threads_share_blocks_of_an_image_of_small_clusters() {
    let dir = directory();
    let path = dir.path().join("image");
    let options = CreateOptions::new(4 << 20).cluster_size(512);
    Image::create(&path, &options).unwrap().close().unwrap();
    let open = OpenOptions::new()
        .write(true)
        .direct(true)
        .direct_block(4096);
    let image = Arc::new(Image::open(&path, &open).unwrap());
    let mut model = vec![0; 4 << 20];
    std::thread::scope(|scope| {
        for (thread, model) in model.chunks_mut(1 << 20).enumerate() {
            let image = Arc::clone(&image);
            scope.spawn(move || {
                let mut random = Random::new(thread as u64);
                for _ in 0..60 {
                    let (offset, length) = random.range(1 << 20, 5000);
                    let bytes = random.bytes(length as usize);
                    let range = offset as usize..(offset + length) as usize;
                    image
                        .write_at(&bytes, ((thread as u64) << 20) + offset)
                        .unwrap();
                    model[range].copy_from_slice(&bytes);
                }
            });
        }
    });
    assert_same(&read_all(&image), &model, "by threads");
    drop(image);
    assert_eq!(qemu_check(&path), Verdict::Clean);
    let raw = dir.path().join("raw");
    fs::write(&raw, &model).unwrap();
    let names = [path.to_str().unwrap(), raw.to_str().unwrap()];
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", names[0], names[1]]);
}
