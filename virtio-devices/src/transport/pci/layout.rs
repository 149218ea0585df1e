//! What a virtio device looks like in configuration space: its ids and the capabilities that say where its registers are (virtio 1.2
//! §4.1.2, §4.1.4).

use std::sync::Arc;

use pci::{
    BarKind, ConfigurationBuilder, ConfigurationError, ConfigurationSpace, Identity, MsiSink,
    MsixLayout, MsixTable, registers,
};
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_FS, VIRTIO_ID_NET,
};

use super::{TransportError, common};

/// The BAR with everything in it.
pub(super) const BAR: usize = 0;
/// Its bytes.
pub(super) const BAR_SIZE: u64 = 0x1_0000;
/// Bytes of each part, but for the table, which takes what is left.
pub(super) const PART: u64 = 0x1000;

/// Offsets of the parts.
pub(super) const COMMON: u64 = 0;
pub(super) const ISR: u64 = PART;
pub(super) const DEVICE: u64 = 2 * PART;
pub(super) const NOTIFY: u64 = 3 * PART;
const MSIX_PENDING: u64 = 4 * PART;
const MSIX_TABLE: u64 = 5 * PART;

/// Bytes between the addresses of two queues' notifications (§4.1.4.4).
pub(super) const NOTIFY_MULTIPLIER: u64 = 4;

/// The most queues that a device on PCI can have here: as many as have room for their notifications.
pub const MAX_QUEUES: usize = (PART / NOTIFY_MULTIPLIER) as usize;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// A device that is no transitional one has at least this (§4.1.2.1).
const REVISION: u8 = 1;

/// `cfg_type` of the capabilities.
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// Bytes of a capability without its id and link.
const BODY: usize = 14;
/// Where the data of the window capability are in it.
const WINDOW_DATA: u16 = 16;

/// Class, subclass and interface. Drivers go by the device id; this is for those who list devices.
fn class(device_type: u32) -> u32 {
    match device_type {
        // Ethernet.
        VIRTIO_ID_NET => 0x02_00_00,
        // Other mass storage.
        VIRTIO_ID_BLOCK | VIRTIO_ID_FS => 0x01_80_00,
        // Other communication.
        VIRTIO_ID_CONSOLE => 0x07_80_00,
        // Other memory.
        VIRTIO_ID_BALLOON => 0x05_80_00,
        _ => 0xff_00_00,
    }
}

/// The configuration space of a device, its vectors, and where in it the window is.
pub(super) struct Function {
    pub config: ConfigurationSpace,
    pub table: Arc<MsixTable>,
    pub window: u16,
}

impl Function {
    /// Of the device `id` with so many queues and bytes of configuration.
    pub fn new(
        id: &str,
        device_type: u32,
        queues: usize,
        config_len: usize,
        msi: Arc<dyn MsiSink>,
    ) -> Result<Self, TransportError> {
        let not_virtio = || TransportError::Device {
            id: id.to_owned(),
            device_type,
            queues,
            config_len,
        };
        let device = u16::try_from(device_type)
            .ok()
            .and_then(|number| FIRST_DEVICE.checked_add(number))
            .ok_or_else(not_virtio)?;
        let config_len = u32::try_from(config_len)
            .ok()
            .filter(|len| u64::from(*len) <= PART)
            .ok_or_else(not_virtio)?;
        if queues > MAX_QUEUES {
            return Err(not_virtio());
        }
        let layout = MsixLayout {
            table_bar: BAR,
            table_offset: MSIX_TABLE as u32,
            pba_bar: BAR,
            pba_offset: MSIX_PENDING as u32,
        };
        // One for the configuration. At most 1025.
        let table = MsixTable::new(queues as u16 + 1, layout, msi).map_err(|source| {
            TransportError::Msix {
                id: id.to_owned(),
                source,
            }
        })?;
        let identity = Identity {
            vendor: VENDOR,
            device,
            revision: REVISION,
            class: class(device_type),
            subsystem_vendor: VENDOR,
            // At least 0x40, so that no legacy driver takes it for its own.
            subsystem: device,
        };
        let (config, window) =
            build(identity, queues as u32, config_len, &table).map_err(|source| {
                TransportError::Configuration {
                    id: id.to_owned(),
                    source,
                }
            })?;
        Ok(Self {
            config,
            table,
            window,
        })
    }
}

