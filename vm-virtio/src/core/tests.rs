//! A device that cannot do what is asked of it.

use serde::{Deserialize, Serialize};
use vm_migration::Schema;

use super::*;
use crate::feature::{ACCESS_PLATFORM, RING_FEATURES};
use crate::testing::Request;
use crate::testing::{Guest, TestInterrupt, TestMemory, memory, spawn};
use crate::{Chain, WorkerError, read_config_bytes, status};

#[derive(Deserialize, Serialize)]
struct BrittleV1 {}

impl Schema for BrittleV1 {
    const KIND: &'static str = "brittle";
    const VERSION: u32 = 1;
}

/// What a device does.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    /// It does not start.
    NotStart,
    /// It starts, and loses its queues.
    NotStop,
    /// It uses a chain when it is to stop, and tells nobody.
    UseLate,
}

struct Brittle<M> {
    does: Does,
    at_work: Option<(M, Vec<DeviceQueue>)>,
}

fn brittle(does: Does) -> Box<Brittle<TestMemory>> {
    Box::new(Brittle {
        does,
        at_work: None,
    })
}

impl<M: DeviceMemory> VirtioDevice<M> for Brittle<M> {
    fn device_type(&self) -> u32 {
        99
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[4]
    }

    fn config_len(&self) -> usize {
        6
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        assert!(offset + data.len() <= 6);
        read_config_bytes(&[1, 2, 3, 4, 5, 6], offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= 6);
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        if self.does == Does::NotStart {
            return Err(DeviceError::Device("opening the tap", "no tap".into()));
        }
        self.at_work = Some((activation.memory, activation.queues));
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        match self.at_work.take() {
            Some((memory, mut queues)) if self.does == Does::UseLate => {
                let mut chain = Chain::new();
                assert!(queues[0].pop(&*memory.memory(), &mut chain).unwrap());
                queues[0]
                    .add_used(&*memory.memory(), chain.head(), 0)
                    .unwrap();
                Ok(queues)
            }
            _ => Err(WorkerError::Gone {
                name: "brittle".to_owned(),
            }
            .into()),
        }
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        Section::encode(id, &BrittleV1 {})
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        section.decode::<BrittleV1>().map(drop)
    }
}

fn guest(does: Does) -> Guest {
    let mut guest = Guest::new(brittle(does));
    assert!(guest.negotiate(RING_FEATURES));
    guest.set_up_queues();
    guest
}

/// An error and its causes in one line.
fn line(error: &CoreError) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

#[test]
fn a_device_that_does_not_start_asks_for_a_reset() {
    let mut guest = guest(Does::NotStart);
    let status = guest.core.registers().status() | status::DRIVER_OK;
    let error = guest.core.write_status(status).unwrap_err();
    assert_eq!(
        line(&error),
        "starting a virtio device of type 99: opening the tap: no tap"
    );
    guest.wait_needs_reset();
    assert_eq!(guest.interrupt.config_count(), 1);
    assert!(!guest.core.is_active());
    // Nor does it when the VM resumes.
    guest.core.pause().unwrap();
    guest.core.resume().unwrap();
    assert!(!guest.core.is_active());
    guest.core.write_status(0).unwrap();
    assert_eq!(guest.core.registers().status(), 0);
}

#[test]
fn a_device_that_does_not_stop_is_reset_all_the_same() {
    let stop = "stopping a virtio device of type 99: running its workers: \
                thread \"brittle\" is gone, and its queues with it";
    let mut guest = guest(Does::NotStop);
    guest.driver_ok();
    assert!(guest.core.is_active());
    assert_eq!(line(&guest.core.write_status(0).unwrap_err()), stop);
    assert_eq!(guest.core.registers().status(), 0);

    guest = self::guest(Does::NotStop);
    guest.driver_ok();
    assert_eq!(line(&guest.core.pause().unwrap_err()), stop);
    guest.wait_needs_reset();
    guest.core.resume().unwrap();
    assert!(!guest.core.is_active(), "its queues are lost");
}

#[test]
fn a_device_sees_only_accesses_to_what_it_has() {
    let mut guest = guest(Does::NotStop);
    let read = |core: &DeviceCore<TestMemory>, offset| {
        let mut data = [0xee; 4];
        core.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(&guest.core, 1), [2, 3, 4, 5]);
    assert_eq!(read(&guest.core, 4), [5, 6, 0, 0]);
    for offset in [6, 7, u64::MAX] {
        assert_eq!(read(&guest.core, offset), [0; 4]);
        guest.core.write_config(offset, &[1]);
    }
    guest.core.write_config(4, &[0; 4]);
    guest.core.write_config(4, &[0; 2]);
}

#[test]
fn the_machine_can_add_features() {
    let device = brittle(Does::NotStart);
    let interrupt = Arc::new(TestInterrupt::default());
    let mut core = DeviceCore::new(device, ACCESS_PLATFORM, memory(), interrupt, spawn()).unwrap();
    let offered = RING_FEATURES | ACCESS_PLATFORM;
    assert_eq!(core.registers().offered_features(), offered);
    core.reset().unwrap();
    assert_eq!(core.registers().offered_features(), offered);
    assert_eq!(core.device_type(), 99);
    assert!(core.kick(0).is_some() && core.kick(1).is_none());
}

#[test]
fn a_core_can_be_a_bus_device_in_a_lock() {
    fn goes_anywhere<T: Send>() {}
    goes_anywhere::<DeviceCore<TestMemory>>();
}

#[test]
fn what_is_used_last_before_a_pause_is_told_at_once() {
    let mut guest = guest(Does::UseLate);
    guest.driver_ok();
    let request = Request {
        readable: vec![1],
        writable: 0,
    };
    guest.offer(0, &request);
    guest.core.pause().unwrap();
    assert_eq!(guest.interrupt.queue_count(0), 1);
    assert!(guest.take_used(0).is_some());
}
