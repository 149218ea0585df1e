//! The state machine, step by step and with random writes.

use proptest::collection::vec;
use proptest::prelude::*;

use vm_migration::Section;

use super::status::*;
use super::*;
use crate::feature::EVENT_IDX;
use crate::testing::TestInterrupt;

const OFFERED: u64 = VERSION_1 | EVENT_IDX | 1;

fn state() -> DeviceState {
    DeviceState::new(OFFERED, &[256, 16])
}

fn want(state: &mut DeviceState, features: u64) {
    for select in 0..2 {
        state.select_driver_features(select);
        state.write_driver_features((features >> (32 * select)) as u32);
    }
}

/// Up to DRIVER_OK.
fn running(features: u64) -> DeviceState {
    let mut state = state();
    assert_eq!(state.write_status(ACKNOWLEDGE), Transition::None);
    assert_eq!(state.write_status(ACKNOWLEDGE | DRIVER), Transition::None);
    want(&mut state, features);
    state.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(state.write_status(all), Transition::Start);
    assert_eq!(state.status(), all);
    state
}

#[test]
fn the_way_to_a_running_device_has_an_order() {
    let mut state = state();
    want(&mut state, VERSION_1);
    state.write_status(FEATURES_OK);
    assert_eq!(state.status(), 0, "nobody knows the device");
    assert_eq!(state.write_status(DRIVER_OK), Transition::None);
    state.write_status(ACKNOWLEDGE | FEATURES_OK);
    assert_eq!(state.status(), ACKNOWLEDGE);
    assert_eq!(state.write_status(DRIVER | DRIVER_OK), Transition::None);
    assert_eq!(state.status(), ACKNOWLEDGE | DRIVER);
    state.write_status(FEATURES_OK);
    assert_eq!(state.write_status(DRIVER_OK), Transition::Start);
    assert_eq!(state.write_status(DRIVER_OK), Transition::None, "once");
    assert_eq!(state.write_status(0), Transition::Reset);
}

#[test]
fn bits_stay_until_a_reset() {
    let mut state = running(VERSION_1);
    let before = state.status();
    assert_eq!(state.write_status(ACKNOWLEDGE), Transition::None);
    assert_eq!(state.write_status(0x30), Transition::None);
    assert_eq!(
        state.status(),
        before,
        "and those that there are not, are not"
    );
    state.write_status(FAILED | NEEDS_RESET);
    assert_eq!(
        state.status(),
        before | FAILED,
        "NEEDS_RESET is the device's"
    );
    state.reset(OFFERED);
    assert_eq!((state.status(), state.features()), (0, 0));
}

#[test]
fn a_driver_that_gave_up_does_not_start() {
    let mut state = state();
    state.write_status(ACKNOWLEDGE | DRIVER | FAILED);
    want(&mut state, VERSION_1);
    let status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(state.write_status(status), Transition::None);
}

#[test]
fn features_are_seen_through_windows() {
    let mut state = state();
    let mut seen = [0, 1, 2, u32::MAX].map(|select| {
        state.select_device_features(select);
        assert_eq!(state.device_feature_select(), select);
        state.device_features()
    });
    assert_eq!(seen, [EVENT_IDX as u32 | 1, 1, 0, 0]);
    want(&mut state, 0x1234_5678_9abc_def0);
    assert_eq!(state.features(), 0x1234_5678_9abc_def0);
    seen = [0, 1, 2, 3].map(|select| {
        state.select_driver_features(select);
        assert_eq!(state.driver_feature_select(), select);
        state.driver_features()
    });
    assert_eq!(seen, [0x9abc_def0, 0x1234_5678, 0, 0]);
}

#[test]
fn features_that_there_are_not_are_refused() {
    for (select, value, accepted) in [(2, 0, true), (2, 1, false), (u32::MAX, 1, false)] {
        let mut state = state();
        state.write_status(ACKNOWLEDGE | DRIVER);
        want(&mut state, VERSION_1);
        state.select_driver_features(select);
        state.write_driver_features(value);
        state.write_status(FEATURES_OK);
        assert_eq!(
            state.status() & FEATURES_OK != 0,
            accepted,
            "{select} {value}"
        );
    }
}

