//! Rings and requests that no honest driver makes: the block device fails the request or asks for a reset, touches
//! nothing that isn't its business, and works again after the reset.
//!
//! `lenient=1` is for devices that read zeroes where no RAM is: any answer will do for nonsense then.

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::cpu::idt;
use crate::map::{read, write};
use crate::outcome::{Outcome, Reason};
use crate::virtio::blk::{Blk, DISCARD, F_RO, IN, OK, OUT, Setup, TYPE};
use crate::virtio::queue::{INDIRECT, NEXT, Queue, Segment, WRITE, put};
use crate::virtio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, F_EVENT_IDX, F_INDIRECT, FEATURES_OK, NEEDS_RESET, PATIENCE,
    Transport, common,
};
use crate::{dma, line, number};

/// How long a device may think about nonsense, in milliseconds.
const NONSENSE: u64 = 5_000;
const CANARY: u8 = 0x3c;

/// Memory that the cases use: header, data and status, canaries between.
struct Place {
    header: u64,
    data: u64,
    status: u64,
}

/// What has to come of a case.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// A failed request or a device that needs a reset.
    Failure,
    /// Any answer.
    Answer,
    /// Nothing: the device may ignore it.
    Nothing,
}

type Make = fn(&mut Queue, &Place);

/// Name, what has to come of it, and how it's made.
struct Case(&'static str, Wanted, Make);

use Wanted::{Answer, Failure, Nothing};

/// An address that isn't RAM anywhere.
const NOWHERE: u64 = 0xffff_ffff_ffff_f000;
const HIGH: u64 = 1 << 45;
/// Among the I/O APIC's registers, past those that do something.
const IOAPIC: u64 = 0xfec0_0800;

/// Writes descriptors 0, 1, ... as given and offers the first.
fn chain(q: &mut Queue, list: &[(u64, u32, u16, u16)]) {
    for (i, &(address, length, flags, next)) in list.iter().enumerate() {
        put(q.descriptor(i as u16), address, length, flags, next);
    }
    q.offer(0);
}

/// Writes an indirect table of descriptor 0 and offers it with this length.
fn table(q: &mut Queue, length: u32, list: &[(u64, u32, u16, u16)]) {
    let at = q.table(0);
    for (i, &(address, size, flags, next)) in list.iter().enumerate() {
        put(at + 16 * i as u64, address, size, flags, next);
    }
    chain(q, &[(at, length, INDIRECT, 0)]);
}

const CASES: &[Case] = &[
    Case("loop_of_one", Failure, |q, p| {
        chain(q, &[(p.header, 16, NEXT, 0)])
    }),
    Case("loop_of_two", Failure, |q, p| {
        chain(
            q,
            &[(p.header, 16, NEXT, 1), (p.data, 512, NEXT | WRITE, 0)],
        );
    }),
    Case("loop_at_the_end", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, NEXT | WRITE, 2),
            ],
        );
    }),
    Case("next_past_the_table", Failure, |q, p| {
        let past = q.size;
        chain(q, &[(p.header, 16, NEXT, past)]);
    }),
    Case("next_65535", Failure, |q, p| {
        chain(q, &[(p.header, 16, NEXT, 0xffff)])
    }),
    Case("head_past_the_table", Failure, |q, _| q.offer(q.size)),
    Case("head_65535", Failure, |q, _| q.offer(0xffff)),
    Case("header_nowhere", Failure, |q, p| {
        chain(
            q,
            &[
                (NOWHERE, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("header_wraps", Failure, |q, p| {
        chain(
            q,
            &[
                (u64::MAX - 3, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_nowhere", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (NOWHERE, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_high", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (HIGH, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_wraps", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (u64::MAX - 511, 1024, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_past_ram", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 0xffff_fe00, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_longest", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 0xffff_ffff, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_longest_thrice", Failure, |q, p| {
        let long = 0xffff_ffff;
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, long, NEXT | WRITE, 2),
                (p.data, long, NEXT | WRITE, 3),
                (p.data, long, NEXT | WRITE, 4),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_at_the_ioapic", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (IOAPIC, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("status_nowhere", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (NOWHERE, 1, WRITE, 0),
            ],
        );
    }),
    Case("header_of_no_length", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 0, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("data_of_no_length", Answer, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 0, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("status_of_no_length", Answer, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 0, WRITE, 0),
            ],
        );
    }),
    Case("all_of_no_length", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 0, NEXT, 1),
                (p.data, 0, NEXT | WRITE, 2),
                (p.status, 0, WRITE, 0),
            ],
        );
    }),
    Case("header_too_short", Failure, |q, p| {
        chain(q, &[(p.header, 8, NEXT, 1), (p.status, 1, WRITE, 0)]);
    }),
    Case("header_alone", Failure, |q, p| {
        chain(q, &[(p.header, 16, 0, 0)])
    }),
    Case("status_alone", Failure, |q, p| {
        chain(q, &[(p.status, 1, WRITE, 0)])
    }),
    Case("header_writable", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT | WRITE, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("status_read_only", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT, 2),
                (p.status, 1, 0, 0),
            ],
        );
    }),
    Case("read_into_read_only", Answer, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("write_from_writable", Answer, |q, p| {
        write(p.header, OUT);
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("readable_after_writable", Failure, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.data, 512, NEXT, 3),
                (p.status, 1, WRITE, 0),
            ],
        );
    }),
    Case("index_too_far", Failure, |q, p| {
        put(q.descriptor(0), p.header, 16, 0, 0);
        let index: u16 = read(q.available + 2);
        write(q.available + 2, index.wrapping_add(q.size + 1));
    }),
    Case("index_half_round", Failure, |q, _| {
        let index: u16 = read(q.available + 2);
        write(q.available + 2, index.wrapping_add(0x8000));
    }),
    Case("same_head_twice", Answer, |q, p| {
        chain(
            q,
            &[
                (p.header, 16, NEXT, 1),
                (p.data, 512, NEXT | WRITE, 2),
                (p.status, 1, WRITE, 0),
            ],
        );
        q.offer(0);
    }),
    Case("discard_of_15", Failure, |q, p| {
        write(p.header, DISCARD);
        let list = [
            (p.header, 16, NEXT, 1),
            (p.data, 15, NEXT, 2),
            (p.status, 1, WRITE, 0),
        ];
        chain(q, &list);
    }),
    Case("discard_of_nothing", Answer, |q, p| {
        write(p.header, DISCARD);
        chain(q, &[(p.header, 16, NEXT, 1), (p.status, 1, WRITE, 0)]);
    }),
    Case("doorbells", Nothing, |q, _| {
        for value in [q.index, 1, 7, 0xffff] {
            write(q.doorbell, value);
        }
    }),
];

