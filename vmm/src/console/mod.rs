//! The host's end of consoles: the terminal, clients of sockets and pseudo-terminals, and output that never makes a vCPU wait.

mod client;
mod door;
mod escape;
mod output;
pub mod terminal;

use virtio_devices::VsockListener;

pub use client::{HISTORY, InputSlot, TypedInput};
pub use door::Door;
pub use escape::{Escape, Typed};
pub use output::{Output, flush_in_panic};

/// The host's ends of a machine that outlive its resets: where its consoles print, none where the output is dropped, and its listener.
#[derive(Clone, Default)]
pub struct Outputs {
    /// COM1.
    pub serial: Option<Output>,
    /// The virtio console.
    pub console: Option<Output>,
    /// Where programs of the host connect to the guest's sockets.
    pub vsock: Option<VsockListener>,
}
