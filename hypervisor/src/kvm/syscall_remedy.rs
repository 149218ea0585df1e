//! Mends SYSCALL on a KVM whose SYSCALL enters the kernel in ring 3 (see
//! [`syscall_probe`](super::syscall_probe)).
//!
//! There the first fetch at the kernel's entry point (MSR LSTAR) takes #PF. A hardware breakpoint
//! on the guest's #PF handler catches it before the guest sees it:
//!
//! ```text
//! guest writes LSTAR --(MSR filter)--> the write is done, and the breakpoint goes where gate 14
//!                                      of the IDT leads
//! breakpoint --+-- the frame is that of a SYSCALL: the state becomes what SYSCALL makes of it
//!              +-- another fault: the handler's first instruction is passed over
//! ```
//!
//! The breakpoint follows the gate when it changes. While it is set, breakpoints that the guest
//! itself sets in DR0 to DR3 do not trigger.

use std::cell::Cell;
use std::sync::OnceLock;

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SYNC_REGS, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_MSR_EXIT_REASON_FILTER, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_enable_cap,
    kvm_guest_debug, kvm_sync_regs,
};
use kvm_ioctls::{
    Error, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, SyncReg, VcpuFd, VmFd,
};

use super::syscall_probe::syscall_keeps_ring_3;
use crate::fallback::mmu::{Access, Mmu};
use crate::memory::GuestRam;
use crate::x86::{Segment, SpecialRegisters};

// Segment selectors, entry point in 64-bit mode and in compatibility mode, and flags to clear
// (Intel SDM volume 3, section 6.8.8).
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SFMASK: u32 = 0xc000_0084;

const PAGE: u64 = 4096;
/// Of any x86-64 processor: the guest's own, fewer ones have no bearing here.
const MOST_PHYSICAL_BITS: u8 = 52;
const EFER_SCE: u64 = 1;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_DF: u64 = 1 << 10;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_AC: u64 = 1 << 18;

/// #PF, by its place in the IDT.
const PAGE_FAULT: u64 = 14;
/// Bytes of a gate in 64-bit mode.
const GATE: usize = 16;
/// Page present, access by user code: bits of the error code of #PF.
const FAULT_OF_ENTRY: u64 = 0x5;

/// DR7: breakpoint 0 is on, for execution; bit 10 is always 1.
const DR7_EXECUTE_0: u64 = 0x402;
/// DR7: any of the guest's breakpoints is on.
const DR7_ENABLED: u64 = 0xff;

/// True where SYSCALL needs mending. The first call finds out, in a few milliseconds.
pub(super) fn needed(kvm: &kvm_ioctls::Kvm) -> bool {
    static NEEDED: OnceLock<bool> = OnceLock::new();
    *NEEDED.get_or_init(|| match syscall_keeps_ring_3(kvm) {
        Ok(false) => false,
        Ok(true) => {
            let able = can_mend(kvm);
            log::debug!(
                "SYSCALL enters the kernel in ring 3 here, and each one {} be mended",
                if able { "will" } else { "cannot" }
            );
            able
        }
        Err(e) => {
            log::debug!("whether SYSCALL works here is unknown, so it is left alone: {e}");
            false
        }
    })
}

/// KVM has the means that the remedy takes.
fn can_mend(kvm: &kvm_ioctls::Kvm) -> bool {
    let registers = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) as i32;
    let has = |number: u32| kvm.check_extension_raw(number.into());
    has(KVM_CAP_X86_USER_SPACE_MSR) > 0
        && has(KVM_CAP_X86_MSR_FILTER) > 0
        && has(KVM_CAP_SET_GUEST_DEBUG) > 0
        && has(KVM_CAP_SYNC_REGS) & registers == registers
}

/// Makes guest writes of the MSRs of SYSCALL exit. Before any vCPU runs.
pub(super) fn watch_msrs(vm: &VmFd) -> Result<(), Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0],
        ..Default::default()
    })?;
    let refused = MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base: MSR_STAR,
        msr_count: 4,
        // CSTAR lies between; it is of no use in 64-bit mode.
        bitmap: &[1 << (MSR_CSTAR - MSR_STAR)],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[refused])
}

/// What a debug exit was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Hit {
    /// A SYSCALL, now mended.
    Syscall,
    /// Something else of the remedy's own; the guest goes on.
    Passed,
    /// None of the remedy's breakpoints.
    Foreign,
}

/// What the back end asked of KVM_SET_GUEST_DEBUG.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Debugging {
    #[default]
    Off,
    /// A breakpoint on this address.
    Breakpoint(u64),
    /// One instruction, then the breakpoint again.
    Step,
}