const INDIRECT_CASES: &[Case] = &[
    Case("table_of_no_length", Failure, |q, _| table(q, 0, &[])),
    Case("table_of_15", Failure, |q, p| {
        table(q, 15, &[(p.header, 16, 0, 0)])
    }),
    Case("table_of_17", Failure, |q, p| {
        table(q, 17, &[(p.header, 16, NEXT, 1)])
    }),
    Case("table_nowhere", Failure, |q, _| {
        chain(q, &[(NOWHERE, 48, INDIRECT, 0)])
    }),
    Case("table_wraps", Failure, |q, _| {
        chain(q, &[(u64::MAX - 15, 48, INDIRECT, 0)])
    }),
    Case("table_longest", Failure, |q, p| {
        let at = q.table(0);
        put(at, p.header, 16, NEXT, 0xffff);
        chain(q, &[(at, 0xffff_fff0, INDIRECT, 0)]);
    }),
    Case("table_of_itself", Failure, |q, _| {
        let at = q.table(0);
        table(q, 16, &[(at, 16, INDIRECT, 0)]);
    }),
    Case("table_in_a_table", Failure, |q, p| {
        let inner = q.table(1);
        put(inner, p.header, 16, NEXT, 1);
        put(inner + 16, p.status, 1, WRITE, 0);
        table(q, 16, &[(inner, 32, INDIRECT, 0)]);
    }),
    Case("table_and_next", Failure, |q, p| {
        let at = q.table(0);
        put(at, p.header, 16, 0, 0);
        chain(q, &[(at, 16, INDIRECT | NEXT, 1), (p.status, 1, WRITE, 0)]);
    }),
    Case("table_loop", Failure, |q, p| {
        table(
            q,
            32,
            &[(p.header, 16, NEXT, 1), (p.data, 512, NEXT | WRITE, 1)],
        );
    }),
    Case("table_next_past_it", Failure, |q, p| {
        table(q, 16, &[(p.header, 16, NEXT, 1)])
    }),
];

