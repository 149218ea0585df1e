//! Storage other than a file system with everything: loop devices with blocks of 512 and of 4096 bytes, and a file system
//! that knows neither holes nor zeroing. They need root.

#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use block_util::{DiskError, DiskFile, ImageType, LockMode, Operation};
use common::{BUFFERED, DIRECT, ENGINES, Memory, image, open, pattern, queue, read, write};
use tempfile::NamedTempFile;

struct Loop {
    path: PathBuf,
    file: NamedTempFile,
}

impl Loop {
    fn new(size: u64, block: u32) -> Loop {
        let file = image(size);
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block.to_string()])
            .arg(file.path())
            .output()
            .expect("this test runs losetup, of util-linux");
        assert!(
            output.status.success(),
            "this test attaches a loop device, which needs root: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let path = String::from_utf8(output.stdout).unwrap();
        Loop {
            path: Path::new(path.trim()).to_owned(),
            file,
        }
    }

    fn losetup(&self, option: &str) {
        let status = Command::new("losetup").arg(option).arg(&self.path).status();
        assert!(status.unwrap().success(), "losetup {option}");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

#[test]
fn a_device_is_read_written_zeroed_and_discarded() {
    const SIZE: u64 = 4 << 20;
    for block in [512, 4096] {
        let device = Loop::new(SIZE, block);
        for options in [BUFFERED, DIRECT] {
            let disk = open(&device.path, &options);
            let geometry = disk.geometry();
            assert_eq!((disk.size(), geometry.logical_block_size), (SIZE, block));
            assert!(geometry.physical_block_size >= block);
            assert!(geometry.discard_granularity > 0, "{geometry:?}");
            for engine in ENGINES {
                let mut io = queue(&disk, engine, 8);
                let mut expected = pattern(SIZE as usize, u64::from(block));
                let mut memory = Memory::of(&expected, 24);
                let buffers = memory.pieces(100_000);
                io.run(Operation::Write {
                    offset: 0,
                    buffers: &buffers,
                    durable: true,
                })
                .unwrap();
                io.run(Operation::Discard {
                    offset: 1 << 20,
                    len: 1 << 20,
                })
                .unwrap();
                expected[1 << 20..2 << 20].fill(0);
                for (offset, may_unmap) in [(2 << 20, false), (3 << 20, true)] {
                    io.run(Operation::WriteZeroes {
                        offset,
                        len: 65536,
                        may_unmap,
                    })
                    .unwrap();
                    expected[offset as usize..offset as usize + 65536].fill(0);
                }
                io.run(Operation::Flush).unwrap();
                assert!(read(&mut *io, 0, SIZE as usize).unwrap() == expected);
                let used = device.file.as_file().metadata().unwrap().blocks() * 512;
                assert!(
                    used <= SIZE - (1 << 20),
                    "{used} bytes used after a discard"
                );
            }
        }
        let disk = open(&device.path, &DIRECT);
        let mut io = queue(&disk, ENGINES[0], 8);
        let error = write(&mut *io, u64::from(block) / 2, &vec![1; block as usize]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn a_device_follows_the_host_in_size_and_takes_locks() {
    let device = Loop::new(1 << 20, 512);
    let disk = open(&device.path, &BUFFERED);
    let error = disk.resize(2 << 20).unwrap_err();
    assert!(
        matches!(
            error,
            DiskError::DeviceSize {
                actual: 0x10_0000,
                ..
            }
        ),
        "{error}"
    );
    device.file.as_file().set_len(2 << 20).unwrap();
    device.losetup("--set-capacity");
    disk.resize(2 << 20).unwrap();
    assert_eq!(disk.size(), 2 << 20);
    for engine in ENGINES {
        let mut io = queue(&disk, engine, 8);
        write(&mut *io, (2 << 20) - 512, &[3; 512]).unwrap();
        io.run(Operation::Flush).unwrap();
    }

    disk.lock(LockMode::Exclusive).unwrap();
    let other = open(&device.path, &BUFFERED);
    assert!(matches!(
        other.lock(LockMode::Exclusive),
        Err(DiskError::InUse { .. })
    ));
}

#[test]
fn the_format_on_a_device_is_found() {
    let device = Loop::new(1 << 20, 512);
    assert_eq!(ImageType::of_path(&device.path).unwrap(), ImageType::Raw);
    let disk = open(&device.path, &BUFFERED);
    let mut io = queue(&disk, ENGINES[1], 8);
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(b"conectix");
    write(&mut *io, (1 << 20) - 512, &sector).unwrap();
    assert_eq!(ImageType::of_path(&device.path).unwrap(), ImageType::Vhd);
}

#[test]
fn a_file_system_without_holes_tells_and_is_zeroed_all_the_same() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().to_owned();
    let alone = std::thread::spawn(move || {
        // SAFETY: no pointers are passed; only this thread gets mounts of its own.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        let error = std::io::Error::last_os_error();
        assert_eq!(
            result, 0,
            "this test mounts a ramfs, which needs root: {error}"
        );
        for args in [&["--make-rprivate", "/"][..], &["-t", "ramfs", "ramfs"]] {
            let mut command = Command::new("mount");
            command.args(args);
            if args.len() > 2 {
                command.arg(&path);
            }
            assert!(command.status().unwrap().success(), "mount {args:?}");
        }
        let image = path.join("image");
        std::fs::write(&image, pattern(1 << 20, 1)).unwrap();
        let disk = open(&image, &BUFFERED);
        assert_eq!(disk.geometry().discard_granularity, 0);
        for engine in ENGINES {
            let mut io = queue(&disk, engine, 4);
            let discard = Operation::Discard {
                offset: 0,
                len: 4096,
            };
            let error = io.run(discard).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            for may_unmap in [true, false] {
                let mut expected = pattern(1 << 20, 2);
                write(&mut *io, 0, &expected).unwrap();
                io.run(Operation::WriteZeroes {
                    offset: 512,
                    len: 777_777,
                    may_unmap,
                })
                .unwrap();
                expected[512..512 + 777_777].fill(0);
                assert!(read(&mut *io, 0, 1 << 20).unwrap() == expected);
            }
        }
    });
    if let Err(panic) = alone.join() {
        std::panic::resume_unwind(panic);
    }
}
