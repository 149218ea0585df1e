//! A KVM vCPU: its run loop, and its state in and out.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs,
};
use kvm_ioctls::VcpuFd;

use super::emulation::Counters;
use super::exit::{self, Own};
use super::kick::KvmKick;
use super::syscall_remedy::{Hit, Remedy};
use super::vm::Shared;
use super::xsave;
use crate::vcpu::{Kick, Vcpu, VcpuError, VmExit};
use crate::x86::{
    CpuidEntry, DebugRegisters, ExtendedControlRegisters, FpuState, LapicState, MpState, MsrEntry,
    Registers, SpecialRegisters, VcpuEvents, XsaveArea,
};

const MENDING: &str = "mending SYSCALL";

/// A vCPU.
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
    pub(super) id: u32,
    pub(super) shared: Arc<Shared>,
    pub(super) counters: Counters,
    /// Where the fallback refused an instruction last, and the bytes there.
    pub(super) refused: Option<(u64, Vec<u8>)>,
    /// CPUID as KVM shows it, once the fallback wanted it; empty before.
    pub(super) cpuid: RefCell<Vec<CpuidEntry>>,
    /// The fallback's copy of the XSAVE area; of no meaning between two instructions.
    pub(super) xsave: XsaveArea,
    /// Where SYSCALL needs mending.
    remedy: Option<Remedy>,
    kick: Arc<KvmKick>,
}

impl KvmVcpu {
    pub(super) fn new(mut fd: VcpuFd, id: u32, shared: Arc<Shared>) -> Result<Self, VcpuError> {
        let kick = KvmKick::new(&fd).map_err(|source| VcpuError::Ioctl {
            cpu: id,
            what: "mapping its run structure",
            source,
        })?;
        let remedy = shared.mend_syscall.then(|| Remedy::new(&mut fd));
        Ok(Self {
            fd,
            id,
            counters: Counters::default(),
            refused: None,
            cpuid: RefCell::default(),
            xsave: vec![0; shared.xsave_size],
            remedy,
            kick: Arc::new(kick),
            shared,
        })
    }

    /// Names the vCPU and what was tried.
    pub(super) fn error(
        &self,
        what: &'static str,
    ) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError + use<> {
        error(self.id, what)
    }

    /// Makes sure that `self.cpuid` is filled.
    pub(super) fn load_cpuid(&mut self) -> Result<(), VcpuError> {
        if self.cpuid.get_mut().is_empty() {
            self.cpuid = RefCell::new(self.cpuid()?);
        }
        Ok(())
    }

    /// The registers as the exit just now left them.
    pub(super) fn state_at_exit(&self) -> Result<(Registers, SpecialRegisters), VcpuError> {
        if self.remedy.is_some() {
            // The remedy has each exit bring them along.
            let state = self.fd.sync_regs();
            return Ok((state.regs, state.sregs));
        }
        Ok((self.registers()?, self.special_registers()?))
    }

    /// Serves an exit, if it is one of the back end's own; false leaves it to the caller.
    fn serve(&mut self, exit: Own) -> Result<bool, VcpuError> {
        match exit {
            Own::InternalError(KVM_INTERNAL_ERROR_EMULATION) => {
                self.emulate()?;
                if let Some(remedy) = &self.remedy {
                    remedy.after_fallback(self.fd.sync_regs().sregs.idt.base);
                }
                Ok(true)
            }
            Own::InternalError(suberror) => Err(VcpuError::Internal {
                cpu: self.id,
                suberror,
                rip: self.registers()?.rip,
            }),
            Own::Debug(pc) => {
                let Some(remedy) = &mut self.remedy else {
                    return Ok(false);
                };
                let hit = remedy
                    .debug_exit(&mut self.fd, &*self.shared.ram, pc)
                    .map_err(error(self.id, MENDING))?;
                if hit == Hit::Syscall {
                    self.counters.count("syscall");
                }
                Ok(hit != Hit::Foreign)
            }
            Own::MsrWrite { index, data } => {
                let entry = MsrEntry {
                    index,
                    data,
                    ..Default::default()
                };
                let done = match self.set_msrs(&[entry]) {
                    Ok(()) => true,
                    Err(VcpuError::Msr { .. }) => false,
                    Err(e) => return Err(e),
                };
                exit::answer_msr_write(self.fd.get_kvm_run(), done);
                Ok(true)
            }
        }
    }

