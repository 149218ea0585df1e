//! Serves KVM_EXIT_INTERNAL_ERROR of a failed emulation: the instruction fallback carries the
//! instruction out on a copy of the vCPU's state, and what it changed goes back to KVM.

use std::collections::BTreeMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::vcpu::KvmVcpu;
use super::xsave;
use crate::fallback::{self, CpuState, Outcome, Refusal};
use crate::vcpu::VcpuError;
use crate::x86::{CpuidEntry, DebugRegisters, Registers, SpecialRegisters, XsaveArea};

// Vectors (Intel SDM volume 3, section 6.15).
const DEBUG: u8 = 1;
const NMI: u8 = 2;
const INVALID_OPCODE: u8 = 6;
/// KVM takes lower ones for exceptions, and only those.
const FIRST_INTERRUPT: u8 = 32;

const RFLAGS_TF: u64 = 1 << 8;
/// A single step was the cause of #DB.
const DR6_BS: u64 = 1 << 14;

/// How often each kind of help was given.
#[derive(Default)]
pub(super) struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// One more of `name`; only the first of a name allocates.
    pub(super) fn count(&mut self, name: &str) {
        match self.0.get_mut(name) {
            Some(count) => *count = count.saturating_add(1),
            None => {
                self.0.insert(name.to_owned(), 1);
            }
        }
    }

    /// All of them.
    pub(super) fn all(&self) -> &BTreeMap<String, u64> {
        &self.0
    }
}

/// The state of a vCPU as the fallback sees it.
struct State<'a> {
    fd: &'a VcpuFd,
    registers: Registers,
    special: SpecialRegisters,
    cpuid: &'a [CpuidEntry],
    /// Lent by the vCPU, so that an instruction need not allocate.
    xsave: &'a mut XsaveArea,
    xsave_loaded: bool,
    xsave_changed: bool,
}

impl CpuState for State<'_> {
    fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn special(&mut self) -> &mut SpecialRegisters {
        &mut self.special
    }

    fn xsave(&mut self) -> Result<&XsaveArea, String> {
        if !self.xsave_loaded {
            xsave::read(self.fd, self.xsave).map_err(|e| format!("reading the XSAVE area: {e}"))?;
            self.xsave_loaded = true;
        }
        Ok(self.xsave)
    }

    fn xsave_mut(&mut self) -> Result<&mut XsaveArea, String> {
        self.xsave()?;
        self.xsave_changed = true;
        Ok(self.xsave)
    }

    fn xcr0(&mut self) -> Result<u64, String> {
        let xcrs = self
            .fd
            .get_xcrs()
            .map_err(|e| format!("reading XCR0: {e}"))?;
        xcrs.xcrs
            .iter()
            .take(xcrs.nr_xcrs as usize)
            .find(|xcr| xcr.xcr == 0)
            .map(|xcr| xcr.value)
            .ok_or_else(|| "KVM does not tell XCR0".into())
    }

    fn msr(&mut self, index: u32) -> Option<u64> {
        let mut msrs = one_msr(index, 0)?;
        (self.fd.get_msrs(&mut msrs) == Ok(1)).then(|| msrs.as_slice().first().map(|m| m.data))?
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        one_msr(index, value).is_some_and(|msrs| self.fd.set_msrs(&msrs) == Ok(1))
    }

    fn debug(&mut self) -> Result<DebugRegisters, String> {
        self.fd
            .get_debug_regs()
            .map_err(|e| format!("reading the debug registers: {e}"))
    }

    fn cpuid(&self) -> &[CpuidEntry] {
        self.cpuid
    }
}

fn one_msr(index: u32, data: u64) -> Option<Msrs> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).ok()
}

