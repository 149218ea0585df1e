//! Virtio devices, a file or folder each, and the PCI transport that they sit behind. Knows no hypervisor: a device is given guest
//! memory, a way to start threads, and, on PCI, one to send messages.
//!
//! A disk on a PCI bus:
//!
//! ```
//! use std::io;
//! use std::sync::Arc;
//!
//! use block_util::{Engine, RawDisk, RawOptions};
//! use pci::{MsiMessage, MsiSink, PciBus, Windows};
//! use virtio_devices::transport::pci::{ByHand, Host, VirtioPciDevice};
//! use virtio_devices::{Block, BlockConfig};
//! use vm_device::Bus;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! /// With KVM: an irqfd a vector.
//! struct Nowhere;
//!
//! impl MsiSink for Nowhere {
//!     fn set_route(&self, _vector: u16, _message: Option<MsiMessage>) -> io::Result<()> {
//!         Ok(())
//!     }
//!     fn trigger(&self, _vector: u16) -> io::Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = tempfile::NamedTempFile::new()?;
//! image.as_file().set_len(1 << 20)?;
//! let disk = RawDisk::open(image.path(), &RawOptions::default())?;
//! let block = Block::new(
//!     BlockConfig { id: "disk0".into(), queues: 1, queue_size: 128, serial: "0001".into(), engine: Engine::Auto, affinity: vec![], poll: true },
//!     Arc::new(disk),
//! )?;
//!
//! let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
//! let host = Host {
//!     msi: Arc::new(Nowhere),
//!     notifications: Arc::new(ByHand),
//!     spawn: Arc::new(|name, job| std::thread::Builder::new().name(name).spawn(job).map(drop)),
//!     extra_features: 0,
//! };
//! let device = Arc::new(VirtioPciDevice::new("disk0", Box::new(block), memory, host)?);
//!
//! let windows = Windows { memory64: Some(1 << 32..=(1 << 33) - 1), ..Windows::default() };
//! let bus = PciBus::new(0, windows, Arc::new(Bus::default()), Arc::new(Bus::default()));
//! let slot = bus.add(None, device)?;
//! // The guest finds it.
//! let mut ids = [0; 4];
//! bus.read_config(slot, 0, 0, &mut ids);
//! assert_eq!(u32::from_le_bytes(ids), 0x1042_1af4);
//! # Ok(()) }
//! ```

mod balloon;
mod block;
mod console;
mod discard;
pub mod iommu;
mod mem;
mod net;
mod offer;
mod pieces;
mod pmem;
pub mod transport;
mod unix;
pub mod vhost_user;
mod vsock;

pub use balloon::{
    Balloon, BalloonConfig, BalloonControl, BalloonError, BalloonStatistics, BalloonV1,
};
pub use block::{Block, BlockConfig, BlockControl, BlockError, BlockV1, SERIAL_LEN};
pub use console::{Console, ConsoleError, ConsoleHandle, ConsoleInput, ConsoleV1};
pub use discard::{DiscardError, DiscardRam};
pub use mem::{MEM_BLOCK, Mem, MemConfig, MemControl, MemError, MemV1};
pub use net::{NET_OFFLOADS, Net, NetConfig, NetControl, NetError, NetV1, PacketQueue};
pub use offer::{HostError, Made, Offer, OfferError, OfferedOption, Services};
pub use pmem::{Pmem, PmemConfig};
pub use vsock::{MOST_VSOCK_STREAMS, Vsock, VsockError, VsockListener, VsockV1};

// Devices that need no more than their file: a VMM finds option, configuration and device by this list.
offer::offered! {
    rng: RngConfig,
    watchdog: WatchdogConfig,
}
