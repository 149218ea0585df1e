//! Carries out in user space the instructions that KVM's emulator lacks.
//!
//! | where | what |
//! |---|---|
//! | `decode` | the instruction at RIP |
//! | `mmu` | page tables: linear to guest-physical addresses |
//! | `machine` | the vCPU at one instruction: registers, operands, exceptions |
//! | `special` | INT n, CLAC, STAC, XGETBV, RDTSCP, RDPID, PKRU, INVPCID, cache lines, MONITOR |
//! | `descriptors` | VERR, VERW, LAR, LSL |
//! | `xsave`, `xstate` | XSAVE and XRSTOR in all forms; the vCPU's image |
//! | `fpcontrol` | FWAIT, FNCLEX, FLDCW, LDMXCSR and their like; #NM, #MF, #UD checks |
//! | `atomic` | CMPXCHG16B for Rust |
//! | `native` | what only computes (POPCNT, CMPXCHG16B, BMI, x87, SSE, AVX, ...), on the host |
//!
//! ```
//! use hypervisor::fallback::{CpuState, Outcome, step};
//! # use hypervisor::x86::{CpuidEntry, DebugRegisters, Registers, SpecialRegisters, XsaveArea};
//! # use hypervisor::{GuestRam, RamError};
//! # struct Cpu(Registers, SpecialRegisters);
//! # impl CpuState for Cpu {
//! #     fn registers(&mut self) -> &mut Registers { &mut self.0 }
//! #     fn special(&mut self) -> &mut SpecialRegisters { &mut self.1 }
//! #     fn xsave(&mut self) -> Result<&XsaveArea, String> { Err("none".into()) }
//! #     fn xsave_mut(&mut self) -> Result<&mut XsaveArea, String> { Err("none".into()) }
//! #     fn xcr0(&mut self) -> Result<u64, String> { Ok(1) }
//! #     fn msr(&mut self, _: u32) -> Option<u64> { None }
//! #     fn set_msr(&mut self, _: u32, _: u64) -> bool { false }
//! #     fn debug(&mut self) -> Result<DebugRegisters, String> { Err("none".into()) }
//! #     fn cpuid(&self) -> &[CpuidEntry] { &[] }
//! # }
//! # struct Ram(Vec<u8>);
//! # impl GuestRam for Ram {
//! #     fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), RamError> {
//! #         let end = gpa as usize + buf.len();
//! #         buf.copy_from_slice(self.0.get(gpa as usize..end).ok_or(RamError { gpa, len: buf.len() })?);
//! #         Ok(())
//! #     }
//! #     fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), RamError> {
//! #         Err(RamError { gpa, len: buf.len() })
//! #     }
//! #     fn compare_exchange(&self, gpa: u64, _: u128, _: u128) -> Result<bool, RamError> {
//! #         Err(RamError { gpa, len: 16 })
//! #     }
//! # }
//! // `Cpu` holds plain registers: real mode, RIP 0. `Ram` is a vector with INT3 at address 0.
//! let mut cpu = Cpu(Registers::default(), SpecialRegisters::default());
//! cpu.special().cs.limit = 0xffff;
//! let ram = Ram(vec![0xcc; 16]);
//! match step(&mut cpu, &ram) {
//!     Ok(Outcome::Exception { vector, .. }) => assert_eq!(vector, 3),
//!     other => panic!("{other:?}"),
//! }
//! assert_eq!(cpu.registers().rip, 1);
//! ```

mod atomic;
mod decode;
mod descriptors;
mod fpcontrol;
mod machine;
pub(crate) mod mmu;
mod names;
mod native;
mod special;
#[cfg(test)]
mod tests;
mod xsave;
mod xstate;

use std::borrow::Cow;

pub(crate) use atomic::compare_exchange_16;
use machine::{Exception, Machine, Step, Stop};

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

/// Gets ready: makes the memory mappings that instructions run in. Call it before system calls are
/// restricted; otherwise the first instruction that needs them makes them (memfd_create, ftruncate,
/// mmap with PROT_EXEC, close).
///
/// # Errors
///
/// A sentence, when the system refuses.
pub fn prepare() -> Result<(), String> {
    native::prepare()
}

/// Carries out the one instruction at RIP.
///
/// # Errors
///
/// A [`Refusal`] for an instruction that is not one of those in the module's list, or cannot be
/// carried out here; nothing has been changed then, but accessed flags in page tables.
pub fn step(cpu: &mut dyn CpuState, ram: &dyn GuestRam) -> Result<Outcome, Refusal> {
    let mut machine = match Machine::new(cpu, ram) {
        Ok(machine) => machine,
        Err(Stop::Refuse(why)) => return Err(refusal("?".into(), &[], why)),
        Err(Stop::Exception(exception)) => return Ok(raised("?", exception)),
    };
    let result = decode::fetch(&mut machine).and_then(|()| {
        dispatch(&mut machine)?;
        machine.finish();
        Ok(())
    });
    let name = names::name(machine.instruction.mnemonic());
    match result {
        Ok(()) => Ok(Outcome::Done(name.into())),
        Err(Stop::Exception(exception)) => Ok(raised(name, exception)),
        Err(Stop::Refuse(why)) => Err(refusal(
            decode::text(&machine),
            machine.bytes.as_slice(),
            why,
        )),
    }
}

fn dispatch(machine: &mut Machine<'_>) -> Step {
    special::step(machine)
        .or_else(|| xsave::step(machine))
        .or_else(|| fpcontrol::step(machine))
        .or_else(|| descriptors::step(machine))
        .or_else(|| native::step(machine))
        .unwrap_or_else(|| Err(Stop::refuse("it is not on the list")))
}

fn raised(name: &'static str, exception: Exception) -> Outcome {
    Outcome::Exception {
        name: name.into(),
        vector: exception.vector,
        error_code: exception.error_code,
        cr2: exception.cr2,
    }
}

fn refusal(instruction: String, bytes: &[u8], why: String) -> Refusal {
    Refusal {
        instruction,
        bytes: bytes.to_vec(),
        why,
    }
}
