//! The table, every combination of masks, and a model of it all.

use super::*;
use crate::testing::{LAYOUT, NONE, RecordingSink, message};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const ON: u16 = ENABLE;
const MASKED: u16 = ENABLE | FUNCTION_MASK;

fn table(vectors: u16) -> (Arc<MsixTable>, Arc<RecordingSink>) {
    let sink = Arc::new(RecordingSink::default());
    let layout = MsixLayout {
        pba_offset: 0x9000,
        ..LAYOUT
    };
    (MsixTable::new(vectors, layout, sink.clone()).unwrap(), sink)
}

/// Writes a dword of the table.
fn set(table: &MsixTable, vector: u16, field: u64, value: u32) {
    assert!(table.write(4, u64::from(vector) * ENTRY + field, &value.to_le_bytes()));
}

fn set_message(table: &MsixTable, vector: u16, message: MsiMessage) {
    set(table, vector, 0, message.address as u32);
    set(table, vector, 4, (message.address >> 32) as u32);
    set(table, vector, 8, message.data);
}

fn pending(table: &MsixTable, vectors: u16) -> u64 {
    let mut bytes = [0; 8];
    assert!(table.read(4, 0x9000 + u64::from(vectors / 64 * 8), &mut bytes));
    u64::from_le_bytes(bytes)
}

#[test]
fn tables_that_cannot_be() {
    let new = |vectors, layout| {
        MsixTable::new(vectors, layout, Arc::new(RecordingSink::default()))
            .err()
            .map(|error| error.to_string())
    };
    assert_eq!(
        new(0, LAYOUT).unwrap(),
        "0 MSI-X vectors are not between 1 and 2048"
    );
    assert!(new(2049, LAYOUT).is_some());
    assert_eq!(new(128, LAYOUT), None, "0x800 bytes, then the pending bits");
    assert!(new(129, LAYOUT).unwrap().contains("overlap"));
    let odd = |table_offset, pba_offset| MsixLayout {
        table_offset,
        pba_offset,
        ..LAYOUT
    };
    assert!(new(1, odd(4, 0x800)).unwrap().contains("table at 0x4"));
    assert!(
        new(1, odd(0, 0x804))
            .unwrap()
            .contains("pending bits at 0x804")
    );
    assert_eq!(new(64, odd(8, 0)), None);
    assert!(new(65, odd(8, 0)).is_some());
    let elsewhere = MsixLayout {
        pba_bar: 2,
        ..odd(0, 0)
    };
    assert_eq!(new(2048, elsewhere), None);
}

#[test]
fn a_new_table_is_masked() {
    let (table, sink) = table(3);
    let mut bytes = [0xee; 48];
    assert!(table.read(4, 0, &mut bytes));
    for entry in bytes.chunks_exact(16) {
        assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }
    assert_eq!(table.control_word(), 2);
    table.set_control_word(ON);
    assert_eq!(sink.route_calls(), 0, "no GSI for a vector nobody uses");
}

#[test]
fn entries_are_written_in_dwords_and_qwords() {
    let (table, _) = table(2);
    let mut entry = [0; 16];
    set(&table, 1, 0, 0xfee0_1237);
    set(&table, 1, 4, 0x89);
    set(&table, 1, 8, 0x1234_5678);
    set(&table, 1, 12, 0xffff_fffe);
    table.read(4, 16, &mut entry);
    #[rustfmt::skip]
    assert_eq!(entry, [0x34, 0x12, 0xe0, 0xfe, 0x89, 0, 0, 0, 0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0]);
    table.write(4, 16, &0x1122_3344_5566_7788u64.to_le_bytes());
    table.write(4, 24, &0x0000_0001_99aa_bbccu64.to_le_bytes());
    table.read(4, 16, &mut entry);
    #[rustfmt::skip]
    let expected = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xcc, 0xbb, 0xaa, 0x99, 1, 0, 0, 0];
    assert_eq!(entry, expected);
    // Undefined ones change nothing.
    for (offset, len) in [
        (16, 1),
        (16, 2),
        (16, 3),
        (17, 4),
        (20, 8),
        (18, 8),
        (16, 16),
        (16, 0),
    ] {
        assert!(table.write(4, offset, &vec![0; len]));
        table.read(4, 16, &mut entry);
        assert_eq!(entry, expected, "{len} bytes at {offset}");
    }
    let mut part = [0; 3];
    table.read(4, 16 + 7, &mut part);
    assert_eq!(part, [0x11, 0xcc, 0xbb], "parts can be read");
}

