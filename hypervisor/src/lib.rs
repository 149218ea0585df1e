//! Traits that hide KVM, the KVM back end behind them, and the instruction fallback.
//!
//! A VMM holds a `dyn Hypervisor`, asks it for a `dyn Vm`, and that for one `Box<dyn Vcpu>` a thread.
//! Register structures are those of the Linux user API for x86-64 KVM, under the names of the
//! architecture manual: nothing is converted on the way.
//!
//! ```
//! use std::sync::Arc;
//!
//! use hypervisor::kvm::Kvm;
//! use hypervisor::{Hypervisor, HypervisorError, MemorySlot, VmExit};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kvm = match Kvm::new() {
//!     Err(e @ HypervisorError::Open { .. }) => {
//!         println!("no guest here: {e}");
//!         return Ok(());
//!     }
//!     other => other?,
//! };
//!
//! // One page of RAM at the reset vector: `mov al, 42; out 0x10, al` in real mode.
//! let ram = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0xffff_f000), 0x1000)])?);
//! ram.write_slice(&[0xb0, 42, 0xe6, 0x10], GuestAddress(0xffff_fff0))?;
//! let vm = kvm.create_vm(Arc::new(ram.clone()))?;
//! vm.set_tss_address(0xfffb_d000)?;
//! let slot = MemorySlot {
//!     slot: 0,
//!     guest_address: 0xffff_f000,
//!     size: 0x1000,
//!     host_address: ram.get_host_address(GuestAddress(0xffff_f000))? as u64,
//!     read_only: false,
//!     log_dirty: false,
//! };
//! // SAFETY: `ram` owns the range, and is dropped after the VM and its vCPU.
//! unsafe { vm.set_memory_slot(&slot) }?;
//!
//! let mut vcpu = vm.create_vcpu(0)?;
//! match vcpu.run()? {
//!     VmExit::IoOut { port, data, .. } => assert_eq!((port, data), (0x10, &[42][..])),
//!     other => panic!("{other:?}"),
//! }
//! # Ok(())
//! # }
//! ```

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
