//! Ways in which others have lost data, or opened what they should not have. One test each. Those with several threads are in `model.rs`
//! (`several_queues_allocate_at_once`, `discard_races_with_flush`), those with a kill at any write in `crash.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Random, Verdict, assert_same, qemu_check, qemu_img, qemu_read};
use qcow::{CreateOptions, Error, Image, MemStorage, OpenOptions, Repair, check, check_storage};

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.len() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_kill_with_a_compressed_image_open_leaves_it_openable() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("disk.qcow2"));
    let model = Random::new(1).bytes(2 << 20);
    std::fs::write(&raw, &model).unwrap();
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        raw.to_str().unwrap(),
        path.to_str().unwrap(),
    ]);
    let image = Image::open(&path, &OpenOptions::new().write(true)).unwrap();
    image.write_at(&[1; 100_000], 500_000).unwrap();
    image.flush().unwrap();
    image.write_at(&[2; 100_000], 1_500_000).unwrap();
    // As a kill would: nothing of it is closed.
    std::mem::forget(image);
    assert!(matches!(qemu_check(&path), Verdict::Clean | Verdict::Leaks));
    let image = Image::open(&path, &OpenOptions::new().write(true)).unwrap();
    let content = read_all(&image);
    assert_same(
        &content[..500_000],
        &model[..500_000],
        "before what was written",
    );
    assert!(
        content[500_000..600_000].iter().all(|b| *b == 1),
        "what was flushed is there"
    );
    image.close().unwrap();
}

#[test]
fn a_write_never_goes_through_an_internal_snapshot_even_if_the_flags_lie() {
    let memory = Arc::new(MemStorage::default());
    let image = Image::create_storage(
        Box::new(Arc::clone(&memory)),
        &CreateOptions::new(1 << 20).cluster_size(4096),
    )
    .unwrap();
    image.write_at(&[1; 200_000], 0).unwrap();
    image.create_snapshot("s").unwrap();
    let l1 = image.header().l1_offset as usize;
    image.close().unwrap();
    // Each entry of the active L2 table says that it is the only one with its cluster. It is not.
    let mut bytes = memory.to_vec();
    let l2 = (be64(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let mut changed = 0;
    for at in (l2..l2 + 4096)
        .step_by(8)
        .filter(|at| bytes[at + 1..at + 8].iter().any(|b| *b != 0))
        .collect::<Vec<_>>()
    {
        bytes[at] |= 0x80;
        changed += 1;
    }
    assert!(changed > 40);
    let memory = Arc::new(MemStorage::new(bytes));
    let image = Image::open_storage(
        Box::new(Arc::clone(&memory)),
        &OpenOptions::new().write(true),
    )
    .unwrap();
    image.write_at(&[2; 200_000], 0).unwrap();
    image.close().unwrap();
    let view = Image::open_storage(Box::new(memory), &OpenOptions::new().snapshot("s")).unwrap();
    assert!(read_all(&view)[..200_000].iter().all(|b| *b == 1));
}

#[test]
fn a_rebuild_of_refcounts_counts_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(4 << 20).cluster_size(4096)).unwrap();
    image.write_at(&[1; 1_000_000], 0).unwrap();
    image.create_snapshot("s").unwrap();
    image.write_at(&[2; 500_000], 0).unwrap();
    let table = image.header().refcount_table_offset as usize;
    image.close().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    for i in 0..512 {
        let block = be64(&bytes, table + i * 8) as usize;
        if block != 0 {
            bytes[block..block + 4096].fill(0);
        }
    }
    std::fs::write(&path, bytes).unwrap();
    let report = check(&path, Repair::All).unwrap();
    assert!(report.corruptions_fixed > 0 && report.corruptions == 0);
    assert_eq!(qemu_check(&path), Verdict::Clean);
    // Writes after the repair go to free clusters, not to the snapshot's.
    let image = Image::open(&path, &OpenOptions::new().write(true)).unwrap();
    image.write_at(&[3; 2_000_000], 0).unwrap();
    image.close().unwrap();
    let view = Image::open(&path, &OpenOptions::new().snapshot("s")).unwrap();
    let content = read_all(&view);
    assert!(
        content[..1_000_000].iter().all(|b| *b == 1)
            && content[1_000_000..].iter().all(|b| *b == 0)
    );
    assert_eq!(qemu_check(&path), Verdict::Clean);
}

#[test]
fn an_encrypted_image_never_opens_as_plain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("luks.qcow2");
    let o = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    qemu_img(&[
        "create",
        "-q",
        "--object",
        "secret,id=k,data=abc",
        "-f",
        "qcow2",
        "-o",
        o,
        path.to_str().unwrap(),
        "1M",
    ]);
    for write in [false, true] {
        let e = Image::open(&path, &OpenOptions::new().write(write)).unwrap_err();
        assert!(
            matches!(&e, Error::Unsupported(why) if why.contains("LUKS")),
            "{e}"
        );
    }
    let e = check(&path, Repair::All).unwrap_err();
    assert!(
        matches!(e, Error::Unsupported(_)),
        "nor is it repaired: {e}"
    );
    // AES, of old.
    let memory = Arc::new(MemStorage::default());
    drop(
        Image::create_storage(Box::new(Arc::clone(&memory)), &CreateOptions::new(1 << 20)).unwrap(),
    );
    let mut bytes = memory.to_vec();
    bytes[35] = 1;
    let e = Image::open_storage(Box::new(MemStorage::new(bytes)), &OpenOptions::new()).unwrap_err();
    assert!(
        matches!(&e, Error::Unsupported(why) if why.contains("AES")),
        "{e}"
    );
}

