//! The device with files, alone and behind PCI.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use block_util::{Engine, RawDisk, RawOptions};
use tempfile::NamedTempFile;
use vm_virtio::VirtioDevice;
use vm_virtio::testing::conformance::Subject;
use vm_virtio::testing::{Request, TestMemory};

use super::super::{Block, BlockConfig};
use super::{IOERR, OK, config, header, read, write};
use crate::transport::pci::tests::driver::Machine;

/// From the bus to the file and back, as a driver goes.
#[test]
fn a_driver_behind_pci_reads_and_writes_a_file() {
    let image = image();
    let mut machine = Machine::new(raw(image.path(), Engine::Auto));
    assert_eq!(machine.read_config(0), [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(machine.read_config(8), [1, 0, 0x80, 1]);
    machine.start();
    assert_eq!(machine.read::<8>(4, 0), 256_u64.to_le_bytes());
    for n in [0, 100, 255_u32] {
        let answer = machine.ask(0, &header(0, u64::from(n)), 513);
        assert_eq!(answer, sector(n).chain([OK]).collect::<Vec<_>>());
        let data = Writes::data(n);
        let request = [&header(1, u64::from(n)), &data[..]].concat();
        assert_eq!(machine.ask(0, &request, 1), [OK]);
        assert_eq!(machine.ask(0, &header(4, 0), 1), [OK]);
        let mut found = [0; 512];
        let offset = u64::from(n) * 512;
        image.as_file().read_exact_at(&mut found, offset).unwrap();
        assert_eq!(found[..], data);
    }
    // Reset, and once more, with a driver that chooses write-through.
    machine.set::<1>(0x14, 0);
    machine.start();
    machine.write(4, 32, &[0]);
    let request = [&header(1, 7), &[1; 512][..]].concat();
    assert_eq!(machine.ask(0, &request, 1), [OK]);
    assert_eq!(machine.ask(0, &header(1, 256), 1), [IOERR]);
}

fn raw(path: &Path, engine: Engine) -> Box<dyn VirtioDevice<TestMemory>> {
    let disk = RawDisk::open(path, &RawOptions::default()).unwrap();
    Box::new(Block::new(BlockConfig { engine, ..config() }, Arc::new(disk)).unwrap())
}

/// A file of 256 sectors, in which no two are alike.
fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..256).flat_map(sector).collect();
    fs::write(image.path(), bytes).unwrap();
    image
}

fn sector(n: u32) -> impl Iterator<Item = u8> {
    (0..128).flat_map(move |word: u32| (n << 16 | word).to_le_bytes())
}

/// Reads of a real file.
struct Reads(NamedTempFile, Engine);

impl Subject for Reads {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        raw(self.0.path(), self.1)
    }

    fn request(&self, n: u32) -> Request {
        read(u64::from(n % 250), 512 * (1 + n % 3))
    }

    fn check(&self, n: u32, answer: &[u8]) {
        let mut expected: Vec<u8> = (0..=n % 3)
            .flat_map(|more| sector(n % 250 + more))
            .collect();
        expected.push(OK);
        assert!(answer == expected, "request {n}");
    }
}

vm_virtio::conformance!(reads_by_uring, Reads(image(), Engine::Auto));
vm_virtio::conformance!(reads_by_calls, Reads(image(), Engine::Sync));

/// Writes to a real file, which has them when they are answered.
struct Writes(NamedTempFile);

impl Writes {
    fn data(n: u32) -> Vec<u8> {
        sector(n ^ 0xff00).collect()
    }
}

impl Subject for Writes {
    fn device(&self) -> Box<dyn VirtioDevice<TestMemory>> {
        raw(self.0.path(), Engine::Auto)
    }

    fn request(&self, n: u32) -> Request {
        write(u64::from(n % 256), &Self::data(n % 256))
    }

    fn check(&self, n: u32, answer: &[u8]) {
        assert_eq!(answer, [OK]);
        let mut found = [0; 512];
        let offset = u64::from(n % 256) * 512;
        self.0.as_file().read_exact_at(&mut found, offset).unwrap();
        assert!(found[..] == Self::data(n % 256), "request {n}");
    }
}

vm_virtio::conformance!(writes_by_uring, Writes(image()));