    /// The guest's IDT may have become another.
    fn look_again(&self) {
        if let Some(remedy) = &self.remedy {
            remedy.look_again();
        }
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn run(&mut self) -> Result<VmExit<'_>, VcpuError> {
        // Each turn enters KVM, where a kick that came in the meantime ends the run.
        loop {
            if let Some(remedy) = &mut self.remedy {
                remedy
                    .prepare(&self.fd, &*self.shared.ram)
                    .map_err(error(self.id, MENDING))?;
            }
            match self.fd.run().map(drop) {
                Ok(()) => {}
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.look_again();
                    return Ok(VmExit::Interrupted);
                }
                Err(e) => return Err(self.error("running")(e)),
            }
            let served = match exit::own(self.fd.get_kvm_run()) {
                None => false,
                Some(own) => self.serve(own)?,
            };
            if !served {
                return exit::decode(self.fd.get_kvm_run(), self.id);
            }
        }
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn registers(&self) -> Result<Registers, VcpuError> {
        self.fd
            .get_regs()
            .map_err(self.error("reading the general registers"))
    }

    fn set_registers(&self, registers: &Registers) -> Result<(), VcpuError> {
        self.fd
            .set_regs(registers)
            .map_err(self.error("setting the general registers"))
    }

    fn special_registers(&self) -> Result<SpecialRegisters, VcpuError> {
        self.fd
            .get_sregs()
            .map_err(self.error("reading the special registers"))
    }

    fn set_special_registers(&self, registers: &SpecialRegisters) -> Result<(), VcpuError> {
        self.fd
            .set_sregs(registers)
            .map_err(self.error("setting the special registers"))?;
        self.look_again();
        Ok(())
    }

    fn fpu(&self) -> Result<FpuState, VcpuError> {
        self.fd
            .get_fpu()
            .map_err(self.error("reading the FPU state"))
    }

    fn set_fpu(&self, fpu: &FpuState) -> Result<(), VcpuError> {
        self.fd
            .set_fpu(fpu)
            .map_err(self.error("setting the FPU state"))
    }

    fn xsave(&self) -> Result<XsaveArea, VcpuError> {
        let mut area = vec![0; self.shared.xsave_size];
        xsave::read(&self.fd, &mut area).map_err(self.error("reading the XSAVE area"))?;
        Ok(area)
    }

