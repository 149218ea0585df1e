//! What the tests share: a sink that takes notes, a function with everything, and a device around it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::bar::{BarKind, Bars};
use crate::configuration::{ConfigurationBuilder, ConfigurationSpace, Identity};
use crate::device::PciDevice;
use crate::msi::Msi;
use crate::msix::{MsixLayout, MsixTable};
use crate::vectors::{MsiMessage, MsiSink};

pub fn message(address: u64, data: u32) -> MsiMessage {
    MsiMessage { address, data }
}

/// Notes of what it was told.
#[derive(Default)]
pub struct RecordingSink {
    routes: Mutex<BTreeMap<u16, Option<MsiMessage>>>,
    route_calls: Mutex<usize>,
    triggered: Mutex<Vec<u16>>,
    /// Signalled from outside while without a route.
    pub outside: Mutex<Vec<u16>>,
    pub refuse_routes: AtomicBool,
    pub refuse_triggers: AtomicBool,
}

impl RecordingSink {
    /// The latest route of each vector that ever had one.
    pub fn routes(&self) -> BTreeMap<u16, Option<MsiMessage>> {
        self.routes.lock().unwrap().clone()
    }

    pub fn route_calls(&self) -> usize {
        *self.route_calls.lock().unwrap()
    }

    pub fn take_triggered(&self) -> Vec<u16> {
        std::mem::take(&mut self.triggered.lock().unwrap())
    }
}

impl MsiSink for RecordingSink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        if message.is_some() && self.refuse_routes.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        *self.route_calls.lock().unwrap() += 1;
        let before = self.routes.lock().unwrap().insert(vector, message);
        assert_ne!(before.flatten(), message, "told only of changes");
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        if self.refuse_triggers.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let route = self.routes.lock().unwrap().get(&vector).copied();
        assert!(route.flatten().is_some(), "triggers only what has a route");
        self.triggered.lock().unwrap().push(vector);
        Ok(())
    }

    fn take_pending(&self, vector: u16) -> bool {
        let mut outside = self.outside.lock().unwrap();
        let before = outside.len();
        outside.retain(|other| *other != vector);
        outside.len() != before
    }
}

/// A function with everything: BAR 0 32-bit memory of 64 KiB, BAR 1 ports, BAR 2 prefetchable 64-bit memory of 8 GiB,
/// BAR 4 32-bit prefetchable memory with MSI-X, a vendor's capability, MSI-X with 4 vectors, MSI with 4, INTA#.
pub struct Rig {
    pub config: ConfigurationSpace,
    pub table: Arc<MsixTable>,
    pub msi: Arc<Msi>,
    pub msix_sink: Arc<RecordingSink>,
    pub msi_sink: Arc<RecordingSink>,
    /// Offsets of the capabilities.
    pub vendor_at: u16,
    pub msix_at: u16,
    pub msi_at: u16,
}

pub const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1041,
    revision: 1,
    class: 0x02_00_0a,
    subsystem_vendor: 0x1122,
    subsystem: 0x3344,
};

pub const LAYOUT: MsixLayout = MsixLayout {
    table_bar: 4,
    table_offset: 0,
    pba_bar: 4,
    pba_offset: 0x800,
};

impl Rig {
    pub fn new() -> Self {
        let msix_sink = Arc::new(RecordingSink::default());
        let msi_sink = Arc::new(RecordingSink::default());
        let table = MsixTable::new(4, LAYOUT, msix_sink.clone()).unwrap();
        let msi = Msi::new(4, msi_sink.clone()).unwrap();
        let mut builder = ConfigurationBuilder::new(IDENTITY);
        let memory32 = |prefetchable| BarKind::Memory32 { prefetchable };
        builder.bar(0, memory32(false), 0x1_0000).unwrap();
        builder.bar(1, BarKind::Io, 0x20).unwrap();
        let memory64 = BarKind::Memory64 { prefetchable: true };
        builder.bar(2, memory64, 8 << 30).unwrap();
        builder.bar(4, memory32(true), 0x1000).unwrap();
        let vendor_at = builder
            .capability(0x09, &[5, 0xaa, 0xbb], &[0, 0x0f, 0])
            .unwrap();
        let msix_at = builder.msix(&table).unwrap();
        let msi_at = builder.msi(&msi).unwrap();
        builder.interrupt_pin(1);
        Self {
            config: builder.build(),
            table,
            msi,
            msix_sink,
            msi_sink,
            vendor_at: vendor_at.into(),
            msix_at: msix_at.into(),
            msi_at: msi_at.into(),
        }
    }
}

/// A device that answers with its mark and takes notes of where its BARs go.
pub struct TestDevice {
    pub config: Mutex<ConfigurationSpace>,
    mark: u8,
    /// `(bar, address, mapped)`.
    pub moves: Mutex<Vec<(usize, u64, bool)>>,
    pub writes: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    /// No BAR may be mapped here.
    pub refuse: Mutex<Option<u64>>,
}

impl TestDevice {
    pub fn new(mark: u8, bars: &[(usize, BarKind, u64)]) -> Arc<Self> {
        let mut builder = ConfigurationBuilder::new(IDENTITY);
        for (index, kind, size) in bars {
            builder.bar(*index, *kind, *size).unwrap();
        }
        Self::with(mark, builder.build())
    }

    pub fn with(mark: u8, config: ConfigurationSpace) -> Arc<Self> {
        Arc::new(Self {
            config: Mutex::new(config),
            mark,
            moves: Mutex::default(),
            writes: Mutex::default(),
            refuse: Mutex::default(),
        })
    }

    pub fn take_moves(&self) -> Vec<(usize, u64, bool)> {
        std::mem::take(&mut self.moves.lock().unwrap())
    }
}

impl PciDevice for TestDevice {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        assert!(usize::from(offset % 4) + data.len() <= 4, "within a dword");
        self.config.lock().unwrap().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset % 4) + data.len() <= 4, "within a dword");
        self.config.lock().unwrap().write(offset, data);
    }

    fn bars(&self) -> Bars {
        self.config.lock().unwrap().bars()
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(self.mark ^ (bar as u8) << 4 ^ offset as u8);
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        let note = (bar, offset, data.to_vec());
        self.writes.lock().unwrap().push(note);
    }

    fn bar_mapped(&self, bar: usize, address: u64) -> io::Result<()> {
        if *self.refuse.lock().unwrap() == Some(address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        self.moves.lock().unwrap().push((bar, address, true));
        Ok(())
    }

    fn bar_unmapped(&self, bar: usize, address: u64) {
        self.moves.lock().unwrap().push((bar, address, false));
    }
}

/// No vectors.
pub const NONE: [u16; 0] = [];
