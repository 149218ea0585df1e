//! Register and table structures of x86-64, as the Linux KVM user API lays them out.

pub use kvm_bindings::{
    kvm_clock_data as ClockData, kvm_cpuid_entry2 as CpuidEntry, kvm_debugregs as DebugRegisters,
    kvm_dtable as DescriptorTable, kvm_fpu as FpuState, kvm_lapic_state as LapicState,
    kvm_mp_state as MpState, kvm_msr_entry as MsrEntry, kvm_regs as Registers,
    kvm_segment as Segment, kvm_sregs as SpecialRegisters, kvm_vcpu_events as VcpuEvents,
    kvm_xcrs as ExtendedControlRegisters,
};

/// The XSAVE area of a vCPU in the standard (non-compacted) format, at least 4096 bytes
/// (Intel SDM volume 1, chapter 13).
pub type XsaveArea = Vec<u8>;