/// One vCPU's part of the remedy.
#[derive(Default)]
pub(super) struct Remedy {
    star: Cell<u64>,
    /// The kernel's entry point; 0 while there is none.
    lstar: Cell<u64>,
    sfmask: Cell<u64>,
    /// Gate 14 of the IDT is to be looked up again before the next run.
    stale: Cell<bool>,
    debugging: Debugging,
    /// The IDT's linear address when its gate was looked up.
    idt: u64,
    /// Where in guest RAM the gate that the breakpoint follows lies, and what it held.
    gate: Option<(u64, [u8; GATE])>,
    told_of_debugger: bool,
}

impl Remedy {
    /// From now on each exit of `fd` brings its registers along, which spares calls of KVM.
    pub(super) fn new(fd: &mut VcpuFd) -> Self {
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::SystemRegister);
        Self::default()
    }

    /// An MSR has this value now.
    pub(super) fn msr_is(&self, index: u32, value: u64) {
        match index {
            MSR_STAR => self.star.set(value),
            MSR_SFMASK => self.sfmask.set(value),
            MSR_LSTAR => {
                self.lstar.set(value);
                self.stale.set(true);
            }
            _ => {}
        }
    }

    /// Something happened after which the guest's IDT may be another.
    pub(super) fn look_again(&self) {
        self.stale.set(true);
    }

    /// The fallback served an instruction, and the IDT is at `idt` now.
    pub(super) fn after_fallback(&self, idt: u64) {
        if idt != self.idt {
            self.look_again();
        }
    }

    /// Before a run: puts the breakpoint where gate 14 of the IDT leads. Without a change in the
    /// guest this reads the gate and no more.
    pub(super) fn prepare(&mut self, fd: &VcpuFd, ram: &dyn GuestRam) -> Result<(), Error> {
        let lstar = self.lstar.get();
        if lstar == 0 && self.debugging == Debugging::Off {
            return Ok(());
        }
        if !self.stale.get() && (self.debugging == Debugging::Step || self.gate_holds(ram)) {
            return Ok(());
        }
        self.stale.set(false);
        self.gate = None;
        let special = fd.get_sregs()?;
        self.idt = special.idt.base;
        let target = (lstar != 0)
            .then(|| self.find_handler(ram, &special))
            .flatten();
        self.tell_of_debugger(fd)?;
        self.debug(fd, target.map_or(Debugging::Off, Debugging::Breakpoint))
    }

    /// The gate that the breakpoint follows is what it was.
    fn gate_holds(&self, ram: &dyn GuestRam) -> bool {
        let Some((address, held)) = self.gate else {
            return false;
        };
        let mut gate = [0; GATE];
        ram.read(address, &mut gate).is_ok() && gate == held
    }

    /// The address in gate 14 of the IDT, which it remembers the place of.
    fn find_handler(&mut self, ram: &dyn GuestRam, special: &SpecialRegisters) -> Option<u64> {
        let active = EFER_SCE | EFER_LMA;
        let offset = PAGE_FAULT * GATE as u64;
        if special.efer & active != active
            || u64::from(special.idt.limit) < offset + GATE as u64 - 1
        {
            return None;
        }
        let linear = special.idt.base.wrapping_add(offset);
        let mut gate = [0; GATE];
        let address = read_linear(ram, special, linear, &mut gate)?;
        let handler = gate_target(&gate)?;
        // A gate across two pages is looked up at each run instead.
        if linear % PAGE <= PAGE - GATE as u64 {
            self.gate = Some((address, gate));
        }
        Some(handler)
    }

    /// After a debug exit at `pc`.
    pub(super) fn debug_exit(
        &mut self,
        fd: &mut VcpuFd,
        ram: &dyn GuestRam,
        pc: u64,
    ) -> Result<Hit, Error> {
        match self.debugging {
            // The step is done: the breakpoint comes back before the next run.
            Debugging::Step => {
                self.look_again();
                Ok(Hit::Passed)
            }
            Debugging::Breakpoint(handler) if handler == pc => {
                let state = fd.sync_regs();
                if let Some(mended) = self.mend(ram, &state) {
                    *fd.sync_regs_mut() = mended;
                    fd.set_sync_dirty_reg(SyncReg::Register);
                    fd.set_sync_dirty_reg(SyncReg::SystemRegister);
                    return Ok(Hit::Syscall);
                }
                self.pass(fd, ram, &state)?;
                Ok(Hit::Passed)
            }
            _ => Ok(Hit::Foreign),
        }
    }

    /// If the fault that led to the handler is that of a SYSCALL: what SYSCALL was to do.
    fn mend(&self, ram: &dyn GuestRam, state: &kvm_sync_regs) -> Option<kvm_sync_regs> {
        let mut frame = [0; FRAME];
        read_linear(ram, &state.sregs, state.regs.rsp, &mut frame)?;
        let frame = FaultFrame::new(&frame);
        if !frame.is_entry_in_ring_3(self.lstar.get()) {
            return None;
        }
        let mask = self.sfmask.get();
        // SYSCALL has cleared these flags by now. User code that jumped here has not: it cannot
        // clear IF, which kernels mask.
        if frame.rflags & mask & !RFLAGS_RF != 0 {
            return None;
        }
        let mut mended = *state;
        mended.regs.rip = frame.rip;
        mended.regs.rsp = frame.rsp;
        mended.regs.rflags = (frame.rflags & !(mask | RFLAGS_RF)) | RFLAGS_FIXED;
        (mended.sregs.cs, mended.sregs.ss) = kernel_segments(self.star.get());
        Some(mended)
    }

    /// Goes on behind the breakpoint: past a first instruction that handlers usually begin with,
    /// else by a single step.
    fn pass(
        &mut self,
        fd: &mut VcpuFd,
        ram: &dyn GuestRam,
        state: &kvm_sync_regs,
    ) -> Result<(), Error> {
        let handler = state.regs.rip;
        let mut code = [0; LONGEST_PASSED];
        let first = read_linear(ram, &state.sregs, handler, &mut code).and(passed_by_hand(&code));
        let Some(first) = first else {
            return self.debug(fd, Debugging::Step);
        };
        let registers = &mut fd.sync_regs_mut().regs;
        registers.rip = handler.wrapping_add(first.length);
        registers.rflags &= !(first.clears | RFLAGS_RF);
        fd.set_sync_dirty_reg(SyncReg::Register);
        Ok(())
    }

    fn debug(&mut self, fd: &VcpuFd, wanted: Debugging) -> Result<(), Error> {
        if wanted == self.debugging {
            return Ok(());
        }
        let mut debug = kvm_guest_debug::default();
        match wanted {
            Debugging::Off => {}
            Debugging::Breakpoint(address) => {
                debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
                debug.arch.debugreg[0] = address;
                debug.arch.debugreg[7] = DR7_EXECUTE_0;
            }
            Debugging::Step => debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        }
        fd.set_guest_debug(&debug)?;
        self.debugging = wanted;
        Ok(())
    }

    /// Says once that a debugger in the guest goes without its breakpoints.
    fn tell_of_debugger(&mut self, fd: &VcpuFd) -> Result<(), Error> {
        if !self.told_of_debugger && fd.get_debug_regs()?.dr7 & DR7_ENABLED != 0 {
            self.told_of_debugger = true;
            log::debug!(
                "the guest set breakpoints in its debug registers; they do not trigger while \
                 SYSCALL is mended"
            );
        }
        Ok(())
    }
}