#[test]
fn only_table_and_pending_bits_answer() {
    let (table, _) = table(65);
    let ours = [(4, 0), (4, 65 * 16 - 1), (4, 0x9000), (4, 0x900f)];
    let others = [
        (4, 65 * 16),
        (4, 0x8fff),
        (4, 0x9010),
        (4, u64::MAX),
        (0, 0),
        (7, 0x9000),
    ];
    for ((bar, offset), answers) in ours
        .map(|place| (place, true))
        .into_iter()
        .chain(others.map(|place| (place, false)))
    {
        let mut data = [0xee; 8];
        assert_eq!(table.read(bar, offset, &mut data), answers);
        assert_eq!(table.write(bar, offset, &[0; 4]), answers);
        assert_eq!(data == [0xee; 8], !answers, "untouched where not ours");
    }
    // Past the end of the last entry.
    let mut data = [0xee; 8];
    table.read(4, 65 * 16 - 4, &mut data);
    assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0][..]);
}

/// Enable × function mask × vector mask: what a trigger does, and what becomes of it when each goes.
#[test]
fn matrix_of_masks() {
    for enable in [false, true] {
        for function in [false, true] {
            for own in [false, true] {
                let (table, sink) = table(2);
                set_message(&table, 1, message(0xfee0_0000, 0x31));
                let bit = |set, bit| if set { bit } else { 0 };
                table.set_control_word(bit(enable, ENABLE) | bit(function, FUNCTION_MASK));
                set(&table, 1, 12, own.into());
                table.trigger(1).unwrap();
                let case = format!("enable {enable}, function mask {function}, mask {own}");
                let direct = enable && !function && !own;
                let waits = enable && (function || own);
                assert_eq!(sink.take_triggered().len(), usize::from(direct), "{case}");
                assert_eq!(pending(&table, 2), u64::from(waits) << 1, "{case}");
                assert_eq!(sink.routes().contains_key(&1), direct, "{case}");

                // Twice pending is once delivered.
                table.trigger(1).unwrap();
                sink.take_triggered();
                table.set_control_word(bit(enable, ENABLE));
                let after_function = sink.take_triggered();
                set(&table, 1, 12, 0);
                let after_own = sink.take_triggered();
                let by_function = waits && !own;
                assert_eq!(after_function.len(), usize::from(by_function), "{case}");
                assert_eq!(after_own.len(), usize::from(waits && own), "{case}");
                assert_eq!(pending(&table, 2), 0, "{case}");
                table.set_control_word(ON);
                assert_eq!(sink.take_triggered(), NONE, "{case}: nothing is remembered");
            }
        }
    }
}

#[test]
fn routes_follow_the_message() {
    let (table, sink) = table(2);
    table.set_control_word(ON);
    set_message(&table, 0, message(0xfee0_1000, 1));
    assert_eq!(sink.route_calls(), 0, "masked while it is written");
    set(&table, 0, 12, 0);
    assert_eq!(sink.routes()[&0], Some(message(0xfee0_1000, 1)));
    // Changed without a mask: at once, and once for a qword.
    table.write(4, 0, &0x2_fee0_2000u64.to_le_bytes());
    assert_eq!(sink.routes()[&0], Some(message(0x2_fee0_2000, 1)));
    assert_eq!(sink.route_calls(), 2);
    set(&table, 0, 8, 1);
    assert_eq!(sink.route_calls(), 2, "no change");
    table.set_control_word(MASKED);
    assert_eq!(sink.routes()[&0], None);
    table.set_control_word(0);
    assert_eq!(sink.route_calls(), 3);
    assert!(!sink.routes().contains_key(&1));
}

