//! A virtual CPU: state in and out, and the run loop's exits.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::x86::{
    CpuidEntry, DebugRegisters, ExtendedControlRegisters, FpuState, LapicState, MpState, MsrEntry,
    Registers, SpecialRegisters, VcpuEvents, XsaveArea,
};

/// Why a vCPU left guest mode.
#[derive(Debug)]
pub enum VmExit<'a> {
    /// Port input. `data` holds one or more elements of `size` bytes (string input), to be filled
    /// in order.
    IoIn {
        /// Port number.
        port: u16,
        /// Bytes an element: 1, 2 or 4.
        size: usize,
        /// What the guest gets; its length is a multiple of `size`.
        data: &'a mut [u8],
    },
    /// Port output; elements as in [`VmExit::IoIn`].
    IoOut {
        /// Port number.
        port: u16,
        /// Bytes an element: 1, 2 or 4.
        size: usize,
        /// What the guest wrote; its length is a multiple of `size`.
        data: &'a [u8],
    },
    /// Read of an address without memory.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// What the guest gets, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// Write to an address without memory (or to a read-only slot).
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// What the guest wrote, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// End of interrupt for a level-triggered vector that the user-space IOAPIC delivered.
    IoapicEoi(u8),
    /// The vCPU halted with no in-kernel LAPIC to wait in.
    Hlt,
    /// Triple fault: the machine shuts down (Intel SDM volume 3, section 6.15, #DF).
    TripleFault,
    /// The guest or KVM asked for a system event.
    SystemEvent(SystemEvent),
    /// A signal or [`Kick`] ended the run; nothing happened in the guest.
    Interrupted,
    /// A debug event (breakpoint or single step) that the back end did not want for itself.
    Debug {
        /// Exception number: 1 (#DB) or 3 (#BP).
        exception: u32,
        /// Linear address of the instruction.
        pc: u64,
        /// DR6 as it was at the event.
        dr6: u64,
    },
}

/// KVM_EXIT_SYSTEM_EVENT, by kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SystemEvent {
    /// The guest asked for power off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest says that it crashed.
    Crash,
    /// Any other kind, by its number.
    Other(u32),
}

/// What can go wrong with a vCPU.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("vCPU {cpu}: {what}")]
    Ioctl {
        /// vCPU number.
        cpu: u32,
        /// What was tried, e.g. `setting the special registers`.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// KVM refused some MSRs of a list.
    #[error("vCPU {cpu}: KVM refused MSR {index:#x}")]
    Msr {
        /// vCPU number.
        cpu: u32,
        /// The MSR's number.
        index: u32,
    },
    /// KVM_RUN failed at entry.
    #[error("vCPU {cpu}: hardware refused to enter the guest, reason {reason:#x}")]
    FailEntry {
        /// vCPU number.
        cpu: u32,
        /// Hardware's reason code.
        reason: u64,
    },
    /// KVM could not carry out an instruction, and neither could the fallback.
    #[error("vCPU {cpu}: cannot carry out `{instruction}` at {rip:#x} (bytes {bytes}): {why}")]
    Emulation {
        /// vCPU number.
        cpu: u32,
        /// Instruction pointer.
        rip: u64,
        /// The instruction as text, or `?`.
        instruction: String,
        /// Its bytes in hexadecimal.
        bytes: String,
        /// What stood in the way.
        why: String,
    },
    /// An internal error of KVM other than a failed emulation.
    #[error("vCPU {cpu}: internal error {suberror} of KVM at {rip:#x}")]
    Internal {
        /// vCPU number.
        cpu: u32,
        /// KVM's number.
        suberror: u32,
        /// Instruction pointer.
        rip: u64,
    },
    /// An exit that this back end does not know.
    #[error("vCPU {cpu}: unexpected exit {exit}")]
    UnexpectedExit {
        /// vCPU number.
        cpu: u32,
        /// Its name or number.
        exit: String,
    },
}

/// Makes a vCPU leave guest mode, from any thread, without a race.
///
/// [`set`](Kick::set) first, then send the vCPU's thread a signal whose handler does nothing: a run
/// in progress ends, and one about to begin ends at once. The vCPU's thread calls
/// [`clear`](Kick::clear) when it has seen why.
pub trait Kick: Send + Sync {
    /// The next or present run ends with [`VmExit::Interrupted`].
    fn set(&self);
    /// Runs go on again.
    fn clear(&self);
}

