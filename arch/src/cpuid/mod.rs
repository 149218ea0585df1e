//! What a vCPU answers to CPUID (Intel SDM volume 2, "CPUID"; AMD APM volume 3, appendix E): what KVM supports, less
//! what the VMM does not offer, with the vCPU's own identity and the guest's topology.
//!
//! ```
//! use arch::cpuid::{CpuIdentity, build};
//!
//! let identity = CpuIdentity { id: 1, count: 4, ..CpuIdentity::default() };
//! let entries = build(&[], &identity);
//! let level = entries.iter().find(|e| e.function == 0xb && e.index == 1).unwrap();
//! assert_eq!((level.ebx, level.edx), (4, 1));
//! ```

mod leaves;
#[cfg(test)]
mod tests;
mod topology;

use hypervisor::x86::CpuidEntry;

use self::leaves::Leaves;
use self::topology::Levels;
pub use self::topology::Topology;

/// Who a vCPU is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuIdentity {
    /// Number of the vCPU, which is its x2APIC id.
    pub id: u32,
    /// How many vCPUs the guest can have, those plugged in later included.
    pub count: u32,
    /// How they are arranged; `None`: one package of `count` cores.
    pub topology: Option<Topology>,
    /// Frequency of the time stamp counter in kHz, told to the guest if known.
    pub tsc_khz: Option<u32>,
    /// Whether the guest may use 5-level paging, where the host has it.
    pub five_level: bool,
}

/// Bits of leaf 1, ECX.
mod leaf1 {
    pub(super) const MONITOR: u32 = 1 << 3;
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const SMX: u32 = 1 << 6;
    /// Performance capabilities MSR.
    pub(super) const PDCM: u32 = 1 << 15;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// EDX: more than one logical processor in a package.
    pub(super) const HTT: u32 = 1 << 28;
}

/// Bits of leaf 7.
mod leaf7 {
    pub(super) const EBX_SGX: u32 = 1 << 2;
    pub(super) const EBX_PROCESSOR_TRACE: u32 = 1 << 25;
    pub(super) const ECX_LA57: u32 = 1 << 16;
    pub(super) const ECX_SGX_LAUNCH: u32 = 1 << 30;
    pub(super) const EDX_ARCH_LBR: u32 = 1 << 19;
}

/// Bits of leaf 0x8000_0001, ECX.
mod extended1 {
    /// More than one core in a package (AMD).
    pub(super) const CMP_LEGACY: u32 = 1 << 1;
    pub(super) const SVM: u32 = 1 << 2;
    /// Performance counters: core, northbridge, last-level cache.
    pub(super) const PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;
    pub(super) const MONITORX: u32 = 1 << 29;
}

/// Leaves that describe what the guest doesn't get: MONITOR, performance counters, SGX, processor trace, last branch
/// records, SVM, AMD performance counters, encrypted memory.
const HIDDEN: [u32; 8] = [
    0x5,
    0xa,
    0x12,
    0x14,
    0x1c,
    0x8000_000a,
    0x8000_0022,
    0x8000_001f,
];

/// Frequency of KVM's APIC timer in kHz.
const APIC_TIMER_KHZ: u32 = 1_000_000;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;

/// The leaves for one vCPU, sorted by function and index. `supported` is what KVM supports
/// (KVM_GET_SUPPORTED_CPUID); its hypervisor leaves, feature bits and XSAVE sizes are kept, but for features that the
/// VMM doesn't offer: MONITOR, nested VMX and SVM, SGX, performance counters and tracing.
pub fn build(supported: &[CpuidEntry], identity: &CpuIdentity) -> Vec<CpuidEntry> {
    let levels = Levels::of(identity);
    let mut leaves = Leaves::new(supported);
    let amd = leaves.is_amd();
    for function in HIDDEN {
        leaves.remove(function);
    }
    features(&mut leaves, identity, &levels, amd);
    topology::apply(&mut leaves, identity.id, &levels, amd);
    if let Some(khz) = identity.tsc_khz {
        timing(&mut leaves, khz, amd);
    }
    leaves.into_entries()
}

/// Width in bits of the guest's physical addresses, from leaf 0x8000_0008: 36 to 52. Where the leaf is missing, 36, which
/// every processor with long mode has (Intel SDM volume 3, section 4.1.4).
pub fn address_bits(supported: &[CpuidEntry]) -> u8 {
    let told = supported
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008)
        .map_or(0, |leaf| leaf.eax & 0xff);
    u8::try_from(told.clamp(36, 52)).unwrap_or(36)
}

fn features(leaves: &mut Leaves, identity: &CpuIdentity, levels: &Levels, amd: bool) {
    let logical = levels.per_package;
    leaves.change(1, |leaf| {
        leaf.ecx &= !(leaf1::MONITOR | leaf1::VMX | leaf1::SMX | leaf1::PDCM);
        leaf.ecx |= leaf1::X2APIC | leaf1::TSC_DEADLINE | leaf1::HYPERVISOR;
        leaf.edx &= !leaf1::HTT;
        if logical > 1 {
            leaf.edx |= leaf1::HTT;
        }
        leaf.ebx = (leaf.ebx & 0xffff) | logical.min(0xff) << 16 | (identity.id & 0xff) << 24;
    });
    leaves.change(7, |leaf| {
        if leaf.index != 0 {
            return;
        }
        leaf.ebx &= !(leaf7::EBX_SGX | leaf7::EBX_PROCESSOR_TRACE);
        leaf.ecx &= !leaf7::ECX_SGX_LAUNCH;
        leaf.edx &= !leaf7::EDX_ARCH_LBR;
        if !identity.five_level {
            leaf.ecx &= !leaf7::ECX_LA57;
        }
    });
    leaves.change(0x8000_0001, |leaf| {
        leaf.ecx &= !(extended1::SVM | extended1::PERFCTR | extended1::MONITORX);
        if amd {
            leaf.ecx &= !extended1::CMP_LEGACY;
            if logical > 1 {
                leaf.ecx |= extended1::CMP_LEGACY;
            }
        }
    });
}

/// Leaf 0x4000_0010 (frequencies of TSC and APIC timer in kHz), and on Intel leaf 0x15, which lets a kernel do
/// without a calibration against timers that this machine doesn't have.
fn timing(leaves: &mut Leaves, tsc_khz: u32, amd: bool) {
    if leaves.has(HYPERVISOR_BASE) {
        leaves.set(HYPERVISOR_TIMING, None, [tsc_khz, APIC_TIMER_KHZ, 0, 0]);
        leaves.raise(HYPERVISOR_BASE, HYPERVISOR_TIMING);
    }
    if !amd && leaves.has(0) {
        // The crystal counts what the APIC timer counts; TSC = crystal * EBX / EAX.
        leaves.set(
            0x15,
            None,
            [APIC_TIMER_KHZ, tsc_khz, APIC_TIMER_KHZ * 1000, 0],
        );
        leaves.raise(0, 0x15);
    }
}
