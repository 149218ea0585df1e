//! Any batch of requests does to a disk what it does to a vector of bytes, with every engine, buffered and direct.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashMap;
use std::ops::Range;

use block_util::{DiskFile, DiskIo, Operation, RawOptions, Request};
use common::{BUFFERED, DIRECT, ENGINES, Memory, image, open, pattern, queue};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Kind {
    Read,
    Write { durable: bool },
    Discard,
    Zero { may_unmap: bool },
    Flush,
}

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    offset: u64,
    len: u64,
    /// Of the memory's address, and of the pieces.
    skew: usize,
    step: usize,
    seed: u64,
}

impl Op {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }

    fn aligned(mut self, unit: u64) -> Op {
        self.offset -= self.offset % unit;
        self.len -= self.len % unit;
        self
    }
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        4 => Just(Kind::Read),
        6 => any::<bool>().prop_map(|durable| Kind::Write { durable }),
        2 => Just(Kind::Discard),
        2 => any::<bool>().prop_map(|may_unmap| Kind::Zero { may_unmap }),
        1 => Just(Kind::Flush),
    ];
    let len = prop_oneof![0..4096u64, 0..300_000u64];
    let skew = prop_oneof![Just(0usize), Just(512), 0..4096usize];
    let step = prop_oneof![Just(512usize), Just(4096), Just(1 << 20), 100..9000usize];
    (kind, 0..SIZE, len, skew, step, any::<u64>()).prop_map(
        |(kind, offset, len, skew, step, seed)| Op {
            kind,
            offset,
            len: len.min(SIZE - offset),
            skew,
            step,
            seed,
        },
    )
}

/// Leaves out what overlaps an earlier one: requests in flight have no order.
fn apart(batch: &[Op], unit: u64) -> Vec<Op> {
    let mut kept: Vec<Op> = Vec::new();
    for op in batch {
        let op = op.clone().aligned(unit);
        let range = op.range();
        if kept
            .iter()
            .all(|k| k.range().end <= range.start || range.end <= k.range().start)
        {
            kept.push(op);
        }
    }
    kept
}

fn run_batch(io: &mut dyn DiskIo, model: &mut [u8], batch: &[Op]) {
    let mut memories: HashMap<u64, Memory> = HashMap::new();
    for (index, op) in batch.iter().enumerate() {
        let place = op.offset as usize..(op.offset + op.len) as usize;
        let mut memory = match op.kind {
            Kind::Write { .. } => Memory::of(&pattern(op.len as usize, op.seed), op.skew),
            _ => Memory::new(op.len as usize, op.skew),
        };
        let buffers = memory.pieces(op.step);
        let (offset, len) = (op.offset, op.len);
        let operation = match op.kind {
            Kind::Read => Operation::Read {
                offset,
                buffers: &buffers,
            },
            Kind::Write { durable } => {
                model[place].copy_from_slice(memory.bytes());
                Operation::Write {
                    offset,
                    buffers: &buffers,
                    durable,
                }
            }
            Kind::Discard => {
                model[place].fill(0);
                Operation::Discard { offset, len }
            }
            Kind::Zero { may_unmap } => {
                model[place].fill(0);
                Operation::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                }
            }
            Kind::Flush => Operation::Flush,
        };
        memories.insert(index as u64, memory);
        io.submit(Request {
            operation,
            user_data: index as u64,
        })
        .unwrap();
    }
    assert_eq!(io.in_flight(), batch.len());
    io.kick().unwrap();
    while io.in_flight() > 0 {
        io.wait().unwrap();
        while let Some(done) = io.next_completion() {
            done.result.unwrap();
            let memory = memories.remove(&done.user_data).unwrap();
            let op = &batch[done.user_data as usize];
            if matches!(op.kind, Kind::Read) {
                let expected = &model[op.offset as usize..(op.offset + op.len) as usize];
                assert!(memory.bytes() == expected, "{op:?} read other bytes");
            }
        }
    }
    assert!(memories.is_empty());
}

fn check(options: &RawOptions, unit: u64, batches: &[Vec<Op>]) {
    for engine in ENGINES {
        let file = image(SIZE);
        let disk = open(file.path(), options);
        let unit = unit.max(if options.direct {
            u64::from(disk.geometry().logical_block_size)
        } else {
            1
        });
        let mut io = queue(&disk, engine, 16);
        let mut model = vec![0; SIZE as usize];
        for batch in batches {
            run_batch(&mut *io, &mut model, &apart(batch, unit));
        }
        drop(io);
        let found = std::fs::read(file.path()).unwrap();
        assert!(
            found == model,
            "{engine:?}: the image is not what was written"
        );
    }
}

fn batches() -> impl Strategy<Value = Vec<Vec<Op>>> {
    proptest::collection::vec(proptest::collection::vec(op(), 1..12), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn buffered_disks_behave_like_a_vector(batches in batches()) {
        check(&BUFFERED, 1, &batches);
    }

    #[test]
    fn direct_disks_behave_like_a_vector(batches in batches()) {
        check(&DIRECT, 512, &batches);
    }

    #[test]
    fn protected_and_dense_disks_behave_like_a_vector(batches in batches()) {
        // Without sparse there is no discard, but zeroes are zeroes.
        let batches: Vec<Vec<Op>> = batches
            .into_iter()
            .map(|b| b.into_iter().filter(|op| !matches!(op.kind, Kind::Discard)).collect())
            .collect();
        let options = RawOptions { sparse: false, protect_format: true, ..BUFFERED };
        check(&options, 512, &batches);
    }
}
