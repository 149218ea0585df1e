//! The host's end of consoles: the terminal, and output that never makes a vCPU wait.

mod escape;
mod output;
pub mod terminal;

use virtio_devices::VsockListener;

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