fn build(
    identity: Identity,
    queues: u32,
    config_len: u32,
    table: &Arc<MsixTable>,
) -> Result<(ConfigurationSpace, u16), ConfigurationError> {
    let mut builder = ConfigurationBuilder::new(identity);
    // Reading the ISR status has a side effect.
    builder.bar(
        BAR,
        BarKind::Memory64 {
            prefetchable: false,
        },
        BAR_SIZE,
    )?;
    let mut add = |body: &[u8], writable: &[u8]| {
        builder.capability(registers::CAPABILITY_VENDOR, body, writable)
    };
    let read_only = [0; BODY + 4];
    let mut region =
        |kind, offset: u64, len| add(&body(kind, 0, offset as u32, len), &read_only[..BODY]);
    region(CAP_COMMON, COMMON, common::SIZE as u32)?;
    region(CAP_ISR, ISR, 1)?;
    if config_len > 0 {
        region(CAP_DEVICE, DEVICE, config_len)?;
    }
    let mut notify = [0; BODY + 4];
    let multiplier = NOTIFY_MULTIPLIER as u32;
    notify[..BODY].copy_from_slice(&body(CAP_NOTIFY, 4, NOTIFY as u32, multiplier * queues));
    notify[BODY..].copy_from_slice(&multiplier.to_le_bytes());
    add(&notify, &read_only)?;

    let mut window = [0; BODY + 4];
    window[..BODY].copy_from_slice(&body(CAP_PCI, 4, 0, 0));
    let mut writable = [0; BODY + 4];
    // BAR; offset, length and data.
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let window = add(&window, &writable)?;
    builder.msix(table)?;
    Ok((builder.build(), u16::from(window)))
}

/// A capability without its id and link: its length (`extra` bytes follow), kind, BAR, id, padding, and the region.
fn body(kind: u8, extra: u8, offset: u32, len: u32) -> [u8; BODY] {
    let mut body = [0; BODY];
    body[0] = BODY as u8 + 2 + extra;
    body[1] = kind;
    body[2] = BAR as u8;
    body[6..10].copy_from_slice(&offset.to_le_bytes());
    body[10..14].copy_from_slice(&len.to_le_bytes());
    body
}

/// What the window capability shows of the BAR (§4.1.4.9).
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub offset: u64,
    /// 1, 2 or 4.
    pub len: usize,
    /// Where its data are in configuration space.
    pub data: u16,
}

impl Window {
    /// The window of the capability `at`, if an access of `len` bytes at `offset` of configuration space reaches its data and the
    /// driver made it show something.
    pub fn reached(config: &ConfigurationSpace, at: u16, offset: u16, len: usize) -> Option<Self> {
        let data = at + WINDOW_DATA;
        let end = usize::from(offset).checked_add(len)?;
        if offset >= data + 4 || end <= usize::from(data) {
            return None;
        }
        let mut bar = [0];
        let mut words = [[0; 4]; 2];
        config.read(at + 4, &mut bar);
        config.read(at + 8, &mut words[0]);
        config.read(at + 12, &mut words[1]);
        let [start, len] = words.map(u32::from_le_bytes);
        let inside = start.is_multiple_of(len.max(1)) && u64::from(start) < BAR_SIZE;
        (bar == [BAR as u8] && matches!(len, 1 | 2 | 4) && inside).then_some(Self {
            offset: u64::from(start),
            len: len as usize,
            data,
        })
    }
}