impl KvmVcpu {
    /// Carries out the instruction at RIP, or makes the vCPU take the exception that it raises.
    ///
    /// What KVM would make an exception of the guest's user code by itself (#UD, KVM API,
    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE) becomes one here: user code cannot end its VM.
    pub(super) fn emulate(&mut self) -> Result<(), VcpuError> {
        self.load_cpuid()?;
        let (before, special_before) = self.state_at_exit()?;
        let mut state = State {
            fd: &self.fd,
            registers: before,
            special: special_before,
            cpuid: self.cpuid.get_mut(),
            xsave: &mut self.xsave,
            xsave_loaded: false,
            xsave_changed: false,
        };
        let outcome = fallback::step(&mut state, &*self.shared.ram);
        let State {
            registers,
            mut special,
            xsave_changed,
            ..
        } = state;
        let (name, exception) = match outcome {
            Ok(Outcome::Done(name)) => (name, None),
            Ok(Outcome::Exception {
                name,
                vector,
                error_code,
                cr2,
            }) => {
                special.cr2 = cr2.unwrap_or(special.cr2);
                (name, Some((vector, error_code)))
            }
            Err(refusal) if self.is_new(before.rip, &refusal) => return Ok(()),
            Err(refusal) if special_before.cs.dpl == 3 => {
                log::debug!(
                    "vCPU {}: `{}` at {:#x} of user code becomes #UD: {}",
                    self.id,
                    refusal.instruction,
                    before.rip,
                    refusal.why
                );
                return self.inject(INVALID_OPCODE, None);
            }
            Err(refusal) => return Err(self.refused(before.rip, refusal)),
        };
        log::trace!("vCPU {}: {name} at {:#x}", self.id, before.rip);
        self.refused = None;
        if registers != before {
            self.fd
                .set_regs(&registers)
                .map_err(self.error("setting the general registers"))?;
        }
        if special != special_before {
            self.fd
                .set_sregs(&special)
                .map_err(self.error("setting the special registers"))?;
        }
        if xsave_changed {
            xsave::write(&self.fd, &self.xsave).map_err(self.error("setting the XSAVE area"))?;
        }
        self.counters.count(&name);
        match exception {
            Some((vector, error_code)) => self.inject(vector, error_code),
            None if before.rflags & RFLAGS_TF != 0 => self.single_step(),
            None => Ok(()),
        }
    }

    /// The next run begins with this exception, or with the interrupt of INT n.
    fn inject(&self, vector: u8, error_code: Option<u32>) -> Result<(), VcpuError> {
        let mut events = self
            .fd
            .get_vcpu_events()
            .map_err(self.error("reading the pending events"))?;
        if vector < FIRST_INTERRUPT && vector != NMI {
            events.exception.injected = 1;
            events.exception.pending = 0;
            events.exception.nr = vector;
            events.exception.has_error_code = error_code.is_some().into();
            events.exception.error_code = error_code.unwrap_or(0);
        } else {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
            events.interrupt.soft = 0;
        }
        self.fd
            .set_vcpu_events(&events)
            .map_err(self.error("injecting an exception"))
    }

    /// The trap after an instruction that began with RFLAGS.TF set.
    fn single_step(&self) -> Result<(), VcpuError> {
        let mut debug = self
            .fd
            .get_debug_regs()
            .map_err(self.error("reading the debug registers"))?;
        debug.dr6 |= DR6_BS;
        self.fd
            .set_debug_regs(&debug)
            .map_err(self.error("setting the debug registers"))?;
        self.inject(DEBUG, None)
    }

    /// Whether KVM is to try a refused instruction once more: another vCPU may have written it since KVM
    /// read it, as kernels do when they patch themselves by way of an INT3. The second refusal stands.
    fn is_new(&mut self, rip: u64, refusal: &Refusal) -> bool {
        let this = Some((rip, refusal.bytes.clone()));
        let new = self.refused != this;
        self.refused = this;
        new
    }

    fn refused(&self, rip: u64, refusal: Refusal) -> VcpuError {
        let bytes: Vec<String> = refusal.bytes.iter().map(|b| format!("{b:02x}")).collect();
        VcpuError::Emulation {
            cpu: self.id,
            rip,
            instruction: refusal.instruction,
            bytes: bytes.join(" "),
            why: refusal.why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_name() {
        let mut counters = Counters::default();
        for name in ["int3", "xrstor", "int3"] {
            counters.count(name);
        }
        let all: Vec<_> = counters
            .all()
            .iter()
            .map(|(n, c)| (n.as_str(), *c))
            .collect();
        assert_eq!(all, [("int3", 2), ("xrstor", 1)]);
    }
}
