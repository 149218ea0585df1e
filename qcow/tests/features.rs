//! The rest of the format, each with QEMU on the other side: compression, data files, backing chains, sizes, bitmaps, repair, conversion.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{Random, Verdict, assert_same, qemu_check, qemu_img, qemu_io, qemu_read};
use qcow::{
    Compression, Convert, CreateOptions, Error, ExtentKind, Format, Image, OpenOptions, Repair,
    Shrink, check, commit, info,
};

const SIZE: u64 = (5 << 20) + 512;

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.len() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn open(path: &Path) -> Image {
    Image::open(
        path,
        &OpenOptions::new()
            .write(true)
            .follow_backing(true)
            .follow_data_file(true),
    )
    .unwrap()
}

fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn compressed_by_us_and_read_by_qemu() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        for cluster in [4096, 65536, 2 << 20] {
            for (bits, extended) in [(16, false), (1, false), (16, true)] {
                if extended && cluster < 16384 {
                    continue;
                }
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("disk.qcow2");
                let o = CreateOptions::new(SIZE)
                    .cluster_size(cluster)
                    .compression(compression);
                let image =
                    Image::create(&path, &o.refcount_bits(bits).extended_l2(extended)).unwrap();
                let mut model = Random::new(cluster).bytes(SIZE as usize);
                let end = (SIZE / 2 / cluster) as usize * cluster as usize;
                model[..end].fill(0);
                image.write_compressed_at(&model, 0).unwrap();
                assert_same(&read_all(&image), &model, "ours");
                // Over compressed clusters: in the middle, whole, and compressed again.
                image.write_at(&[7; 3000], SIZE - 200_000).unwrap();
                model[SIZE as usize - 200_000..SIZE as usize - 197_000].fill(7);
                image.discard(SIZE - 512, 512).unwrap();
                model[SIZE as usize - 512..].fill(0);
                image.close().unwrap();
                let what = format!("{compression}, {cluster}, {bits} bits, {extended}");
                assert_eq!(qemu_check(&path), Verdict::Clean, "{what}");
                assert_same(&qemu_read(&path), &model, &what);
                let report = check(&path, Repair::Nothing).unwrap();
                assert!(
                    report.compressed_clusters > 0 || cluster == 2 << 20,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn compressed_by_qemu_and_read_by_us() {
    for kind in ["zlib", "zstd"] {
        for cluster in [512, 4096, 65536, 2 << 20] {
            let dir = tempfile::tempdir().unwrap();
            let (raw, path) = (dir.path().join("raw"), dir.path().join("disk.qcow2"));
            let mut model = Random::new(cluster).bytes(SIZE as usize);
            std::fs::write(&raw, &model).unwrap();
            let o = format!("cluster_size={cluster},compression_type={kind}");
            qemu_img(&[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &o,
                s(&raw),
                s(&path),
            ]);
            let image = open(&path);
            assert_same(&read_all(&image), &model, "read");
            image.write_at(&[9; 5000], 1_000_000).unwrap();
            model[1_000_000..1_005_000].fill(9);
            image.create_snapshot("s").unwrap();
            image.write_at(&[8; 5000], 1_002_000).unwrap();
            model[1_002_000..1_007_000].fill(8);
            image.close().unwrap();
            assert_eq!(qemu_check(&path), Verdict::Clean);
            assert_same(&qemu_read(&path), &model, "continued");
        }
    }
}

#[test]
fn data_files_both_ways() {
    for raw in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ours.qcow2");
        let image = Image::create(
            &path,
            &CreateOptions::new(SIZE)
                .data_file(dir.path().join("ours.data"))
                .raw_data_file(raw),
        )
        .unwrap();
        let mut model = vec![0; SIZE as usize];
        let mut random = Random::new(3);
        for i in 0..30 {
            let (offset, length) = random.range(SIZE, 100_000);
            let range = offset as usize..(offset + length) as usize;
            if i % 4 == 0 {
                image.write_zeroes(offset, length).unwrap();
                model[range].fill(0);
            } else {
                let bytes = random.bytes(length as usize);
                image.write_at(&bytes, offset).unwrap();
                model[range].copy_from_slice(&bytes);
            }
        }
        assert!(image.create_snapshot("s").is_err());
        assert!(image.write_compressed_at(&model[..65536], 0).is_err());
        image.close().unwrap();
        assert_eq!(qemu_check(&path), Verdict::Clean);
        assert_same(&qemu_read(&path), &model, "as QEMU reads it");
        if raw {
            assert_same(
                &std::fs::read(dir.path().join("ours.data")).unwrap(),
                &model,
                "the data file alone",
            );
        }
        let refused = Image::open(&path, &OpenOptions::new()).unwrap_err();
        assert!(
            matches!(
                refused,
                Error::NotAllowed {
                    kind: "data file",
                    ..
                }
            ),
            "{refused}"
        );
        let path = dir.path().join("relative.qcow2");
        drop(Image::create(&path, &CreateOptions::new(SIZE).data_file("relative.data")).unwrap());
        assert!(
            dir.path().join("relative.data").exists(),
            "in the image's directory"
        );

        let path = dir.path().join("theirs.qcow2");
        let o = format!(
            "data_file={},data_file_raw={}",
            s(&dir.path().join("theirs.data")),
            if raw { "on" } else { "off" }
        );
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &o, s(&path), "4M"]);
        qemu_io(
            &path,
            &["write -P 3 100k 1M".into(), "write -z 200k 100k".into()],
        );
        let image = open(&path);
        let mut model = qemu_read(&path);
        assert_same(&read_all(&image), &model, "theirs");
        image.write_at(&[4; 70_000], 150_000).unwrap();
        model[150_000..220_000].fill(4);
        image.close().unwrap();
        assert_eq!(qemu_check(&path), Verdict::Clean);
        assert_same(&qemu_read(&path), &model, "theirs, continued");
    }
}

