//! Network interfaces of the host, as a virtual machine uses them and without the machine: taps that are created, found by
//! name or handed over as descriptors, macvtaps, their addresses and offloads, packets in and out; sockets to networks in software.
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use net_util::{MAX_PACKET_LEN, MacAddr, Offloads, Tap, TapOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Without a name the kernel makes up one. Gone with its last queue.
//! let tap = Tap::open(&TapOptions { name: None, queues: 2 })?;
//! let interface = tap.interface();
//! interface.set_mac(MacAddr::random()?)?;
//! interface.add_address("192.168.249.1".parse()?, 24)?;
//! interface.add_address("fd00:249::1".parse()?, 64)?;
//! interface.set_mtu(9000)?;
//! interface.set_up(true)?;
//! tap.set_offloads(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6)?;
//!
//! let mut queue = &tap.queues()[0];
//! let mut packet = [0; MAX_PACKET_LEN];
//! let len = queue.read(&mut packet)?;
//! queue.write_all(&packet[..len])?;
//! # Ok(()) }
//! ```

mod batch;
mod interface;
mod link;
mod mac;
mod netlink;
mod queue;
mod socket;
mod tap;

pub use batch::{MAX_BATCH, ReceiveBatch, SendBatch};
pub use interface::{Interface, InterfaceError};
pub use link::LinkMonitor;
pub use mac::{MacAddr, MacError};
pub use queue::{MAX_PACKET_LEN, TapQueue, VNET_HEADER_LEN};
pub use socket::SocketQueue;
pub use tap::{Offloads, Tap, TapError, TapOptions};
