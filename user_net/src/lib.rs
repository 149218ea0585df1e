//! A network for a virtual machine inside the process, without root and without a tap: a gateway with DHCP and DNS that carries
//! the guest's connections and datagrams over ordinary sockets of the host, and ports of the host into the guest.
//!
//! [`UserNet::new`] gives the device's end of a socket. Each message on it is an Ethernet frame after a virtio-net header of 12
//! bytes (virtio 1.2 §5.1.6), in both directions, as on a tap. [`UserNet::run`] is the network's loop, for a thread of its own; it
//! ends when the device's end is closed.
//!
//! ```
//! use std::thread;
//! use user_net::{HostForward, UserNet, UserNetConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut ssh: HostForward = "tcp:127.0.0.1:2222-:22".parse()?;
//! ssh.host.set_port(0); // any port that is free
//! let config = UserNetConfig { hostfwd: vec![ssh], ..UserNetConfig::default() };
//! let (network, device) = UserNet::new(&config)?;
//! let offloads = network.offloads(); // for the driver's word on what it takes
//! assert!(network.forwards()[0].port() != 0);
//! let thread = thread::spawn(|| network.run());
//!
//! // Frames go in and out by `device`, until:
//! offloads.set(true, true);
//! drop(device);
//! assert!(matches!(thread.join(), Ok(Ok(()))));
//! # Ok(()) }
//! ```
//!
//! What a guest can reach, and what not:
//!
//! | address | means |
//! |---|---|
//! | gateway (.2 of the network) | DHCP and echo; with [`UserNetConfig::host_loopback`] ports of the host's 127.0.0.1 |
//! | DNS server (.3) | port 53 over UDP and TCP: the host's resolver |
//! | guest (.15) | the only address whose packets are taken |
//! | 0/8, 127/8, 169.254/16, 224/4, 240/4 | closed: the host itself, credentials of clouds, everybody |
//! | all others | what the host reaches there; the host's own other addresses are among them, as for its neighbours |
//!
//! The guest may be hostile. Connections, flows and what they hold are bounded: see [`MAX_CONNECTIONS`] and [`MAX_FLOWS`]. A
//! packet that makes no sense is dropped. What one side sends waits in that side's own kernel until the other takes it.
//!
//! Not here: IPv6, nameservers that have only IPv6 addresses, IP protocols other than TCP, UDP and ICMP echo, datagrams of the guest
//! that come in fragments (to the guest they go in fragments), errors of ICMP from outside. Connections are no state to be saved: a
//! guest that is restored elsewhere finds them reset.

mod config;
mod connection;
mod dhcp;
mod dns;
mod engine;
mod flow;
mod forward;
mod guest;
mod link;
mod policy;
mod shared;
mod stack;
mod sys;
mod tcp;
pub mod testing;
mod udp_forward;

pub use config::{Network, NetworkError, Resolver, UserNetConfig};
pub use engine::{MTUS, UserNet, UserNetError};
pub use flow::MAX_FLOWS;
pub use forward::{HostForward, HostForwardError, Protocol};
pub use link::Offloads;
pub use tcp::MAX_CONNECTIONS;