#[test]
fn backing_chains_are_followed_only_on_demand_and_never_in_circles() {
    let dir = tempfile::tempdir().unwrap();
    let d = |n: &str| dir.path().join(n);
    std::fs::write(d("raw"), vec![1; 1 << 20]).unwrap();
    let middle = Image::create(
        d("middle"),
        &CreateOptions::new(2 << 20).backing("raw", "raw"),
    )
    .unwrap();
    middle.write_at(&[2; 1000], 500_000).unwrap();
    middle.close().unwrap();
    let top = Image::create(
        d("top"),
        &CreateOptions::new(3 << 20)
            .backing("middle", "qcow2")
            .extended_l2(true),
    )
    .unwrap();
    top.write_at(&[3; 10], 500_100).unwrap();
    top.write_zeroes(0, 65536).unwrap();
    let content = read_all(&top);
    assert_eq!(
        (
            content[0],
            content[65536],
            content[500_000],
            content[500_100],
            content[500_110]
        ),
        (0, 1, 2, 3, 2)
    );
    assert_eq!((content[(1 << 20) - 1], content[1 << 20]), (1, 0));
    let mut depths = Vec::new();
    top.map(0, 3 << 20, |e| {
        depths.push((e.depth, e.kind));
        Ok(())
    })
    .unwrap();
    assert_eq!(depths[0], (0, ExtentKind::Zero));
    assert!(depths.contains(&(2, ExtentKind::Data(65536))), "{depths:?}");
    top.close().unwrap();
    assert_same(&qemu_read(&d("top")), &content, "as QEMU reads it");

    let refused = Image::open(d("top"), &OpenOptions::new()).unwrap_err();
    assert!(
        matches!(&refused, Error::NotAllowed { name, .. } if name == "middle"),
        "{refused}"
    );
    assert_eq!(
        info(d("top")).unwrap().header.backing_name.as_deref(),
        Some(&b"middle"[..])
    );

    // middle <- loop <- middle
    std::fs::remove_file(d("middle")).unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "top",
        "-F",
        "qcow2",
        s(&d("middle")),
        "1M",
    ]);
    let refused = Image::open(d("top"), &OpenOptions::new().follow_backing(true)).unwrap_err();
    let text = format!("{refused:?}");
    assert!(text.contains("own chain"), "{text}");
}

#[test]
fn sizes_grow_and_shrink() {
    for cluster in [512, 65536] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("base"), vec![5; 2 << 20]).unwrap();
        let path = dir.path().join("disk.qcow2");
        let image = Image::create(
            &path,
            &CreateOptions::new(1 << 20)
                .cluster_size(cluster)
                .backing("base", "raw"),
        )
        .unwrap();
        image.resize((3 << 20) + 100, Shrink::IfFree).unwrap();
        let content = read_all(&image);
        assert!(content[..1 << 20].iter().all(|b| *b == 5));
        assert!(
            content[1 << 20..].iter().all(|b| *b == 0),
            "what the backing file has past the old end stays hidden"
        );
        image.write_at(&[6; 100], 3 << 20).unwrap();
        assert!(matches!(
            image.resize(3 << 20, Shrink::IfFree),
            Err(Error::Invalid(_))
        ));
        assert_eq!(image.len(), (3 << 20) + 100);
        image.resize(1000, Shrink::Discard).unwrap();
        image.resize(200_000, Shrink::IfFree).unwrap();
        let content = read_all(&image);
        assert!(content[..1000].iter().all(|b| *b == 5) && content[1000..].iter().all(|b| *b == 0));
        assert!(image.write_at(b"x", 200_000).is_err());
        image.resize(1 << 33, Shrink::IfFree).unwrap();
        image.write_at(b"end", (1 << 33) - 3).unwrap();
        image.close().unwrap();
        assert_eq!(qemu_check(&path), Verdict::Clean, "{cluster}");
        assert!(matches!(
            open(&path).resize(u64::MAX, Shrink::IfFree),
            Err(Error::Limit(_))
        ));
    }
}