#[test]
fn an_iommu_that_is_offered_must_be_accepted() {
    for (features, accepted) in [
        (VERSION_1, false),
        (VERSION_1 | ACCESS_PLATFORM, true),
        (ACCESS_PLATFORM, false),
    ] {
        let mut state = DeviceState::new(OFFERED | ACCESS_PLATFORM, &[1]);
        state.write_status(ACKNOWLEDGE | DRIVER);
        want(&mut state, features);
        state.write_status(FEATURES_OK);
        assert_eq!(state.status() & FEATURES_OK != 0, accepted, "{features:#x}");
    }
}

#[test]
fn queue_registers_are_those_of_the_selected_queue() {
    let mut state = state();
    assert_eq!(state.queue_count(), 2);
    assert_eq!((state.queue_max_size(), state.queue_size()), (256, 256));
    state.write_queue_size(64);
    state.select_queue(1);
    assert_eq!((state.queue_max_size(), state.queue_size()), (16, 16));
    for size in [0, 3, 32, u16::MAX] {
        state.write_queue_size(size);
        assert_eq!(state.queue_size(), 16, "{size} is none");
    }
    state.write_queue_address(QueueAddress::Used, Half::High, 1);
    state.write_queue_address(QueueAddress::Used, Half::Low, 0x2000);
    state.write_queue_address(QueueAddress::Used, Half::High, 3);
    let halves = [Half::Low, Half::High].map(|half| state.queue_address(QueueAddress::Used, half));
    assert_eq!(halves, [0x2000, 3]);
    assert_eq!(state.queue_address(QueueAddress::Available, Half::Low), 0);
    state.write_queue_ready(true);
    state.select_queue(0);
    assert_eq!((state.queue_size(), state.queue_ready()), (64, false));

    // There is no queue 2.
    state.select_queue(2);
    state.write_queue_size(8);
    state.write_queue_ready(true);
    state.write_queue_address(QueueAddress::Descriptors, Half::Low, 16);
    assert_eq!((state.queue_max_size(), state.queue_size()), (0, 0));
    assert!(!state.queue_ready());
    assert_eq!(state.queue_address(QueueAddress::Descriptors, Half::Low), 0);
}

#[test]
fn an_enabled_queue_does_not_move() {
    let mut state = state();
    state.write_queue_address(QueueAddress::Descriptors, Half::Low, 0x1000);
    state.write_queue_ready(true);
    state.write_queue_address(QueueAddress::Descriptors, Half::Low, 0x2000);
    state.write_queue_size(8);
    assert_eq!(
        state.queue_address(QueueAddress::Descriptors, Half::Low),
        0x1000
    );
    assert_eq!(state.queue_size(), 256);
    // As MMIO drivers do before they give a queue up.
    state.write_queue_ready(false);
    state.write_queue_size(8);
    assert_eq!(state.queue_size(), 8);
}

#[test]
fn a_queue_that_was_not_enabled_stays_so_once_the_device_runs() {
    let mut state = running(VERSION_1);
    let before = state.save();
    state.write_queue_size(8);
    state.write_queue_address(QueueAddress::Used, Half::Low, 0x1000);
    state.write_queue_ready(true);
    assert_eq!(state.save(), before);
}