#[test]
fn a_header_that_a_guest_writes_to_a_raw_disk_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let d = |n: &str| dir.path().join(n);
    std::fs::write(d("secret"), vec![0x53; 65536]).unwrap();
    // What the guest wrote to its raw disk: an image whose backing file is the host's secret.
    drop(
        Image::create(
            d("disk"),
            &CreateOptions::new(65536).backing("secret", "raw"),
        )
        .unwrap(),
    );
    let written = std::fs::read(d("disk")).unwrap();
    let size = written.len() as u64;
    // The overlay knows that its backing file is raw, and that is that.
    let overlay = Image::create(
        d("overlay"),
        &CreateOptions::new(size).backing("disk", "raw"),
    )
    .unwrap();
    assert_same(&read_all(&overlay), &written, "byte for byte");
    drop(overlay);
    // An overlay that does not know asks, rather than guess.
    qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        d("old").to_str().unwrap(),
        "64k",
    ]);
    let mut bytes = std::fs::read(d("old")).unwrap();
    let name = b"disk";
    bytes[8..16].copy_from_slice(&1024u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    bytes[1024..1024 + name.len()].copy_from_slice(name);
    std::fs::write(d("old"), bytes).unwrap();
    let follow = OpenOptions::new().follow_backing(true);
    let e = Image::open(d("old"), &follow).unwrap_err();
    assert!(
        matches!(&e, Error::Chain { source, .. } if matches!(**source, Error::Unsupported(_))),
        "{e:?}"
    );
    let image = Image::open(d("old"), &follow.probe_backing(true)).unwrap();
    assert_eq!(read_all(&image)[0], 0x53, "who insists gets it");
}

#[test]
fn a_relative_backing_path_counts_from_the_images_directory() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(inner.join("base"), vec![1; 65536]).unwrap();
    // One of the same name where the process is would be the wrong one.
    std::fs::write(dir.path().join("base"), vec![2; 65536]).unwrap();
    drop(
        Image::create(
            inner.join("disk"),
            &CreateOptions::new(65536).backing("base", "raw"),
        )
        .unwrap(),
    );
    let old = std::env::current_dir().unwrap();
    std::env::set_current_dir(dir.path()).unwrap();
    let opened = Image::open(
        Path::new("inner/disk"),
        &OpenOptions::new().follow_backing(true),
    );
    std::env::set_current_dir(old).unwrap();
    assert_eq!(read_all(&opened.unwrap())[0], 1);
    let image = Image::open(inner.join("disk"), &OpenOptions::new().follow_backing(true)).unwrap();
    assert_eq!(read_all(&image)[0], 1);
    assert_same(
        &qemu_read(&inner.join("disk")),
        &vec![1; 65536],
        "QEMU agrees",
    );
}

#[test]
fn an_overlap_with_metadata_sets_the_corrupt_bit_and_stops_writes() {
    let memory = Arc::new(MemStorage::default());
    let image = Image::create_storage(
        Box::new(Arc::clone(&memory)),
        &CreateOptions::new(1 << 20).cluster_size(4096),
    )
    .unwrap();
    image.write_at(&[1; 8192], 0).unwrap();
    let header = image.header();
    image.close().unwrap();
    let mut bytes = memory.to_vec();
    let l2 = (be64(&bytes, header.l1_offset as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // The first guest cluster is where the L1 table is.
    bytes[l2..l2 + 8].copy_from_slice(&(header.l1_offset | 1 << 63).to_be_bytes());
    let memory = Arc::new(MemStorage::new(bytes.clone()));
    let image = Image::open_storage(
        Box::new(Arc::clone(&memory)),
        &OpenOptions::new().write(true),
    )
    .unwrap();
    let e = image.write_at(&[0xff; 512], 0).unwrap_err();
    assert!(matches!(e, Error::Corrupt(_)), "{e}");
    let e = image.write_at(&[0xff; 512], 8192).unwrap_err();
    assert!(
        matches!(e, Error::MarkedCorrupt),
        "no write after that: {e}"
    );
    drop(image);
    assert_eq!(
        memory.to_vec()[header.l1_offset as usize..][..4096],
        bytes[header.l1_offset as usize..][..4096]
    );
    let e = Image::open_storage(
        Box::new(Arc::clone(&memory)),
        &OpenOptions::new().write(true),
    )
    .unwrap_err();
    assert!(matches!(e, Error::MarkedCorrupt), "{e}");
    assert!(
        Image::open_storage(Box::new(Arc::clone(&memory)), &OpenOptions::new()).is_ok(),
        "it can be read"
    );
    assert!(
        check_storage(Box::new(memory), Repair::Nothing)
            .unwrap()
            .marked_corrupt
    );
}

#[test]
fn a_free_cluster_that_holds_a_table_is_not_given_out() {
    let memory = Arc::new(MemStorage::default());
    let image = Image::create_storage(
        Box::new(Arc::clone(&memory)),
        &CreateOptions::new(1 << 20).cluster_size(4096),
    )
    .unwrap();
    image.write_at(&[1; 8192], 0).unwrap();
    let header = image.header();
    image.close().unwrap();
    let mut bytes = memory.to_vec();
    let block = be64(&bytes, header.refcount_table_offset as usize) as usize;
    let cluster = header.l1_offset as usize / 4096;
    bytes[block + cluster * 2..block + cluster * 2 + 2].fill(0);
    let image = Image::open_storage(
        Box::new(MemStorage::new(bytes)),
        &OpenOptions::new().write(true),
    )
    .unwrap();
    let e = image.write_at(&[2; 4096], 65536).unwrap_err();
    assert!(matches!(e, Error::Corrupt(_)), "{e}");
}