#[test]
fn commit_moves_everything_down() {
    for format in ["raw", "qcow2"] {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base"), dir.path().join("top.qcow2"));
        qemu_img(&["create", "-q", "-f", format, s(&base), "2M"]);
        let top =
            Image::create(&path, &CreateOptions::new(3 << 20).backing("base", format)).unwrap();
        top.write_at(&[1; 300_000], 100_000).unwrap();
        top.write_at(&[2; 100], (3 << 20) - 100).unwrap();
        top.write_zeroes(200_000, 131_072).unwrap();
        let content = read_all(&top);
        top.close().unwrap();
        let mut steps = 0;
        commit(&path, &OpenOptions::new(), &mut |_, _| steps += 1).unwrap();
        assert!(steps > 0);
        let report = check(&path, Repair::Nothing).unwrap();
        assert_eq!(
            (report.allocated_clusters, report.leaks, report.corruptions),
            (0, 0, 0)
        );
        assert_same(&read_all(&open(&path)), &content, "through the empty image");
        let raw = dir.path().join("raw");
        qemu_img(&["convert", "-f", format, "-O", "raw", s(&base), s(&raw)]);
        assert_same(
            &std::fs::read(raw).unwrap(),
            &content,
            "in the backing file",
        );
        assert_eq!(qemu_check(&path), Verdict::Clean);
    }
}

#[test]
fn conversion_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let d = |n: &str| dir.path().join(n);
    let mut model = Random::new(8).bytes(SIZE as usize);
    model[1_000_000..3_000_000].fill(0);
    std::fs::write(d("raw"), &model).unwrap();
    for (name, compression, compress) in [
        ("plain", Compression::Zlib, false),
        ("zlib", Compression::Zlib, true),
        ("zstd", Compression::Zstd, true),
    ] {
        let mut last = 0;
        let options = CreateOptions::new(0).compression(compression);
        Convert::new(Format::Raw)
            .to_qcow2(options)
            .compress(compress)
            .threads(3)
            .run(d("raw"), d(name), &mut |done, all| {
                assert!(done > last && all == SIZE);
                last = done;
            })
            .unwrap();
        assert_eq!(last, SIZE);
        assert_eq!(qemu_check(&d(name)), Verdict::Clean);
        assert_same(&qemu_read(&d(name)), &model, name);
        let back = d("back");
        Convert::new(Format::Qcow2)
            .replace(true)
            .run(d(name), &back, &mut |_, _| ())
            .unwrap();
        assert_same(&std::fs::read(&back).unwrap(), &model, "and back");
    }
    assert!(
        std::fs::metadata(d("zstd")).unwrap().len() < std::fs::metadata(d("plain")).unwrap().len()
    );
    let exists = Convert::new(Format::Qcow2).run(d("plain"), d("back"), &mut |_, _| ());
    assert!(
        matches!(exists, Err(Error::Open { .. })),
        "an existing file is not replaced"
    );
}

#[test]
fn bitmaps_of_qemu_are_listed_counted_and_called_stale_once_we_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "8M"]);
    qemu_img(&["bitmap", "--add", "-g", "64k", s(&path), "backup"]);
    qemu_io(&path, &["write -P 1 1M 1M".into()]);
    let image = Image::open(&path, &OpenOptions::new()).unwrap();
    let bitmaps = image.bitmaps().unwrap();
    assert_eq!(
        (
            bitmaps.len(),
            bitmaps[0].name.as_str(),
            bitmaps[0].granularity
        ),
        (1, "backup", 65536)
    );
    assert!(bitmaps[0].auto && !bitmaps[0].inconsistent);
    drop(image);
    let report = check(&path, Repair::Nothing).unwrap();
    assert_eq!(
        (report.corruptions, report.leaks),
        (0, 0),
        "{:?}",
        report.findings
    );
    // Reading and closing a writable image changes nothing.
    let before = std::fs::read(&path).unwrap();
    drop(open(&path));
    assert!(std::fs::read(&path).unwrap() == before);
    let image = open(&path);
    image.write_at(&[2; 512], 0).unwrap();
    image.close().unwrap();
    let bitmaps = Image::open(&path, &OpenOptions::new())
        .unwrap()
        .bitmaps()
        .unwrap();
    assert!(
        bitmaps[0].inconsistent,
        "nobody may use the bitmap for an incremental backup now"
    );
    let text = qemu_img(&["info", "--output=json", s(&path)]);
    assert!(
        !text.contains("\"backup\"") || text.contains("in-use"),
        "{text}"
    );
    assert!(matches!(qemu_check(&path), Verdict::Clean | Verdict::Leaks));
}

