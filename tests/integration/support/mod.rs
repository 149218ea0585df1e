//! What the tests share: where things are, the VMM as a process, what guests report, images made by hand.

pub mod files;
pub mod images;
pub mod initramfs;
pub mod process;
pub mod pty;
pub mod report;
pub mod sniffer;

pub use files::{Kvm, asset, binary_mmio, test_guest};
pub use process::{Ended, Vmm, pause_to_the_end};
pub use report::{BareMetal, Report};