    fn set_xsave(&self, area: &[u8]) -> Result<(), VcpuError> {
        if area.len() != self.shared.xsave_size {
            return Err(VcpuError::Ioctl {
                cpu: self.id,
                what: "setting the XSAVE area",
                source: io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "it has {} bytes, and {} here",
                        area.len(),
                        self.shared.xsave_size
                    ),
                ),
            });
        }
        xsave::write(&self.fd, area).map_err(self.error("setting the XSAVE area"))
    }

    fn xcrs(&self) -> Result<ExtendedControlRegisters, VcpuError> {
        self.fd
            .get_xcrs()
            .map_err(self.error("reading the extended control registers"))
    }

    fn set_xcrs(&self, xcrs: &ExtendedControlRegisters) -> Result<(), VcpuError> {
        self.fd
            .set_xcrs(xcrs)
            .map_err(self.error("setting the extended control registers"))
    }

    fn cpuid(&self) -> Result<Vec<CpuidEntry>, VcpuError> {
        let cpuid = self
            .fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(self.error("reading CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), VcpuError> {
        let what = "setting CPUID";
        let cpuid = CpuId::from_entries(entries)
            .map_err(|_| self.error(what)(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.fd.set_cpuid2(&cpuid).map_err(self.error(what))?;
        self.cpuid.borrow_mut().clear();
        Ok(())
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<MsrEntry>, VcpuError> {
        let (read, refused) = read_msrs(&self.fd, indices).map_err(self.error("reading MSRs"))?;
        if !refused.is_empty() {
            log::debug!("vCPU {}: KVM refused to read MSRs {refused:#x?}", self.id);
        }
        Ok(read)
    }

    fn set_msrs(&self, msrs: &[MsrEntry]) -> Result<(), VcpuError> {
        for chunk in msrs.chunks(KVM_MAX_MSR_ENTRIES) {
            let list = msr_list(chunk).map_err(self.error("setting MSRs"))?;
            let accepted = self
                .fd
                .set_msrs(&list)
                .map_err(self.error("setting MSRs"))?;
            if let Some(refused) = chunk.get(accepted) {
                return Err(VcpuError::Msr {
                    cpu: self.id,
                    index: refused.index,
                });
            }
        }
        if let Some(remedy) = &self.remedy {
            for msr in msrs {
                remedy.msr_is(msr.index, msr.data);
            }
        }
        Ok(())
    }

    fn lapic(&self) -> Result<LapicState, VcpuError> {
        self.fd
            .get_lapic()
            .map_err(self.error("reading the local APIC"))
    }

    fn set_lapic(&self, lapic: &LapicState) -> Result<(), VcpuError> {
        self.fd
            .set_lapic(lapic)
            .map_err(self.error("setting the local APIC"))
    }

    fn mp_state(&self) -> Result<MpState, VcpuError> {
        self.fd
            .get_mp_state()
            .map_err(self.error("reading the multiprocessing state"))
    }

    fn set_mp_state(&self, state: MpState) -> Result<(), VcpuError> {
        self.fd
            .set_mp_state(state)
            .map_err(self.error("setting the multiprocessing state"))
    }

    fn events(&self) -> Result<VcpuEvents, VcpuError> {
        self.fd
            .get_vcpu_events()
            .map_err(self.error("reading the pending events"))
    }

    fn set_events(&self, events: &VcpuEvents) -> Result<(), VcpuError> {
        self.fd
            .set_vcpu_events(events)
            .map_err(self.error("setting the pending events"))
    }

    fn debug_registers(&self) -> Result<DebugRegisters, VcpuError> {
        self.fd
            .get_debug_regs()
            .map_err(self.error("reading the debug registers"))
    }

    fn set_debug_registers(&self, registers: &DebugRegisters) -> Result<(), VcpuError> {
        self.fd
            .set_debug_regs(registers)
            .map_err(self.error("setting the debug registers"))
    }

    fn notify_paused(&self) -> Result<(), VcpuError> {
        match self.fd.kvmclock_ctrl() {
            // The guest has no kvmclock, and so nothing to be told.
            Err(e) if e.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(self.error("telling the guest's clock of the pause")),
        }
    }

    fn nmi(&self) -> Result<(), VcpuError> {
        self.fd.nmi().map_err(self.error("injecting an NMI"))
    }

    fn tsc_khz(&self) -> Result<u32, VcpuError> {
        self.fd
            .get_tsc_khz()
            .map_err(self.error("reading the TSC frequency"))
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.counters.all().clone()
    }
}

/// Names vCPU `cpu` and what was tried.
fn error(cpu: u32, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError::Ioctl {
        cpu,
        what,
        source: source.into(),
    }
}

/// Those of `indices` that KVM lets `fd` read and set again, and those that it does not.
pub(super) fn accepted_msrs(fd: &VcpuFd, indices: &[u32]) -> io::Result<(Vec<u32>, Vec<u32>)> {
    let (read, mut refused) = read_msrs(fd, indices)?;
    let mut accepted = Vec::with_capacity(read.len());
    for entry in read {
        if fd.set_msrs(&msr_list(&[entry])?)? == 1 {
            accepted.push(entry.index);
        } else {
            refused.push(entry.index);
        }
    }
    Ok((accepted, refused))
}

/// The values of those MSRs that KVM lets `fd` read, and the numbers of those that it does not.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<(Vec<MsrEntry>, Vec<u32>), kvm_ioctls::Error> {
    let mut read = Vec::with_capacity(indices.len());
    let mut refused = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<MsrEntry> = rest
            .iter()
            .take(KVM_MAX_MSR_ENTRIES)
            .map(|&index| MsrEntry {
                index,
                ..Default::default()
            })
            .collect();
        let mut list = msr_list(&wanted)?;
        // KVM stops at the first that it refuses.
        let count = fd.get_msrs(&mut list)?.min(wanted.len());
        read.extend_from_slice(&list.as_slice()[..count]);
        rest = &rest[count..];
        if count < wanted.len() {
            refused.push(wanted[count].index);
            rest = &rest[1..];
        }
    }
    Ok((read, refused))
}

pub(super) fn msr_list(entries: &[MsrEntry]) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}
