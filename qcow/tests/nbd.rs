//! A third reader: `qemu-nbd` serves our images over a socket, and what comes through is compared; then it writes, and we read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Random, Verdict, assert_same, discard, qemu_check, qemu_img, write, write_zeroes};
use qcow::{Compression, CreateOptions, Image, OpenOptions};

/// A server for one client.
struct Server {
    socket: PathBuf,
    pid: u32,
}

impl Server {
    /// Serves `image`, with more of qemu-nbd's options. It listens when this returns.
    fn start(dir: &Path, image: &Path, options: &[&str]) -> Server {
        let (socket, pid) = (dir.join("nbd"), dir.join("pid"));
        let started = Command::new("qemu-nbd")
            .args(["--fork", "--format=qcow2"])
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--pid-file={}", pid.display()))
            .args(options)
            .arg(image)
            // A relative name of a data file counts from here.
            .current_dir(dir)
            .output();
        let output = match started {
            Ok(output) => output,
            Err(e) => panic!("qemu-nbd does not start ({e}): package qemu-utils has it"),
        };
        assert!(output.status.success(), "qemu-nbd {options:?}: {output:?}");
        let pid = std::fs::read_to_string(pid).unwrap();
        Server {
            socket,
            pid: pid.trim().parse().unwrap(),
        }
    }

    fn address(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// The disk as the server gives it.
    fn read(&self, dir: &Path) -> Vec<u8> {
        let raw = dir.join("as-served");
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &self.address(),
            raw.to_str().unwrap(),
        ]);
        std::fs::read(raw).unwrap()
    }

    fn is_running(&self) -> bool {
        // A process that ended may be there until its parent has seen that; until its last thread has gone, the image is locked.
        let process = PathBuf::from(format!("/proc/{}", self.pid));
        let threads = std::fs::read_dir(process.join("task")).map_or(0, Iterator::count);
        std::fs::read_to_string(process.join("stat"))
            .is_ok_and(|stat| threads > 1 || !stat.contains(") Z"))
    }

    /// Waits for the end that comes when its client has gone.
    fn ended(&self) {
        while self.is_running() {
            std::thread::yield_now();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = Command::new("kill").arg(self.pid.to_string()).status();
        }
        self.ended();
    }
}

/// A disk whose last cluster is not whole.
const SIZE: u64 = (2 << 20) + 1536;

/// What is done with an image besides plain writes.
#[derive(Clone, Copy, Debug, Default)]
struct Extras {
    compressed: bool,
    snapshot: bool,
    backing: Option<&'static str>,
    data_file: bool,
}

fn cases() -> Vec<(CreateOptions, Extras)> {
    let o = CreateOptions::new(SIZE);
    let none = Extras::default();
    let mut all = Vec::new();
    for cluster in [512, 4096, 65536, 2 << 20] {
        let o = o.clone().cluster_size(cluster);
        all.push((o.clone(), none));
        all.push((o.clone().version(2), none));
        all.push((
            o.clone(),
            Extras {
                snapshot: true,
                ..none
            },
        ));
        for compression in [Compression::Zlib, Compression::Zstd] {
            let compressed = Extras {
                compressed: true,
                snapshot: true,
                ..none
            };
            all.push((o.clone().compression(compression), compressed));
        }
        for format in ["raw", "qcow2"] {
            let backing = Extras {
                backing: Some(format),
                ..none
            };
            all.push((o.clone().backing("base", format), backing));
        }
    }
    for bits in [1, 2, 4, 8, 32, 64] {
        all.push((o.clone().cluster_size(4096).refcount_bits(bits), none));
    }
    all.push((o.clone().lazy_refcounts(true), none));
    all.push((o.clone().extended_l2(true), none));
    let everything = Extras {
        compressed: true,
        snapshot: true,
        backing: Some("qcow2"),
        ..none
    };
    let extended = o.clone().extended_l2(true).cluster_size(16384);
    all.push((extended.backing("base", "qcow2"), everything));
    for raw in [false, true] {
        let data = Extras {
            data_file: true,
            ..none
        };
        all.push((o.clone().data_file("data").raw_data_file(raw), data));
    }
    all
}

#[test]
fn what_is_served_is_what_was_written_and_the_other_way_round() {
    for (i, (options, extras)) in cases().into_iter().enumerate() {
        let what = format!("{options:?}, {extras:?}");
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        let mut random = Random::new(i as u64 + 77);
        let mut model = vec![0; SIZE as usize];
        if let Some(format) = extras.backing {
            let bytes = random.bytes(1 << 20);
            model[..bytes.len()].copy_from_slice(&bytes);
            std::fs::write(d.join("raw"), bytes).unwrap();
            let (raw, base) = (d.join("raw"), d.join("base"));
            qemu_img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                format,
                raw.to_str().unwrap(),
                base.to_str().unwrap(),
            ]);
        }
        let path = d.join("disk");
        let image = Image::create(&path, &options).unwrap();
        let cluster = image.cluster_size();
        let mut at_snapshot = None;
        for round in 0..30 {
            let (offset, length) = random.range(SIZE, 100_000);
            match random.below(7) {
                0 => discard(&image, &mut model, (offset, length)),
                1 => write_zeroes(&image, &mut model, (offset, length)),
                2 if extras.compressed && offset / cluster < SIZE / cluster => {
                    let first = offset / cluster * cluster;
                    let bytes = random.bytes(cluster as usize);
                    image.write_compressed_at(&bytes, first).unwrap();
                    model[first as usize..(first + cluster) as usize].copy_from_slice(&bytes);
                }
                _ => write(&image, &mut model, (offset, length), &mut random),
            }
            if extras.snapshot && round == 15 {
                image.create_snapshot("kept").unwrap();
                at_snapshot = Some(model.clone());
            }
        }
        image.close().unwrap();
        let served = Server::start(d, &path, &["--read-only"]).read(d);
        // A sector at a time is served.
        assert_same(&served[..SIZE as usize], &model, &what);
        if let Some(then) = &at_snapshot {
            let server = Server::start(
                d,
                &path,
                &["--read-only", "--load-snapshot=snapshot.name=kept"],
            );
            assert_same(
                &server.read(d)[..SIZE as usize],
                then,
                &format!("{what}, snapshot"),
            );
        }
        let server = Server::start(d, &path, &["--discard=unmap"]);
        let mut args = vec!["-f".to_owned(), "raw".to_owned()];
        for _ in 0..8 {
            let (offset, length) = (
                random.below(SIZE / 512 - 200) * 512,
                (1 + random.below(200)) * 512,
            );
            let byte = random.below(255) as u8 + 1;
            args.extend([
                "-c".to_owned(),
                format!("write -P {byte} {offset} {length}"),
            ]);
            model[offset as usize..(offset + length) as usize].fill(byte);
        }
        args.push(server.address());
        let output = Command::new("qemu-io").args(&args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && !text.contains("failed"),
            "{what}: {output:?}"
        );
        server.ended();
        let open = OpenOptions::new()
            .follow_backing(true)
            .follow_data_file(true);
        let image = Image::open(&path, &open).unwrap();
        let mut ours = vec![0xff; SIZE as usize];
        image.read_at(&mut ours, 0).unwrap();
        assert_same(&ours, &model, &format!("{what}, after theirs"));
        assert_eq!(image.check().unwrap().corruptions, 0, "{what}");
        drop(image);
        if !extras.data_file {
            assert_eq!(qemu_check(&path), Verdict::Clean, "{what}");
        }
    }
}