/// A virtual CPU, owned by its thread.
///
/// Getters and setters speak of the state between two calls of [`run`](Vcpu::run); an exit's
/// pending completion (a port or MMIO read) is finished by the next run, so state is to be taken
/// after a run that ended with [`VmExit::Interrupted`].
pub trait Vcpu: Send {
    /// Number of the vCPU, which is its (x2)APIC id.
    fn id(&self) -> u32;
    /// Runs the guest up to the next exit that the back end does not handle itself.
    fn run(&mut self) -> Result<VmExit<'_>, VcpuError>;
    /// A handle that ends runs; it stays valid after the vCPU is gone.
    fn kick(&self) -> std::sync::Arc<dyn Kick>;

    /// General registers, RIP and RFLAGS.
    fn registers(&self) -> Result<Registers, VcpuError>;
    /// Sets them.
    fn set_registers(&self, registers: &Registers) -> Result<(), VcpuError>;
    /// Segment, control, descriptor-table registers, EFER and APIC base.
    fn special_registers(&self) -> Result<SpecialRegisters, VcpuError>;
    /// Sets them.
    fn set_special_registers(&self, registers: &SpecialRegisters) -> Result<(), VcpuError>;
    /// x87 and SSE state in the FXSAVE sense.
    fn fpu(&self) -> Result<FpuState, VcpuError>;
    /// Sets it.
    fn set_fpu(&self, fpu: &FpuState) -> Result<(), VcpuError>;
    /// The whole XSAVE area.
    fn xsave(&self) -> Result<XsaveArea, VcpuError>;
    /// Sets it; an area of another length is an error.
    fn set_xsave(&self, area: &[u8]) -> Result<(), VcpuError>;
    /// XCR0 and its like.
    fn xcrs(&self) -> Result<ExtendedControlRegisters, VcpuError>;
    /// Sets them.
    fn set_xcrs(&self, xcrs: &ExtendedControlRegisters) -> Result<(), VcpuError>;
    /// CPUID as the guest sees it.
    fn cpuid(&self) -> Result<Vec<CpuidEntry>, VcpuError>;
    /// Sets CPUID; only before the first run.
    fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), VcpuError>;
    /// Reads these MSRs; those that KVM refuses are left out and named in the debug log.
    fn msrs(&self, indices: &[u32]) -> Result<Vec<MsrEntry>, VcpuError>;
    /// Sets these MSRs in order. The first that KVM refuses is an error.
    fn set_msrs(&self, msrs: &[MsrEntry]) -> Result<(), VcpuError>;
    /// The local APIC's registers.
    fn lapic(&self) -> Result<LapicState, VcpuError>;
    /// Sets them. To be done before MSR 0x6e0 (TSC deadline) is.
    fn set_lapic(&self, lapic: &LapicState) -> Result<(), VcpuError>;
    /// Runnable, waiting for SIPI, halted, and so on.
    fn mp_state(&self) -> Result<MpState, VcpuError>;
    /// Sets it.
    fn set_mp_state(&self, state: MpState) -> Result<(), VcpuError>;
    /// Pending exceptions, interrupts, NMIs.
    fn events(&self) -> Result<VcpuEvents, VcpuError>;
    /// Sets them.
    fn set_events(&self, events: &VcpuEvents) -> Result<(), VcpuError>;
    /// DR0 to DR7.
    fn debug_registers(&self) -> Result<DebugRegisters, VcpuError>;
    /// Sets them.
    fn set_debug_registers(&self, registers: &DebugRegisters) -> Result<(), VcpuError>;
    /// Tells the guest's kvmclock that the host paused it.
    fn notify_paused(&self) -> Result<(), VcpuError>;
    /// Injects a non-maskable interrupt.
    fn nmi(&self) -> Result<(), VcpuError>;
    /// Frequency of the guest's TSC in kHz.
    fn tsc_khz(&self) -> Result<u32, VcpuError>;
    /// How often the fallback served the guest, by kind of instruction or remedy
    /// (`xrstor`, `int3`, `syscall`); empty on hardware that needs none.
    fn counters(&self) -> BTreeMap<String, u64>;
}
