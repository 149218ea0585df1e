//! Carries out in user space the instructions that KVM's emulator lacks.

use std::borrow::Cow;

use crate::memory::GuestRam;
use crate::x86::{CpuidEntry, DebugRegisters, Registers, SpecialRegisters, XsaveArea};

/// The state of one vCPU that an instruction may read or change. The vCPU fills it from KVM before
/// [`step`] and writes back what is marked changed after it.
pub trait CpuState {
    /// General registers, RIP, RFLAGS.
    fn registers(&mut self) -> &mut Registers;
    /// Segment and control registers.
    fn special(&mut self) -> &mut SpecialRegisters;
    /// XSAVE area, standard format; read from KVM at the first call, written back if `xsave_mut`
    /// was called.
    fn xsave(&mut self) -> Result<&XsaveArea, String>;
    /// The same, to change.
    fn xsave_mut(&mut self) -> Result<&mut XsaveArea, String>;
    /// XCR0.
    fn xcr0(&mut self) -> Result<u64, String>;
    /// An MSR's value, or `None` where KVM refuses it.
    fn msr(&mut self, index: u32) -> Option<u64>;
    /// Sets an MSR (for the supervisor components of XSAVES); false where KVM refuses it.
    fn set_msr(&mut self, index: u32, value: u64) -> bool;
    /// DR0 to DR7.
    fn debug(&mut self) -> Result<DebugRegisters, String>;
    /// CPUID as the guest sees it.
    fn cpuid(&self) -> &[CpuidEntry];
}

/// What came of a step.
#[derive(Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Carried out; RIP is past it. The name is the mnemonic in lower case, for the counters.
    Done(Cow<'static, str>),
    /// The architecture says that it raises an exception, which the vCPU now injects.
    Exception {
        /// Mnemonic in lower case.
        name: Cow<'static, str>,
        /// Vector.
        vector: u8,
        /// Error code, for those that have one.
        error_code: Option<u32>,
        /// CR2 for #PF.
        cr2: Option<u64>,
    },
}

/// An instruction that the fallback will not or cannot carry out.
#[derive(Debug, Eq, PartialEq)]
pub struct Refusal {
    /// The instruction as text, or `?`.
    pub instruction: String,
    /// Its bytes (up to 15).
    pub bytes: Vec<u8>,
    /// Why.
    pub why: String,
}

/// Carries out the one instruction at RIP.
pub fn step(cpu: &mut dyn CpuState, ram: &dyn GuestRam) -> Result<Outcome, Refusal> {
    let _ = (cpu, ram);
    Err(Refusal {
        instruction: "?".into(),
        bytes: vec![],
        why: "not built yet".into(),
    })
}
