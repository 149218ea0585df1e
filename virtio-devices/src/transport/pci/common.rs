//! The common configuration structure (virtio 1.2 §4.1.4.3). Each register answers writes of its own width at its own offset, the
//! 64-bit ones also in halves; any other write changes nothing. Reads may be of any width.

use log::debug;
use vm_virtio::{DeviceCore, DeviceMemory, Half, QueueAddress};

use super::interrupt::PciInterrupt;
use crate::transport::ErrorChain;

/// Bytes of the structure, with the two registers that version 1.2 added. Neither of those is used: their features
/// (notification data, queue reset) are not offered.
pub(super) const SIZE: usize = 0x3c;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_MSIX_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_MSIX_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;

const ADDRESSES: [(usize, QueueAddress); 3] = [
    (QUEUE_DESC, QueueAddress::Descriptors),
    (QUEUE_DRIVER, QueueAddress::Available),
    (QUEUE_DEVICE, QueueAddress::Used),
];

/// The driver reads at `offset`. What is past the end reads as 0.
pub(super) fn read<M: DeviceMemory>(
    core: &mut DeviceCore<M>,
    interrupt: &PciInterrupt,
    offset: usize,
    data: &mut [u8],
) {
    let mut bytes = [0; SIZE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    // The device compares its configuration for it: only where it is read.
    if (offset..offset.saturating_add(data.len())).contains(&CONFIG_GENERATION) {
        put(
            CONFIG_GENERATION,
            &core.config_generation().to_le_bytes()[..1],
        );
    }
    let registers = core.registers();
    let queue = registers.queue_select();
    let exists = queue < registers.queue_count();
    put(
        DEVICE_FEATURE_SELECT,
        &registers.device_feature_select().to_le_bytes(),
    );
    put(DEVICE_FEATURE, &registers.device_features().to_le_bytes());
    put(
        DRIVER_FEATURE_SELECT,
        &registers.driver_feature_select().to_le_bytes(),
    );
    put(DRIVER_FEATURE, &registers.driver_features().to_le_bytes());
    put(CONFIG_MSIX_VECTOR, &interrupt.config_vector().to_le_bytes());
    put(NUM_QUEUES, &registers.queue_count().to_le_bytes());
    put(DEVICE_STATUS, &[registers.status()]);
    put(QUEUE_SELECT, &queue.to_le_bytes());
    put(QUEUE_SIZE, &registers.queue_size().to_le_bytes());
    put(
        QUEUE_MSIX_VECTOR,
        &interrupt.queue_vector(queue).to_le_bytes(),
    );
    put(
        QUEUE_ENABLE,
        &u16::from(registers.queue_ready()).to_le_bytes(),
    );
    put(
        QUEUE_NOTIFY_OFF,
        &if exists { queue } else { 0 }.to_le_bytes(),
    );
    for (at, which) in ADDRESSES {
        put(at, &registers.queue_address(which, Half::Low).to_le_bytes());
        put(
            at + 4,
            &registers.queue_address(which, Half::High).to_le_bytes(),
        );
    }
    data.fill(0);
    for (to, from) in data.iter_mut().zip(bytes.iter().skip(offset)) {
        *to = *from;
    }
}

/// The driver writes `data` at `offset`.
pub(super) fn write<M: DeviceMemory>(
    core: &mut DeviceCore<M>,
    interrupt: &PciInterrupt,
    offset: usize,
    data: &[u8],
) {
    match *data {
        [value] if offset == DEVICE_STATUS => write_status(core, interrupt, value),
        [a, b] => write16(core, interrupt, offset, u16::from_le_bytes([a, b])),
        [a, b, c, d] => write32(core, offset, u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] if ADDRESSES.iter().any(|(at, _)| *at == offset) => {
            write32(core, offset, u32::from_le_bytes([a, b, c, d]));
            write32(core, offset + 4, u32::from_le_bytes([e, f, g, h]));
        }
        _ => {}
    }
}

fn write_status<M: DeviceMemory>(core: &mut DeviceCore<M>, interrupt: &PciInterrupt, value: u8) {
    if let Err(error) = core.write_status(value) {
        // The driver sees NEEDS_RESET, or a device that is reset all the same.
        debug!("{}", ErrorChain(&error));
    }
    if value == 0 {
        interrupt.reset();
    }
}

fn write16<M: DeviceMemory>(
    core: &mut DeviceCore<M>,
    interrupt: &PciInterrupt,
    offset: usize,
    value: u16,
) {
    let registers = core.registers_mut();
    match offset {
        CONFIG_MSIX_VECTOR => interrupt.set_config_vector(value),
        QUEUE_SELECT => registers.select_queue(value),
        QUEUE_SIZE => registers.write_queue_size(value),
        QUEUE_MSIX_VECTOR => interrupt.set_queue_vector(registers.queue_select(), value),
        // A driver must not write 0 (§4.1.4.3.2): a queue once enabled stays so until a reset.
        QUEUE_ENABLE if value == 1 => registers.write_queue_ready(true),
        _ => {}
    }
}

fn write32<M: DeviceMemory>(core: &mut DeviceCore<M>, offset: usize, value: u32) {
    let registers = core.registers_mut();
    match offset {
        DEVICE_FEATURE_SELECT => registers.select_device_features(value),
        DRIVER_FEATURE_SELECT => registers.select_driver_features(value),
        DRIVER_FEATURE => registers.write_driver_features(value),
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