/// All cases, each on a device that is freshly set up, and good requests after each.
pub fn hostile() -> Outcome {
    at_cpl3(|| {
        let offered = {
            dma::reset();
            let blk = Blk::open(Setup::FULL)?;
            works(blk)?
        };
        let mut count = 0;
        for case in CASES {
            attempt(case, offered & !(F_INDIRECT | F_EVENT_IDX))?;
            attempt(case, offered)?;
            count += 2;
        }
        for case in INDIRECT_CASES {
            let wanted = if offered & F_INDIRECT != 0 {
                case.1
            } else {
                Answer
            };
            attempt(&Case(case.0, wanted, case.2), offered)?;
            attempt(&Case(case.0, Answer, case.2), offered & !F_INDIRECT)?;
            count += 2;
        }
        rings(offered)?;
        registers(offered)?;
        line!("VALUE blk_hostile_cases {count}");
        Ok(())
    })
}

/// A read and its answer; which features the device has.
fn works(mut blk: Blk) -> Outcome<u64> {
    let buffer = dma::take(512, 512)?;
    let done = blk.run(0, IN, 0, &[Segment::writable(buffer, 512)])?;
    same("a good read", u64::from(done.status), u64::from(OK))?;
    Ok(blk.features & !F_RO)
}

fn attempt(case: &Case, features: u64) -> Outcome {
    let Case(name, mut wanted, make) = *case;
    if wanted == Failure && number("lenient") == Some(1) {
        wanted = Answer;
    }
    dma::reset();
    let setup = Setup {
        features,
        queues: 1,
        size: 16,
        interrupts: false,
    };
    let mut blk = Blk::open(setup)?;
    let base = dma::take(16384, 4096)?;
    dma::fill(base, 16384, CANARY);
    let place = Place {
        header: base + 1024,
        data: base + 4096,
        status: base + 12288,
    };
    write(place.header, IN);
    write(place.header + 4, 0u32);
    write(place.header + 8, 0u64);
    write(place.status, 0xffu8);
    let changes = idt::count(Transport::config_vector());
    let queue = blk.queue(0)?;
    make(queue, &place);
    queue.ring();
    let (queue, transport) = blk.parts(0)?;
    let needs_reset = || transport.status() & NEEDS_RESET != 0;
    let limit = if wanted == Nothing { 20 } else { NONSENSE };
    let answered = within(limit, || queue.has_used() || needs_reset());
    let status: u8 = read(place.status);
    let verdict = match (needs_reset(), queue.take_raw()) {
        (true, _) => "needs_reset",
        (false, Some(_)) if status == OK => "ok",
        (false, Some(_)) => "failed",
        (false, None) => "nothing",
    };
    line!("VALUE blk_hostile {name} {verdict} status={status:#x}");
    if wanted != Nothing && !answered {
        return Err(Reason(
            "the device neither answers nor asks for a reset",
            0,
            1,
        ));
    }
    ensure(
        "nonsense doesn't succeed",
        wanted != Failure || verdict != "ok",
    )?;
    if verdict == "needs_reset" {
        let told = within(PATIENCE, || {
            idt::count(Transport::config_vector()) != changes
        });
        ensure("NEEDS_RESET comes with a configuration interrupt", told)?;
    }
    // What lies between header, data and status belongs to nobody.
    ensure("memory before the header", dma::all(base, 1024, CANARY))?;
    ensure(
        "memory between header and data",
        dma::all(base + 1040, 4096 - 1040, CANARY),
    )?;
    ensure(
        "memory past the status",
        dma::all(place.status + 16, 4000, CANARY),
    )?;
    drop(blk);
    works(Blk::open(setup)?)?;
    Ok(())
}

