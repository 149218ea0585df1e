//! The registers (virtio 1.2 §4.2.2). Each has 32 bits and answers only to them, at its own offset: what else is read is 0, and what
//! else is written changes nothing.

use log::debug;
use vm_virtio::{DeviceCore, DeviceMemory, Half, QueueAddress};

use super::interrupt::MmioInterrupt;
use crate::transport::ErrorChain;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION_2: u32 = 2;
const VENDOR: u32 = 0x1af4;
/// Length and address of a shared memory region that there is not (§4.2.2, SHMLen and SHMBase).
const NO_REGION: u32 = u32::MAX;

const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Offset of the register of notifications: the driver writes a queue's number to it.
pub const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
pub(super) const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_BASE_HIGH: u64 = 0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
/// Offset of the device's configuration space.
pub(super) const CONFIG: u64 = 0x100;

const ADDRESSES: [(u64, QueueAddress); 3] = [
    (QUEUE_DESC, QueueAddress::Descriptors),
    (QUEUE_DRIVER, QueueAddress::Available),
    (QUEUE_DEVICE, QueueAddress::Used),
];

/// The driver reads the register at `offset`, which is not the interrupt status.
pub(super) fn read<M: DeviceMemory>(core: &mut DeviceCore<M>, offset: u64) -> u32 {
    let registers = core.registers();
    match offset {
        MAGIC_VALUE => MAGIC,
        VERSION => VERSION_2,
        DEVICE_ID => core.device_type(),
        VENDOR_ID => VENDOR,
        DEVICE_FEATURES => registers.device_features(),
        QUEUE_NUM_MAX => registers.queue_max_size().into(),
        QUEUE_READY => registers.queue_ready().into(),
        STATUS => registers.status().into(),
        SHM_LEN_LOW..=SHM_BASE_HIGH if offset.is_multiple_of(4) => NO_REGION,
        CONFIG_GENERATION => core.config_generation(),
        // Only to be written, or none.
        _ => 0,
    }
}

/// The driver writes `value` to the register at `offset`, which is neither that of notifications nor that of the interrupt.
pub(super) fn write<M: DeviceMemory>(
    core: &mut DeviceCore<M>,
    interrupt: &MmioInterrupt,
    offset: u64,
    value: u32,
) {
    let registers = core.registers_mut();
    match offset {
        DEVICE_FEATURES_SEL => registers.select_device_features(value),
        DRIVER_FEATURES => registers.write_driver_features(value),
        DRIVER_FEATURES_SEL => registers.select_driver_features(value),
        // No device has that many queues: a number past them all stands for none.
        QUEUE_SEL => registers.select_queue(u16::try_from(value).unwrap_or(u16::MAX)),
        QUEUE_NUM => registers.write_queue_size(u16::try_from(value).unwrap_or(0)),
        QUEUE_READY if value < 2 => registers.write_queue_ready(value == 1),
        STATUS => {
            if let Ok(value) = u8::try_from(value) {
                write_status(core, interrupt, value);
            }
        }
        _ => {
            for (at, which) in ADDRESSES {
                if offset == at {
                    registers.write_queue_address(which, Half::Low, value);
                } else if offset == at + 4 {
                    registers.write_queue_address(which, Half::High, value);
                }
            }
        }
    }
}

fn write_status<M: DeviceMemory>(core: &mut DeviceCore<M>, interrupt: &MmioInterrupt, value: u8) {
    if let Err(error) = core.write_status(value) {
        // The driver sees NEEDS_RESET, or a device that is reset all the same.
        debug!("{}", ErrorChain(&error));
    }
    if value == 0 {
        interrupt.set(0);
    }
}