/// Bytes of [`FaultFrame`] on the stack.
const FRAME: usize = 48;

/// What an exception with an error code pushes in 64-bit mode (Intel SDM volume 3, section 6.14.2).
#[derive(Debug)]
struct FaultFrame {
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
}

impl FaultFrame {
    fn new(bytes: &[u8; FRAME]) -> Self {
        let mut words = [0; FRAME / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let [error_code, rip, cs, rflags, rsp, _ss] = words;
        Self {
            error_code,
            rip,
            cs,
            rflags,
            rsp,
        }
    }

    /// User code could not fetch at the kernel's entry point.
    fn is_entry_in_ring_3(&self, lstar: u64) -> bool {
        self.error_code & FAULT_OF_ENTRY == FAULT_OF_ENTRY && self.rip == lstar && self.cs & 3 == 3
    }
}

/// CS and SS as SYSCALL loads them from STAR (Intel SDM volume 2B, SYSCALL).
fn kernel_segments(star: u64) -> (Segment, Segment) {
    let selector = (star >> 32) as u16 & !3;
    let stack = Segment {
        base: 0,
        limit: u32::MAX,
        selector: selector.wrapping_add(8),
        type_: 3,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = Segment {
        selector,
        type_: 11,
        db: 0,
        l: 1,
        ..stack
    };
    (code, stack)
}

/// Where a gate in 64-bit mode leads, if it is present (Intel SDM volume 3, section 6.14.1).
fn gate_target(gate: &[u8; GATE]) -> Option<u64> {
    let bits = u128::from_le_bytes(*gate);
    if bits >> 47 & 1 == 0 {
        return None;
    }
    let low = bits & 0xffff;
    let high = bits >> 48 & 0xffff_ffff_ffff;
    u64::try_from(high << 16 | low).ok()
}

/// The longest instruction of [`passed_by_hand`].
const LONGEST_PASSED: usize = 4;

/// An instruction without effect but on flags.
#[derive(Debug, Eq, PartialEq)]
struct Passed {
    length: u64,
    clears: u64,
}

/// Knows the instructions with which kernels begin a fault handler: markers of branch targets,
/// no-operations, CLAC and CLD.
fn passed_by_hand(code: &[u8; LONGEST_PASSED]) -> Option<Passed> {
    let (length, clears) = match code {
        [0xf3, 0x0f, 0x1e, 0xfa] | [0x0f, 0x1f, 0x40, _] => (4, 0),
        [0x0f, 0x1f, 0x00, ..] => (3, 0),
        [0x66, 0x90, ..] => (2, 0),
        [0x90, ..] => (1, 0),
        [0x0f, 0x01, 0xca, _] => (3, RFLAGS_AC),
        [0xfc, ..] => (1, RFLAGS_DF),
        _ => return None,
    };
    Some(Passed { length, clears })
}

/// Copies guest memory at a linear address, as the vCPU's page tables map it now, into `buffer`,
/// and tells the guest-physical address of its beginning. `None` where it is not all mapped RAM.
fn read_linear(
    ram: &dyn GuestRam,
    special: &SpecialRegisters,
    linear: u64,
    buffer: &mut [u8],
) -> Option<u64> {
    let mmu = Mmu::new(special, 0, 0, MOST_PHYSICAL_BITS);
    let physical = |linear| mmu.translate(ram, linear, Access::Read).ok();
    let begin = physical(linear)?;
    let to_page_end = usize::try_from(PAGE - linear % PAGE).ok()?;
    let (head, tail) = buffer.split_at_mut(to_page_end.min(buffer.len()));
    ram.read(begin, head).ok()?;
    if !tail.is_empty() {
        ram.read(physical(linear.checked_add(head.len() as u64)?)?, tail)
            .ok()?;
    }
    Some(begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_leads_to_its_three_parts() {
        let mut gate = [0; GATE];
        gate[..8].copy_from_slice(&0x8765_8e00_0010_4321_u64.to_le_bytes());
        gate[8..].copy_from_slice(&0x0000_0000_ffff_ffff_u64.to_le_bytes());
        assert_eq!(gate_target(&gate), Some(0xffff_ffff_8765_4321));
        gate[5] &= 0x7f;
        assert_eq!(gate_target(&gate), None, "not present");
    }

    #[test]
    fn segments_come_from_star() {
        let (code, stack) = kernel_segments(0x0023_0013_0000_0000);
        assert_eq!((code.selector, stack.selector), (0x10, 0x18));
        assert_eq!((code.dpl, code.l, code.db), (0, 1, 0));
        assert_eq!((stack.dpl, stack.l, stack.db), (0, 0, 1));
    }

    #[test]
    fn known_first_instructions_are_passed() {
        let length = |code| passed_by_hand(&code).map(|p| p.length);
        assert_eq!(length([0xf3, 0x0f, 0x1e, 0xfa]), Some(4));
        assert_eq!(length([0x0f, 0x1f, 0x00, 0xfc]), Some(3));
        assert_eq!(length([0x90, 0, 0, 0]), Some(1));
        assert_eq!(
            length([0xf3, 0x0f, 0x1e, 0xfb]),
            None,
            "endbr32 is not for 64-bit mode"
        );
        assert_eq!(length([0x50, 0x53, 0x51, 0x52]), None, "push has an effect");
        let clac = passed_by_hand(&[0x0f, 0x01, 0xca, 0xfc]);
        let expected = Passed {
            length: 3,
            clears: RFLAGS_AC,
        };
        assert_eq!(clac, Some(expected));
    }

    #[test]
    fn only_a_user_fetch_at_the_entry_is_a_syscall() {
        let frame = |error_code: u64, rip: u64, cs: u64| {
            let words = [error_code, rip, cs, 0x46, 0x7000, 0x1b];
            let mut bytes = [0; FRAME];
            for (to, word) in bytes.chunks_mut(8).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
            FaultFrame::new(&bytes)
        };
        assert!(frame(0x15, 0x1000, 0x33).is_entry_in_ring_3(0x1000));
        assert!(frame(0x5, 0x1000, 0x33).is_entry_in_ring_3(0x1000), "no NX");
        assert!(!frame(0x15, 0x1001, 0x33).is_entry_in_ring_3(0x1000));
        assert!(!frame(0x14, 0x1000, 0x33).is_entry_in_ring_3(0x1000));
        assert!(!frame(0x15, 0x1000, 0x10).is_entry_in_ring_3(0x1000));
        assert_eq!(frame(0x15, 0x1000, 0x33).rsp, 0x7000);
    }
}
