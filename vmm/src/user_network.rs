//! From `--net user` to a network on a thread of this process, and the device's end of it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use net_util::{Offloads, SocketQueue};
use thiserror::Error;
use user_net::{UserNet, UserNetError};
use virtio_devices::PacketQueue;

use crate::config::{NetConfig, UserNetworkConfig};
use crate::event::EventSender;
use crate::threads;

/// What such a network takes from a driver, and a driver can take from it.
pub const OFFLOADS: Offloads = Offloads::CSUM.union(Offloads::TSO4);

/// Why there is no network.
#[derive(Debug, Error)]
pub enum UserNetworkError {
    /// Its addresses or ports cannot be had.
    #[error(transparent)]
    Network(#[from] UserNetError),
    /// Its thread does not start.
    #[error("starting the thread of a user network")]
    Thread(#[source] io::Error),
}

/// Starts the network of the device `id`, which `user` describes.
pub fn start(
    id: &str,
    config: &NetConfig,
    user: &UserNetworkConfig,
    events: &EventSender,
) -> Result<UserEnd, UserNetworkError> {
    let (network, device) = UserNet::new(&user.network(config.mtu))?;
    let offloads = network.offloads();
    let name = format!("{id}_user");
    let run = move || {
        if let Err(e) = network.run() {
            log::error!("{}", crate::error_chain(&e));
        }
    };
    let thread = events
        .try_clone()
        .and_then(|events| threads::spawn(name, events, run))
        .map_err(UserNetworkError::Thread)?;
    Ok(UserEnd {
        queue: SocketQueue::new(device),
        offloads,
        _thread: Thread(Some(thread)),
    })
}

/// The device's end. The network ends with it, and when it is dropped the network's ports are free again: the fields are dropped in
/// this order.
pub struct UserEnd {
    queue: SocketQueue,
    offloads: Arc<user_net::Offloads>,
    _thread: Thread,
}

/// Waits for the network's thread when it is dropped.
struct Thread(Option<JoinHandle<Option<()>>>);

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // Should it have panicked, the control thread has heard of it.
            let _ = thread.join();
        }
    }
}

impl AsRawFd for UserEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.queue.as_raw_fd()
    }
}

impl PacketQueue for UserEnd {
    unsafe fn read_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the same is asked of the caller.
        unsafe { self.queue.read_packet(pieces) }
    }

    unsafe fn write_packet(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the same is asked of the caller.
        unsafe { self.queue.write_packet(pieces) }
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let checksum = offloads.contains(Offloads::CSUM);
        self.offloads
            .set(checksum, offloads.contains(Offloads::TSO4));
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        // There is one queue, which stays.
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}