#[test]
fn disabling_forgets() {
    let (table, sink) = table(1);
    table.set_control_word(MASKED);
    table.trigger(0).unwrap();
    table.set_control_word(0);
    assert_eq!(pending(&table, 1), 0);
    set(&table, 0, 12, 0);
    table.set_control_word(ON);
    assert_eq!(sink.take_triggered(), NONE);
}

#[test]
fn signals_from_outside_show_and_are_delivered() {
    let (table, sink) = table(2);
    table.set_control_word(ON);
    sink.outside.lock().unwrap().push(1);
    assert_eq!(pending(&table, 2), 2);
    set(&table, 1, 12, 0);
    assert_eq!(sink.take_triggered(), [1]);
    set(&table, 1, 12, 1);
    sink.outside.lock().unwrap().push(1);
    set(&table, 1, 12, 0);
    assert_eq!(sink.take_triggered(), [1], "without a look at the bits");
    set(&table, 1, 12, 1);
    sink.outside.lock().unwrap().push(1);
    assert!(table.save()[1].pending);
}

#[test]
fn a_route_that_cannot_be_made_keeps_interrupts_pending() {
    let (table, sink) = table(1);
    sink.refuse_routes.store(true, Ordering::SeqCst);
    table.set_control_word(ON);
    set(&table, 0, 12, 0);
    table.trigger(0).unwrap();
    assert_eq!(pending(&table, 1), 1);
    sink.refuse_routes.store(false, Ordering::SeqCst);
    set(&table, 0, 8, 7);
    assert_eq!(sink.take_triggered(), [0]);
    assert_eq!(pending(&table, 1), 0);
}

#[test]
fn failures_to_send_are_told_or_stay_pending() {
    let (table, sink) = table(1);
    table.set_control_word(MASKED);
    set(&table, 0, 12, 0);
    table.trigger(0).unwrap();
    sink.refuse_triggers.store(true, Ordering::SeqCst);
    table.set_control_word(ON);
    assert!(table.trigger(0).is_err());
    assert_eq!(pending(&table, 1), 1);
    sink.refuse_triggers.store(false, Ordering::SeqCst);
    set(&table, 0, 8, 7);
    assert_eq!(sink.take_triggered(), [0]);
    let error = table.trigger(1).unwrap_err();
    assert_eq!(error.to_string(), "there is no interrupt vector 1");
}

#[test]
fn the_last_of_many_vectors() {
    let (table, sink) = table(2048);
    table.set_control_word(MASKED);
    table.vector(2047).trigger().unwrap();
    let mut byte = [0; 1];
    table.read(4, 0x9000 + 255, &mut byte);
    assert_eq!(byte, [0x80]);
    let mut past = [0xee; 8];
    table.read(4, 0x9000 + 252, &mut past);
    assert_eq!(past, [0, 0, 0, 0x80, 0, 0, 0, 0]);
    table.set_control_word(ON);
    set(&table, 2047, 12, 0);
    assert_eq!(sink.take_triggered(), [2047]);
    assert_eq!(table.control_word(), 0x87ff);
}

/// Notes the latest number that was out when a message was sent.
struct Latest {
    out: AtomicU64,
    seen: AtomicU64,
}

impl MsiSink for Latest {
    fn set_route(&self, _: u16, _: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }

