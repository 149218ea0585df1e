//! Traits that hide KVM, the KVM back end behind them, and the instruction fallback.
//!
//! A VMM holds a `dyn Hypervisor`, asks it for a `dyn Vm`, and that for one `Box<dyn Vcpu>` a thread.
//! Register structures are those of the Linux user API for x86-64 KVM, under the names of the
//! architecture manual: nothing is converted on the way.

pub mod fallback;
pub mod kvm;
mod memory;
mod vcpu;
mod vm;
pub mod x86;

pub use memory::{GuestRam, RamError};
pub use vcpu::{Kick, SystemEvent, Vcpu, VcpuError, VmExit};
pub use vm::{
    DirtyBitmap, Hypervisor, HypervisorError, IoEventAddress, IrqRoute, IrqTarget, MemorySlot,
    MsiMessage, Vm, VmError,
};
