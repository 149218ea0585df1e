//! The host's end of consoles: the terminal, and output that never makes a vCPU wait.

mod escape;
mod output;
pub mod terminal;

pub use escape::{Escape, Typed};
pub use output::{Output, flush_in_panic};