#[test]
fn leaks_and_wrong_refcounts_are_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(SIZE)).unwrap();
    image.write_at(&Random::new(1).bytes(1_000_000), 0).unwrap();
    let content = read_all(&image);
    let table = image.header().refcount_table_offset as usize;
    image.close().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    // A leak, behind all others.
    bytes.resize(61 * 65536, 0);
    bytes[block + 2 * 60..block + 2 * 60 + 2].copy_from_slice(&1u16.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(qemu_check(&path), Verdict::Leaks);
    assert_eq!(check(&path, Repair::Nothing).unwrap().leaks, 1);
    assert_eq!(check(&path, Repair::Leaks).unwrap().leaks_fixed, 1);
    assert_eq!(qemu_check(&path), Verdict::Clean);
    // All counts lost.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[block..block + 65536].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let report = check(&path, Repair::Leaks).unwrap();
    assert!(
        report.corruptions > 0 && report.corruptions_fixed == 0,
        "leaks alone do not cover this"
    );
    assert!(check(&path, Repair::All).unwrap().corruptions_fixed > 0);
    let report = check(&path, Repair::Nothing).unwrap();
    assert_eq!(
        (report.corruptions, report.leaks),
        (0, 0),
        "{:?}",
        report.findings
    );
    assert_eq!(qemu_check(&path), Verdict::Clean);
    assert_same(&qemu_read(&path), &content, "after repair");
}

#[test]
fn a_dirty_image_of_qemu_is_repaired_as_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "lazy_refcounts=on",
        s(&path),
        "8M",
    ]);
    // Without closing it: abort.
    let mut args = vec![
        "-f",
        "qcow2",
        "-c",
        "write -P 7 0 3M",
        "-c",
        "flush",
        "-c",
        "abort",
    ];
    args.push(s(&path));
    std::process::Command::new("qemu-io")
        .args(&args)
        .output()
        .unwrap();
    assert!(check(&path, Repair::Nothing).unwrap().dirty);
    assert!(
        Image::open(&path, &OpenOptions::new()).is_ok(),
        "reading needs no refcounts"
    );
    assert!(
        info(&path).unwrap().header.dirty(),
        "reading repairs nothing"
    );
    let image = open(&path);
    assert!(read_all(&image)[..3 << 20].iter().all(|b| *b == 7));
    image.write_at(&[8; 100_000], 2 << 20).unwrap();
    image.close().unwrap();
    assert!(!info(&path).unwrap().header.dirty());
    assert_eq!(qemu_check(&path), Verdict::Clean);
}

#[test]
fn info_and_map_agree_with_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(SIZE).cluster_size(4096)).unwrap();
    image.write_at(&[1; 10_000], 1_000_000).unwrap();
    image.create_snapshot("morning").unwrap();
    let mut data = Vec::new();
    image
        .map(0, SIZE, |e| {
            if let ExtentKind::Data(at) = e.kind {
                data.push((e.start, e.length, at));
            }
            Ok(())
        })
        .unwrap();
    image.close().unwrap();
    let summary = info(&path).unwrap();
    assert_eq!(
        (
            summary.cluster_size(),
            summary.refcount_bits(),
            summary.snapshots.len()
        ),
        (4096, 16, 1)
    );
    let text = qemu_img(&["info", "--output=json", s(&path)]);
    assert!(
        text.contains("\"name\": \"morning\"") && text.contains("\"cluster-size\": 4096"),
        "{text}"
    );
    let theirs = qemu_img(&["map", "--output=json", "-f", "qcow2", s(&path)]);
    for (start, length, at) in data {
        let text = format!("\"start\": {start}, \"length\": {length}, \"depth\": 0");
        assert!(
            theirs.contains(&text) && theirs.contains(&format!("\"offset\": {at}")),
            "{text} is not in {theirs}"
        );
    }
}
