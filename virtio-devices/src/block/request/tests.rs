//! Requests out of chains that a driver made, well or badly.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vm_virtio::feature::VERSION_1;
use vm_virtio::testing::{Descriptor, DriverQueue, TestMemory, memory};
use vm_virtio::{DeviceQueue, Fault};
use vmm_sys_util::eventfd::EventFd;

use super::*;

const LIMITS: Limits = Limits {
    capacity: 100 * SECTOR,
    read_only: false,
    discard: Some(50),
    write_zeroes: Some(60),
};

const READ_ONLY: Limits = Limits {
    read_only: true,
    discard: None,
    write_zeroes: None,
    ..LIMITS
};

/// A chain of buffers that hold `readable`, and of writable ones of such lengths.
fn chain(readable: &[&[u8]], writable: &[u32]) -> (TestMemory, Chain) {
    let memory = memory();
    let mut driver = DriverQueue::new(&memory, 0x1000, 64, false);
    let kick = Arc::new(EventFd::new(0).unwrap());
    let mut device = DeviceQueue::new(0, 64, &driver.state(), VERSION_1, &*memory, kick).unwrap();
    let mut at = 0x1_0000;
    let mut buffers = Vec::new();
    for bytes in readable {
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        buffers.push(Descriptor::readable(at, bytes.len() as u32));
        at += bytes.len() as u64;
    }
    for len in writable {
        buffers.push(Descriptor::writable(at, *len));
        at += u64::from(*len);
    }
    driver.add(&buffers).unwrap();
    let mut chain = Chain::new();
    assert!(device.pop(&*memory, &mut chain).unwrap());
    (memory, chain)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    // Reserved: whatever it is, it is ignored.
    header[4..8].fill(0xff);
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&count.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

fn parse(
    limits: &Limits,
    readable: &[&[u8]],
    writable: &[u32],
) -> Result<Result<Request, Status>, Fault> {
    let (memory, chain) = chain(readable, writable);
    Request::parse(&*memory, &chain, limits)
}

fn parsed(limits: &Limits, readable: &[&[u8]], writable: &[u32]) -> Result<Request, Status> {
    parse(limits, readable, writable).unwrap()
}

const IN: u32 = VIRTIO_BLK_T_IN;
const OUT: u32 = VIRTIO_BLK_T_OUT;
const DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
const ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

#[test]
fn each_kind_is_what_it_says() {
    let read = Request::Read {
        offset: 3 * SECTOR,
        len: 1024,
    };
    assert_eq!(parsed(&LIMITS, &[&header(IN, 3)], &[1024, 1]), Ok(read));
    let write = Request::Write {
        offset: 99 * SECTOR,
        len: 512,
    };
    assert_eq!(
        parsed(&LIMITS, &[&header(OUT, 99), &[0; 512]], &[1]),
        Ok(write)
    );
    let flush = header(VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(parsed(&LIMITS, &[&flush], &[1]), Ok(Request::Flush));
    assert_eq!(parsed(&READ_ONLY, &[&flush], &[1]), Ok(Request::Flush));
    let id = header(VIRTIO_BLK_T_GET_ID, 7);
    assert_eq!(parsed(&READ_ONLY, &[&id], &[20, 1]), Ok(Request::GetId));
    let discard = Request::Discard {
        offset: 50 * SECTOR,
        len: 50 * SECTOR,
    };
    let asked = [&header(DISCARD, 0)[..], &segment(50, 50, 0)];
    assert_eq!(parsed(&LIMITS, &asked, &[1]), Ok(discard));
    for may_unmap in [false, true] {
        let zeroes = Request::WriteZeroes {
            offset: 0,
            len: 60 * SECTOR,
            may_unmap,
        };
        let asked = segment(0, 60, u32::from(may_unmap));
        let asked = [&header(ZEROES, 1234)[..], &asked];
        assert_eq!(parsed(&LIMITS, &asked, &[1]), Ok(zeroes));
    }
}

#[test]
fn framing_does_not_matter() {
    let header = header(OUT, 1);
    let write = Ok(Request::Write {
        offset: SECTOR,
        len: 512,
    });
    let all = [&header[..], &[7; 512]].concat();
    assert_eq!(parsed(&LIMITS, &[&all], &[1]), write);
    let pieces = [&all[..3], &all[3..17], &all[17..100], &all[100..]];
    assert_eq!(parsed(&LIMITS, &pieces, &[1]), write);
    let read = Ok(Request::Read {
        offset: SECTOR,
        len: 512,
    });
    let header = self::header(IN, 1);
    assert_eq!(parsed(&LIMITS, &[&header], &[513]), read);
    assert_eq!(
        parsed(&LIMITS, &[&header[..1], &header[1..]], &[500, 12, 1]),
        read
    );
}

#[test]
fn what_cannot_be_done_has_a_status() {
    use Status::{IoError, Unsupported};
    let in_ = |sector| header(IN, sector);
    let data = [0; 1024];
    // Past the end, at its very end, and with offsets that wrap.
    for sector in [99, 100, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(parsed(&LIMITS, &[&in_(sector)], &[1024, 1]), Err(IoError));
        let out = [&header(OUT, sector)[..], &data];
        assert_eq!(parsed(&LIMITS, &out, &[1]), Err(IoError));
    }
    // Parts of sectors, and nothing at all.
    for len in [0_usize, 1, 511, 513, 1000] {
        let room = len as u32 + 1;
        assert_eq!(parsed(&LIMITS, &[&in_(0)], &[room]), Err(IoError), "{len}");
        let out = [&header(OUT, 0)[..], &data[..len]].concat();
        assert_eq!(parsed(&LIMITS, &[&out], &[1]), Err(IoError), "{len}");
    }
    let out = [&header(OUT, 0)[..], &data];
    assert_eq!(parsed(&READ_ONLY, &out, &[1]), Err(IoError));
    // No header.
    assert_eq!(parsed(&LIMITS, &[&in_(0)[..15]], &[513]), Err(IoError));
    assert_eq!(parsed(&LIMITS, &[], &[513]), Err(IoError));
    for kind in [2, 3, 5, 9, 14, 15, u32::MAX] {
        let asked = [&header(kind, 0)[..], &[0; 16]];
        assert_eq!(parsed(&LIMITS, &asked, &[513]), Err(Unsupported), "{kind}");
    }
    for (kind, most, reserved) in [(DISCARD, 50, 1), (ZEROES, 60, 2)] {
        let ask =
            |limits: &Limits, segments: &[u8]| parsed(limits, &[&header(kind, 0), segments], &[1]);
        assert_eq!(ask(&READ_ONLY, &segment(0, 1, 0)), Err(Unsupported));
        assert_eq!(ask(&LIMITS, &segment(0, 1, reserved)), Err(Unsupported));
        assert_eq!(ask(&LIMITS, &segment(0, 1, 1 << 31)), Err(Unsupported));
        assert_eq!(ask(&LIMITS, &segment(0, most + 1, 0)), Err(IoError));
        assert_eq!(ask(&LIMITS, &segment(0, 0, 0)), Err(IoError));
        assert_eq!(ask(&LIMITS, &segment(99, 2, 0)), Err(IoError));
        assert_eq!(ask(&LIMITS, &segment(u64::MAX, 2, 0)), Err(IoError));
        assert_eq!(ask(&LIMITS, &segment(0, 1, 0)[..15]), Err(IoError));
        let two = [segment(0, 1, 0), segment(1, 1, 0)].concat();
        assert_eq!(ask(&LIMITS, &two), Err(IoError));
        assert_eq!(parsed(&LIMITS, &[&header(kind, 0)], &[1]), Err(IoError));
    }
}

#[test]
fn a_status_must_have_room() {
    for kind in [IN, OUT, VIRTIO_BLK_T_FLUSH, 99] {
        let fault = parse(&LIMITS, &[&header(kind, 0), &[0; 512]], &[]).unwrap_err();
        assert!(matches!(fault, Fault::Request(_)), "{fault}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is asked, what is let through lies on the disk and is offered.
    #[test]
    fn only_what_is_on_the_disk_gets_through(
        kind in prop_oneof![Just(IN), Just(OUT), Just(DISCARD), Just(ZEROES), 0_u32..20],
        sector in prop_oneof![0_u64..120, any::<u64>()],
        count in prop_oneof![0_u32..120, any::<u32>()],
        flags in 0_u32..4,
        payload in prop_oneof![Just(16_usize), Just(512), 0_usize..2000],
        writable in prop_oneof![Just(513_u32), 1_u32..3000],
        capacity in 0_u64..60_000,
        read_only in any::<bool>(),
    ) {
        let limits = Limits { capacity, ..if read_only { READ_ONLY } else { LIMITS } };
        let mut data = vec![0; payload];
        let segment = segment(sector, count, flags);
        let common = payload.min(16);
        data[..common].copy_from_slice(&segment[..common]);
        let readable = [&header(kind, sector)[..], &data].concat();
        let Ok(request) = parsed(&limits, &[&readable], &[writable]) else {
            return Ok(());
        };
        let (offset, len, changes) = match request {
            Request::Read { offset, len } => {
                prop_assert_eq!(len, writable - 1);
                (offset, u64::from(len), false)
            }
            Request::Write { offset, len } => {
                prop_assert_eq!(len as usize, payload);
                (offset, u64::from(len), true)
            }
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                prop_assert!(len <= 60 * SECTOR);
                (offset, len, true)
            }
            Request::Flush | Request::GetId => return Ok(()),
        };
        prop_assert!(!(changes && read_only));
        prop_assert!(len > 0 && len % SECTOR == 0);
        prop_assert_eq!(offset, sector * SECTOR);
        prop_assert!(offset + len <= capacity);
    }
}
