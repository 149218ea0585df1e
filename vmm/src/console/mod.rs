//! The host's end of consoles: the terminal, and output that never makes a vCPU wait.

mod escape;
mod output;
pub mod terminal;

pub use escape::{Escape, Typed};
pub use output::{Output, flush_in_panic};

/// Where the consoles of a machine print; none where the output is dropped.
#[derive(Clone, Default)]
pub struct Outputs {
    /// COM1.
    pub serial: Option<Output>,
    /// The virtio console.
    pub console: Option<Output>,
}