/// Rings at addresses that aren't RAM, and rings that aren't aligned: a good request gets a device that needs a reset.
fn rings(features: u64) -> Outcome {
    let fields = [
        (common::QUEUE_DESC, 1),
        (common::QUEUE_DRIVER, 1),
        (common::QUEUE_DEVICE, 2),
    ];
    for (field, odd) in fields {
        for address in [NOWHERE, HIGH, IOAPIC, u64::MAX, odd] {
            dma::reset();
            let transport = Transport::find(TYPE, number("blk_index").unwrap_or(0))?;
            transport.negotiate(features)?;
            transport.interrupts()?;
            let mut queue = transport.prepare(0, 16, features)?;
            transport.set_wide(field, address);
            transport.set(common::QUEUE_ENABLE, 1u16);
            transport.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            let at = dma::take(1024, 16)?;
            let request = [
                Segment::readable(at, 16),
                Segment::writable(at + 512, 512),
                Segment::writable(at + 16, 1),
            ];
            ensure("room for a request", queue.add(&request, false).is_some())?;
            queue.ring();
            let lenient = number("lenient") == Some(1);
            let needs_reset = || transport.status() & NEEDS_RESET != 0;
            let found = within(if lenient { 5 } else { NONSENSE }, needs_reset);
            line!(
                "VALUE blk_hostile_ring {field} {address:#x} status={:#x}",
                transport.status()
            );
            ensure("a ring that can't be needs a reset", found || lenient)?;
            drop(transport);
            let setup = Setup {
                features,
                ..Setup::FULL
            };
            works(Blk::open(setup)?)?;
        }
    }
    Ok(())
}

/// Nonsense in the registers: sizes, selectors, status bits, features; a doorbell before DRIVER_OK.
fn registers(features: u64) -> Outcome {
    dma::reset();
    let transport = Transport::find(TYPE, number("blk_index").unwrap_or(0))?;
    for select in [transport.queue_count(), 0x7fff, 0xffff] {
        same(
            "size of a queue that isn't there",
            u64::from(transport.select(select)),
            0,
        )?;
        transport.set(common::QUEUE_SIZE, 16u16);
        transport.set(common::QUEUE_ENABLE, 1u16);
        transport.set_wide(common::QUEUE_DESC, NOWHERE);
    }
    for select in [2u32, 3, 7, u32::MAX] {
        transport.set(common::DEVICE_FEATURE_SELECT, select);
        let word: u32 = transport.get(common::DEVICE_FEATURE);
        line!("VALUE blk_features_word {select} {word:#x}");
    }
    // Without VERSION_1 FEATURES_OK isn't to be had, nor with a feature that wasn't offered.
    let unknown = !transport.offered() & 0x00ff_ffff;
    for bad in [0, features & 0xffff_ffff, unknown | 1 << 32] {
        transport.reset()?;
        transport.set_status(3);
        transport.accept(bad);
        transport.set_status(11);
        line!(
            "VALUE blk_features_refused {bad:#x} status={:#x}",
            transport.status()
        );
    }
    transport.reset()?;
    write(transport.doorbells.at, 0u16);
    transport.set_status(0xff);
    write(transport.doorbells.at, 0u16);
    transport.reset()?;
    let setup = Setup {
        features,
        ..Setup::FULL
    };
    drop(transport);
    works(Blk::open(setup)?)?;
    Ok(())
}