    fn trigger(&self, _: u16) -> io::Result<()> {
        self.seen
            .fetch_max(self.out.load(Ordering::SeqCst), Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn no_interrupt_is_lost_between_mask_and_trigger() {
    const LAST: u64 = 20_000;
    let sink = Arc::new(Latest {
        out: AtomicU64::new(0),
        seen: AtomicU64::new(0),
    });
    let table = MsixTable::new(1, LAYOUT, sink.clone()).unwrap();
    table.set_control_word(ON);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1..=LAST {
                sink.out.store(number, Ordering::SeqCst);
                table.trigger(0).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut word = 0;
        while !done.load(Ordering::SeqCst) {
            word ^= 1;
            set(&table, 0, 12, word);
            table.set_control_word(MASKED);
            table.set_control_word(ON);
        }
    });
    set(&table, 0, 12, 0);
    assert_eq!(sink.seen.load(Ordering::SeqCst), LAST);
}

#[derive(Clone, Debug)]
enum Step {
    Control(u16),
    Write(u64, Vec<u8>),
    Trigger(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let word = prop_oneof![
        Just(0),
        Just(FUNCTION_MASK),
        Just(ON),
        Just(MASKED),
        any::<u16>()
    ];
    let sizes = prop_oneof![Just(4usize), Just(8), 0..20usize];
    prop_oneof![
        word.prop_map(Step::Control),
        (0..4u64, 0..4u64, 0..8u32).prop_map(|(vector, field, value)| {
            Step::Write(vector * 16 + field * 4, value.to_le_bytes().to_vec())
        }),
        (0..0x50u64, sizes, any::<u8>())
            .prop_map(|(at, len, byte)| Step::Write(at, vec![byte; len])),
        (0..5u16).prop_map(Step::Trigger),
    ]
}

/// A vector as the specification has it.
#[derive(Clone, Copy, Default)]
struct Model {
    words: [u32; 4],
    pending: bool,
    sent: usize,
}

proptest! {
    /// Held against a model; the sink checks its own contract.
    #[test]
    fn does_what_the_specification_says(steps in prop::collection::vec(step(), 0..80)) {
        let (table, sink) = table(4);
        let mut model = [Model { words: [0, 0, 0, 1], ..Model::default() }; 4];
        let mut control = 0;
        for step in steps {
            match step {
                Step::Control(word) => {
                    control = word & MASKED;
                    table.set_control_word(word);
                }
                Step::Write(at, data) => {
                    let ours = table.write(4, at, &data);
                    prop_assert_eq!(ours, at < 64);
                    if ours && matches!(data.len(), 4 | 8) && at.is_multiple_of(data.len() as u64) {
                        for (index, dword) in (at as usize / 4..).zip(data.chunks_exact(4)) {
                            let value = u32::from_le_bytes(dword.try_into().unwrap());
                            let mask = [!3, !0, !0, 1][index % 4];
                            model[index / 4].words[index % 4] = value & mask;
                        }
                    }
                }
                Step::Trigger(vector) => {
                    let there = table.trigger(vector).is_ok();
                    prop_assert_eq!(there, vector < 4);
                    if there && control & ENABLE != 0 {
                        model[usize::from(vector)].pending = true;
                    }
                }
            }
            for vector in &mut model {
                if control & ENABLE == 0 {
                    vector.pending = false;
                } else if control == ON && vector.words[3] == 0 && vector.pending {
                    vector.pending = false;
                    vector.sent += 1;
                }
            }
            let mut bits = 0;
            let routes = sink.routes();
            for (index, vector) in (0u16..).zip(&model) {
                bits |= u64::from(vector.pending) << index;
                let [low, high, data, mask] = vector.words;
                let route = (control == ON && mask == 0)
                    .then(|| message(u64::from(high) << 32 | u64::from(low), data));
                prop_assert_eq!(routes.get(&index).copied().flatten(), route);
                let mut entry = [0; 16];
                table.read(4, u64::from(index) * 16, &mut entry);
                let words: Vec<u8> = vector.words.iter().flat_map(|word| word.to_le_bytes()).collect();
                prop_assert_eq!(&entry[..], words);
            }
            prop_assert_eq!(pending(&table, 4), bits);
        }
        let sent = sink.take_triggered();
        for (index, vector) in (0u16..).zip(&model) {
            prop_assert_eq!(sent.iter().filter(|other| **other == index).count(), vector.sent);
        }
    }
}
