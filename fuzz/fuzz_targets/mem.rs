//! The memory device and a driver that offers it anything, through `virtio_devices::Mem`.
//!
//! Holds to what `fuzz::device` says; never is more plugged than was ever wanted; what is plugged is said to be so, and what is unplugged
//! is zeros.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use fuzz::device::{Case, Subject, run};
use libfuzzer_sys::fuzz_target;
use virtio_devices::{MEM_BLOCK, Mem, MemConfig, MemControl};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_virtio::VirtioDevice;
use vm_virtio::testing::{Guest, Request, TestMemory};

const START: u64 = 4 << 30;
const BLOCKS: u64 = 32;
const ANSWER: u32 = 10;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Ask {
    Plug(u8, u8),
    Unplug(u8, u8),
    UnplugAll,
    State(u8, u8),
    Any(u16, u64, u16),
}

struct Host {
    /// The device's region; not where the queues are.
    ram: Arc<GuestMemoryMmap>,
    control: Option<MemControl>,
    /// The most bytes that were ever wanted.
    wanted: u64,
}

fn bytes(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Address of a block; some are past the end.
fn at(block: u8) -> u64 {
    START + u64::from(block % 40) * MEM_BLOCK
}

fn request(ask: Ask) -> Request {
    let readable = match ask {
        Ask::Plug(block, count) => bytes(0, at(block), (count % 8).into()),
        Ask::Unplug(block, count) => bytes(1, at(block), (count % 8).into()),
        Ask::UnplugAll => bytes(2, 0, 0),
        Ask::State(block, count) => bytes(3, at(block), (count % 8).into()),
        Ask::Any(kind, address, count) => bytes(kind, address, count),
    };
    Request {
        readable,
        writable: ANSWER,
    }
}

impl Host {
    fn plugged(&self) -> u64 {
        self.control.as_ref().map_or(0, MemControl::plugged)
    }
}

impl Subject for Host {
    type Ask = Ask;
    /// So many blocks are wanted.
    type Event = u8;

    fn device(&mut self) -> Box<dyn VirtioDevice<TestMemory>> {
        let config = MemConfig {
            id: "mem".into(),
            start: START,
            size: BLOCKS * MEM_BLOCK,
            requested: 8 * MEM_BLOCK,
        };
        let mem = Mem::new(config, self.ram.clone(), Box::new(())).expect("a device");
        self.control = Some(mem.control());
        Box::new(mem)
    }

    fn request(&self, ask: &Ask) -> (u16, Request) {
        if let Ask::Unplug(block, _) = ask {
            // Fails past the end.
            let _ = self.ram.write_obj(1u8, GuestAddress(at(*block)));
        }
        (0, request(*ask))
    }

    fn check(&mut self, ask: &Ask, answer: &[u8]) {
        let [kind, 0, 0, 0, 0, 0, 0, 0, state, 0] = *answer else {
            panic!("{answer:?} is no answer");
        };
        assert!(matches!(kind, 0 | 1 | 3));
        match (*ask, kind) {
            (Ask::Plug(_, count), 0) => assert!(self.plugged() >= u64::from(count % 8) * MEM_BLOCK),
            (Ask::Unplug(block, _), 0) => {
                let byte: u8 = self.ram.read_obj(GuestAddress(at(block))).expect("a block");
                assert_eq!(byte, 0);
            }
            (Ask::UnplugAll, 0) => assert_eq!(self.plugged(), 0),
            (Ask::UnplugAll, _) => panic!("all blocks can be unplugged, always"),
            (Ask::State(..), 0) => {
                assert!(state <= 2);
                match (state, self.plugged() / MEM_BLOCK) {
                    (0 | 2, plugged) => assert!(plugged > 0),
                    (_, plugged) => assert!(plugged < BLOCKS),
                }
            }
            _ => {}
        }
    }

    fn event(&mut self, blocks: &u8) {
        let Some(control) = &self.control else { return };
        let wanted = u64::from(*blocks % 40) * MEM_BLOCK;
        let possible = wanted <= BLOCKS * MEM_BLOCK;
        if possible {
            self.wanted = self.wanted.max(wanted);
        }
        assert_eq!(control.resize(wanted).is_ok(), possible);
    }

    fn settled(&mut self) {
        assert!(self.plugged() <= self.wanted);
    }

    fn alive(&mut self, guest: &mut Guest) {
        assert_eq!(guest.ask(0, &request(Ask::UnplugAll))[0], 0);
        if let Some(control) = &self.control {
            control.resize(MEM_BLOCK).expect("one block");
        }
        assert_eq!(guest.ask(0, &request(Ask::Plug(5, 1)))[0], 0);
        assert_eq!(self.plugged(), MEM_BLOCK);
    }
}

thread_local! {
    static RAM: Arc<GuestMemoryMmap> = {
        let size = (BLOCKS * MEM_BLOCK) as usize;
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(START), size)]).expect("RAM"))
    };
}

fuzz_target!(|case: Case<Ask, u8>| {
    let ram = RAM.with(Arc::clone);
    let wanted = 8 * MEM_BLOCK;
    run(
        &case,
        &mut Host {
            ram,
            control: None,
            wanted,
        },
    );
});
