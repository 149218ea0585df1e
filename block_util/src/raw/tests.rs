//! Steps of a request against storage that does less than asked: short transfers, refusals, interruptions.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::RawOptions;
use super::sys::{self, Direction};
use super::target::Target;
use super::transfer::{Step, Transfer};
use crate::buffer::{AlignedBuf, IoBuf};
use crate::io::{Operation, Request};

const SIZE: usize = 1 << 19;

fn target(options: &RawOptions) -> Target {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE as u64).unwrap();
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file.path())
        .unwrap();
    Target::new(opened, file.path(), options, true).unwrap()
}

fn start(target: &Target, operation: Operation<'_>) -> Transfer {
    let mut transfer = Transfer::new();
    let request = Request {
        operation,
        user_data: 5,
    };
    transfer.start(target, &request);
    assert_eq!(transfer.user_data(), 5);
    transfer
}

fn pieces(memory: &mut AlignedBuf, step: usize) -> Vec<IoBuf> {
    memory
        .as_mut_slice()
        .chunks_mut(step)
        // SAFETY: the tests keep the memory for longer than the transfer.
        .map(|piece| unsafe { IoBuf::new(piece.as_mut_ptr(), piece.len()) })
        .collect()
}

/// Carries a step out for at most `limit` bytes.
fn short_step(transfer: &mut Transfer, target: &Target, limit: usize) {
    let Step::Move {
        direction,
        pieces,
        offset,
        flags,
    } = transfer.step()
    else {
        return transfer.run_step(target);
    };
    let first = pieces[0];
    // SAFETY: a part of the request's own first piece.
    let part = unsafe { IoBuf::new(first.as_ptr(), first.len().min(limit)) };
    // SAFETY: as above.
    let moved = unsafe { sys::transfer(&target.file, direction, &[part], offset, flags) };
    transfer.finish_step(target, moved.map_err(|e| e.raw_os_error().unwrap()));
}