#[test]
fn the_device_speaks_up() {
    let state = running(VERSION_1);
    let transport = Arc::new(TestInterrupt::default());
    let interrupt = state.interrupt(transport.clone());
    interrupt.queue(1);
    assert_eq!((transport.queue_count(1), transport.config_count()), (1, 0));
    let generation = state.generation();
    interrupt.config_changed();
    assert_eq!(
        (state.generation(), transport.config_count()),
        (generation + 1, 1)
    );
    interrupt.needs_reset();
    assert_eq!(state.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(transport.config_count(), 2);
    assert!(!state.is_serving());
    assert!(state.is_running());
}

#[test]
fn registers_are_saved_whole() {
    let mut state = running(OFFERED);
    state.select_queue(1);
    state.select_device_features(1);
    state.next_generation();
    state
        .interrupt(Arc::new(TestInterrupt::default()))
        .needs_reset();
    let saved = state.save();
    let mut other = self::state();
    other.restore(saved.clone()).unwrap();
    assert_eq!(other.save(), saved);
    assert_eq!(saved.status & NEEDS_RESET, NEEDS_RESET);
    assert_eq!((saved.queue_select, saved.config_generation), (1, 1));
}

/// As version 1 was written: it must be read for ever.
#[test]
fn version_1_is_read() {
    let json = r#"{"status":15,"driver_features":4294967297,"unknown_features":false,"device_feature_select":1,
        "driver_feature_select":1,"queue_select":1,"config_generation":7,"queues":[
        {"size":256,"ready":true,"descriptors":4096,"available":8192,"used":12288,"next_available":9,"next_used":8,
        "broken":false},
        {"size":16,"ready":false,"descriptors":0,"available":0,"used":0,"next_available":0,"next_used":0,"broken":true}]}"#;
    let section = Section {
        kind: "virtio".to_owned(),
        version: 1,
        id: "it".to_owned(),
        data: json.into(),
    };
    let mut state = state();
    state.restore(section.decode().unwrap()).unwrap();
    assert_eq!(
        state.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    let saved = state.save();
    assert_eq!(
        (saved.queues[0].next_available, saved.queues[1].broken),
        (9, true)
    );
    assert_eq!(
        Section::encode("it", &saved)
            .unwrap()
            .decode::<RegistersV1>()
            .unwrap(),
        saved
    );
}

#[derive(Clone, Copy, Debug)]
enum Write {
    Status(u8),
    SelectFeatures(u32),
    Features(u32),
    SelectQueue(u16),
    Size(u16),
    Address(QueueAddress, Half, u32),
    Ready(bool),
    Fault,
}

fn any_write() -> impl Strategy<Value = Write> {
    let bit = prop_oneof![
        8 => (0..8_u8).prop_map(|bit| 1 << bit),
        4 => Just(ACKNOWLEDGE | DRIVER | FEATURES_OK),
        2 => any::<u8>(),
        1 => Just(0),
    ];
    let which = prop_oneof![
        Just(QueueAddress::Descriptors),
        Just(QueueAddress::Available),
        Just(QueueAddress::Used)
    ];
    let half = prop_oneof![Just(Half::Low), Just(Half::High)];
    prop_oneof![
        4 => bit.prop_map(Write::Status),
        2 => (0..3_u32).prop_map(Write::SelectFeatures),
        2 => prop_oneof![Just(1), Just(0), any::<u32>()].prop_map(Write::Features),
        1 => (0..3_u16).prop_map(Write::SelectQueue),
        1 => prop_oneof![any::<u16>(), Just(16)].prop_map(Write::Size),
        1 => (which, half, any::<u32>()).prop_map(|(w, h, v)| Write::Address(w, h, v)),
        1 => any::<bool>().prop_map(Write::Ready),
        1 => Just(Write::Fault),
    ]
}

proptest! {
    #[test]
    fn no_order_of_writes_breaks_the_rules(
        starts_running in any::<bool>(),
        writes in vec(any_write(), 0..200),
    ) {
        let mut state = if starts_running { running(VERSION_1) } else { state() };
        let interrupt = state.interrupt(Arc::new(TestInterrupt::default()));
        for write in writes {
            let before = state.save();
            let mut after_reset = false;
            match write {
                Write::Status(value) => match state.write_status(value) {
                    Transition::Reset => {
                        prop_assert_eq!(value, 0);
                        state.reset(OFFERED);
                        after_reset = true;
                    }
                    Transition::Start => {
                        prop_assert_eq!(before.status & (DRIVER_OK | NEEDS_RESET), 0);
                        prop_assert!(state.is_serving());
                    }
                    Transition::None => {
                        prop_assert_eq!(before.status & DRIVER_OK, state.status() & DRIVER_OK);
                    }
                },
                Write::SelectFeatures(select) => state.select_driver_features(select),
                Write::Features(value) => state.write_driver_features(value),
                Write::SelectQueue(select) => state.select_queue(select),
                Write::Size(size) => state.write_queue_size(size),
                Write::Address(which, half, value) => state.write_queue_address(which, half, value),
                Write::Ready(ready) => state.write_queue_ready(ready),
                Write::Fault => interrupt.needs_reset(),
            }
            let after = state.save();
            if after_reset {
                prop_assert_eq!(after.status, 0);
                prop_assert_eq!(&after.queues, &self::state().save().queues);
                continue;
            }
            prop_assert_eq!(after.status & before.status, before.status, "bits stay");
            if after.status & FEATURES_OK != 0 {
                prop_assert_eq!(after.driver_features & !OFFERED, 0);
                prop_assert_eq!(after.driver_features & VERSION_1, VERSION_1);
            }
            if before.status & FEATURES_OK != 0 {
                prop_assert_eq!(after.driver_features, before.driver_features);
            }
            if before.status & DRIVER_OK != 0 {
                prop_assert_eq!(&after.queues, &before.queues);
            }
            for (queue, max) in after.queues.iter().zip([256, 16]) {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= max);
            }
        }
    }
}