fn result(transfer: &Transfer) -> Option<Result<(), i32>> {
    match transfer.step() {
        Step::Done(result) => Some(result),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn short_transfers_are_gone_on_with(
        limits in proptest::collection::vec(1..200_000usize, 1..6),
        step in 1000..300_000usize,
        guarded in any::<bool>(),
    ) {
        let options = RawOptions { protect_format: guarded, ..RawOptions::default() };
        let target = target(&options);
        let mut memory = AlignedBuf::new(SIZE, 512).unwrap();
        for (index, byte) in memory.as_mut_slice().iter_mut().enumerate() {
            *byte = (index * 31 + index / 1000) as u8;
        }
        let data = memory.as_slice().to_vec();
        let buffers = pieces(&mut memory, step);
        for read in [false, true] {
            let operation = if read {
                Operation::Read { offset: 0, buffers: &buffers }
            } else {
                Operation::Write { offset: 0, buffers: &buffers, durable: false }
            };
            let mut transfer = start(&target, operation);
            let mut limits = limits.iter().cycle();
            while result(&transfer).is_none() {
                short_step(&mut transfer, &target, *limits.next().unwrap());
            }
            prop_assert_eq!(result(&transfer), Some(Ok(())));
            let mut file = vec![0; SIZE];
            target.file.read_exact_at(&mut file, 0).unwrap();
            prop_assert!(file == data);
            prop_assert!(memory.as_slice() == data);
            if !read {
                memory.as_mut_slice().fill(0);
            }
        }
    }
}

fn refuse(transfer: &mut Transfer, target: &Target, errno: i32) {
    transfer.finish_step(target, Err(errno));
}

fn mode(transfer: &Transfer) -> Option<i32> {
    match transfer.step() {
        Step::Fallocate { mode, .. } => Some(mode),
        _ => None,
    }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

#[test]
fn zeroes_fall_back_to_writing_and_remember_it() {
    let target = target(&RawOptions::default());
    target.file.write_all_at(&[9; SIZE], 0).unwrap();
    let zeroes = Operation::WriteZeroes {
        offset: 10,
        len: 400_000,
        may_unmap: true,
    };
    let mut transfer = start(&target, zeroes);
    assert_eq!(mode(&transfer), Some(PUNCH));
    refuse(&mut transfer, &target, libc::EOPNOTSUPP);
    assert_eq!(mode(&transfer), Some(ZERO));
    refuse(&mut transfer, &target, libc::EOPNOTSUPP);
    while result(&transfer).is_none() {
        assert!(matches!(
            transfer.step(),
            Step::Move {
                direction: Direction::Write,
                ..
            }
        ));
        short_step(&mut transfer, &target, 100_000);
    }
    assert_eq!(result(&transfer), Some(Ok(())));
    let mut file = vec![0; SIZE];
    target.file.read_exact_at(&mut file, 0).unwrap();
    let mut expected = vec![9; SIZE];
    expected[10..400_010].fill(0);
    assert!(file == expected);

    assert!(target.no_punch.load(Ordering::Relaxed));
    let transfer = start(&target, zeroes);
    assert!(matches!(transfer.step(), Step::Move { .. }));
    let discard = Operation::Discard {
        offset: 0,
        len: 512,
    };
    assert_eq!(
        result(&start(&target, discard)),
        Some(Err(libc::EOPNOTSUPP))
    );
}

#[test]
fn errors_of_the_storage_are_told_and_do_not_fall_back() {
    let target = target(&RawOptions::default());
    let zeroes = Operation::WriteZeroes {
        offset: 0,
        len: 4096,
        may_unmap: false,
    };
    for errno in [libc::EIO, libc::ENOSPC] {
        let mut transfer = start(&target, zeroes);
        refuse(&mut transfer, &target, errno);
        assert_eq!(result(&transfer), Some(Err(errno)));
    }
    assert!(!target.no_zero_range.load(Ordering::Relaxed));
    let mut transfer = start(&target, Operation::Flush);
    refuse(&mut transfer, &target, libc::EIO);
    assert_eq!(result(&transfer), Some(Err(libc::EIO)));
}

#[test]
fn the_kernel_may_say_again_but_not_for_ever() {
    let target = target(&RawOptions::default());
    let mut transfer = start(&target, Operation::Flush);
    for _ in 0..10 {
        refuse(&mut transfer, &target, libc::EINTR);
        assert!(matches!(transfer.step(), Step::Sync));
    }
    for _ in 0..1000 {
        refuse(&mut transfer, &target, libc::EAGAIN);
    }
    assert_eq!(result(&transfer), Some(Err(libc::EAGAIN)));
}

#[test]
fn durable_writes_say_so_to_the_kernel() {
    let target = target(&RawOptions::default());
    let mut memory = AlignedBuf::new(512, 512).unwrap();
    let buffers = pieces(&mut memory, 512);
    for (durable, expected) in [(false, 0), (true, libc::RWF_DSYNC)] {
        let operation = Operation::Write {
            offset: 0,
            buffers: &buffers,
            durable,
        };
        let transfer = start(&target, operation);
        match transfer.step() {
            Step::Move { flags, .. } => assert_eq!(flags, expected),
            step => panic!("{step:?}"),
        }
    }
}

#[test]
fn more_pieces_than_the_kernel_takes_go_in_turns() {
    let target = target(&RawOptions::default());
    let mut memory = AlignedBuf::new(5000, 512).unwrap();
    memory.as_mut_slice().fill(7);
    let buffers = pieces(&mut memory, 1);
    let mut transfer = start(
        &target,
        Operation::Write {
            offset: 0,
            buffers: &buffers,
            durable: false,
        },
    );
    let mut steps = 0;
    while result(&transfer).is_none() {
        transfer.run_step(&target);
        steps += 1;
    }
    assert_eq!((result(&transfer), steps), (Some(Ok(())), 5));
    let mut file = vec![0; 5001];
    target.file.read_exact_at(&mut file, 0).unwrap();
    assert!(file[..5000].iter().all(|&b| b == 7) && file[5000] == 0);
}

#[test]
fn a_guest_cannot_change_what_was_checked() {
    let options = RawOptions {
        protect_format: true,
        ..RawOptions::default()
    };
    let target = target(&options);
    let mut memory = AlignedBuf::new(1 << 18, 512).unwrap();
    memory.as_mut_slice().fill(b'X');
    let buffers = pieces(&mut memory, 4096);
    let operation = Operation::Write {
        offset: 0,
        buffers: &buffers,
        durable: false,
    };
    let mut transfer = start(&target, operation);
    // The sector has been looked at. What the guest now makes of its memory comes too late for it.
    memory.as_mut_slice()[..4].copy_from_slice(b"QFI\xfb");
    while result(&transfer).is_none() {
        transfer.run_step(&target);
    }
    assert_eq!(result(&transfer), Some(Ok(())));
    let mut magic = [0; 4];
    target.file.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"XXXX");
    // And if it was there in time, it is refused.
    let transfer = start(&target, operation);
    assert_eq!(result(&transfer), Some(Err(libc::EPERM)));
}
