//! Instructions with no memory behind them that a user process cannot run for the guest, by hand
//! (Intel SDM volume 2; CLZERO, MONITORX: AMD APM volume 3).

use iced_x86::{Mnemonic, OpKind, Register};

use super::machine::{
    BP, CR4_OSXSAVE, CpuidBit, DB, Exception, Machine, OF, RFLAGS_AC, Step, Stop,
};
use super::mmu::{Access, CR4_PKE};
use super::xstate;

const CR4_TSD: u64 = 1 << 2;
const CR4_PCIDE: u64 = 1 << 17;
const RFLAGS_OF: u64 = 1 << 11;
const RFLAGS_IOPL: u64 = 3 << 12;
const RFLAGS_VM: u64 = 1 << 17;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_AUX: u32 = 0xc000_0103;

const SMAP: CpuidBit = (7, 0, 1, 20);
const RDTSCP: CpuidBit = (0x8000_0001, 0, 3, 27);
const RDPID: CpuidBit = (7, 0, 2, 22);
const INVPCID: CpuidBit = (7, 0, 1, 10);
const CLFLUSHOPT: CpuidBit = (7, 0, 1, 23);
const CLWB: CpuidBit = (7, 0, 1, 24);
const CLZERO: CpuidBit = (0x8000_0008, 0, 1, 0);
const XGETBV1: CpuidBit = (0xd, 1, 0, 2);

/// Carries the instruction out; `None` if it is none of these.
pub(super) fn step(m: &mut Machine<'_>) -> Option<Step> {
    Some(match m.instruction.mnemonic() {
        Mnemonic::Int3 => software_interrupt(m, BP, true),
        Mnemonic::Int => {
            let vector = m.instruction.immediate8();
            software_interrupt(m, vector, true)
        }
        // INT1 is not subject to the gate's DPL.
        Mnemonic::Int1 => software_interrupt(m, DB, false),
        Mnemonic::Into => {
            if m.cpu.registers().rflags & RFLAGS_OF == 0 {
                Ok(())
            } else {
                software_interrupt(m, OF, true)
            }
        }
        Mnemonic::Clac => access_flag(m, false),
        Mnemonic::Stac => access_flag(m, true),
        Mnemonic::Xgetbv => xgetbv(m),
        Mnemonic::Rdtscp => rdtscp(m),
        Mnemonic::Rdpid => rdpid(m),
        Mnemonic::Rdpkru => pkru(m, false),
        Mnemonic::Wrpkru => pkru(m, true),
        Mnemonic::Invpcid => invpcid(m),
        Mnemonic::Clwb => cache_line(m, CLWB),
        Mnemonic::Clflushopt => cache_line(m, CLFLUSHOPT),
        Mnemonic::Clzero => clzero(m),
        Mnemonic::Monitor | Mnemonic::Monitorx => monitor(m),
        Mnemonic::Mwait | Mnemonic::Mwaitx => mwait(m),
        _ => return None,
    })
}

/// INT3, INT n, INTO, INT1: a trap, so RIP is past the instruction when it is delivered.
fn software_interrupt(m: &mut Machine<'_>, vector: u8, check_gate: bool) -> Step {
    let rflags = m.cpu.registers().rflags;
    if m.instruction.mnemonic() == Mnemonic::Int
        && rflags & RFLAGS_VM != 0
        && rflags & RFLAGS_IOPL != RFLAGS_IOPL
    {
        return Err(Stop::protection(0));
    }
    // At CPL 0 every gate's DPL will do; a missing gate shows when the vector is delivered.
    if check_gate && m.cpl > 0 {
        let error_code = u32::from(vector) * 8 + 2;
        let size = if m.long_mode() { 16 } else { 8 };
        let offset = u64::from(vector) * size;
        if offset + size - 1 > u64::from(m.special.idt.limit) {
            return Err(Stop::protection(error_code));
        }
        let mut gate = [0; 8];
        m.mmu
            .system()
            .read(m.ram, m.special.idt.base.wrapping_add(offset), &mut gate)
            .map_err(|fault| Stop::memory(fault, Register::None))?;
        let dpl = (gate[5] >> 5) & 3;
        if m.cpl > dpl {
            return Err(Stop::protection(error_code));
        }
    }
    m.finish();
    Err(Stop::Exception(Exception {
        vector,
        error_code: None,
        cr2: None,
    }))
}

fn access_flag(m: &mut Machine<'_>, on: bool) -> Step {
    m.require(SMAP)?;
    if m.cpl > 0 {
        return Err(Stop::undefined());
    }
    m.set_flag(RFLAGS_AC, on);
    Ok(())
}

fn set_edx_eax(m: &mut Machine<'_>, value: u64) {
    let registers = m.cpu.registers();
    registers.rax = value & 0xffff_ffff;
    registers.rdx = value >> 32;
}

fn xgetbv(m: &mut Machine<'_>) -> Step {
    if m.special.cr4 & CR4_OSXSAVE == 0 {
        return Err(Stop::undefined());
    }
    let value = match m.cpu.registers().rcx as u32 {
        0 => m.cpu.xcr0().map_err(Stop::Refuse)?,
        1 if m.has(XGETBV1) => {
            let xcr0 = m.cpu.xcr0().map_err(Stop::Refuse)?;
            let image = xstate::image(m.cpu)?;
            let mut in_use = xstate::in_use(image);
            if xstate::mxcsr(image) != xstate::MXCSR_INIT {
                in_use |= 1 << xstate::SSE;
            }
            xcr0 & in_use
        }
        _ => return Err(Stop::protection(0)),
    };
    set_edx_eax(m, value);
    Ok(())
}

fn rdtscp(m: &mut Machine<'_>) -> Step {
    m.require(RDTSCP)?;
    if m.special.cr4 & CR4_TSD != 0 && m.cpl > 0 {
        return Err(Stop::protection(0));
    }
    let aux = m.msr(MSR_TSC_AUX)?;
    let tsc = m.msr(MSR_TSC)?;
    set_edx_eax(m, tsc);
    m.cpu.registers().rcx = aux & 0xffff_ffff;
    Ok(())
}

fn rdpid(m: &mut Machine<'_>) -> Step {
    m.require(RDPID)?;
    let aux = m.msr(MSR_TSC_AUX)? & 0xffff_ffff;
    let target = m.instruction.op0_register();
    m.set(target, aux)
}

fn pkru(m: &mut Machine<'_>, write: bool) -> Step {
    if m.special.cr4 & CR4_PKE == 0 {
        return Err(Stop::undefined());
    }
    let registers = *m.cpu.registers();
    if registers.rcx as u32 != 0 || (write && registers.rdx as u32 != 0) {
        return Err(Stop::protection(0));
    }
    if write {
        xstate::set_pkru(m.cpu, registers.rax as u32)
    } else {
        let value = xstate::pkru(m.cpu)?;
        set_edx_eax(m, u64::from(value));
        Ok(())
    }
}

/// The fallback caches no translations, so nothing remains to be done after the checks; whoever
/// keeps shadow tables for the vCPU flushes them.
fn invpcid(m: &mut Machine<'_>) -> Step {
    m.require(INVPCID)?;
    m.require_cpl0()?;
    let kind = m.operand_value(0, 8)?;
    let operand = m.operand(1, 16, Access::Read)?;
    let mut descriptor = [0; 16];
    m.read(operand, &mut descriptor)?;
    let pcid = xstate::get_u64(&descriptor, 0);
    let linear = xstate::get_u64(&descriptor, 8);
    let no_pcid = m.special.cr4 & CR4_PCIDE == 0 && pcid & 0xfff != 0;
    let wrong = match kind {
        0 => !m.mmu.is_canonical(linear) || no_pcid,
        1 => no_pcid,
        2 | 3 => false,
        _ => true,
    };
    if wrong || pcid >> 12 != 0 {
        return Err(Stop::protection(0));
    }
    Ok(())
}

/// CLWB, CLFLUSHOPT: guest RAM is coherent, so only the address is checked.
fn cache_line(m: &mut Machine<'_>, feature: CpuidBit) -> Step {
    m.require(feature)?;
    let operand = m.operand(0, 1, Access::Read)?;
    m.span(operand, 1, Access::Read)?;
    Ok(())
}

/// rAX with the address size of the instruction, in DS or the segment of a prefix.
fn implicit_rax(m: &mut Machine<'_>) -> (Register, u64) {
    let instruction = m.instruction;
    let register = (0..instruction.op_count())
        .find(|&n| instruction.op_kind(n) == OpKind::Register)
        .map_or(Register::RAX, |n| instruction.op_register(n));
    let rax = m.cpu.registers().rax;
    let offset = match register {
        Register::AX => rax & 0xffff,
        Register::EAX => rax & 0xffff_ffff,
        _ => rax,
    };
    let segment = match instruction.segment_prefix() {
        Register::None => Register::DS,
        segment => segment,
    };
    (segment, offset)
}

fn clzero(m: &mut Machine<'_>) -> Step {
    m.require(CLZERO)?;
    let (segment, offset) = implicit_rax(m);
    let operand = m.at(segment, offset & !63, 64, Access::Write)?;
    m.write(operand, &[0; 64])
}

/// MONITOR and MWAIT need not wait: a wake-up without cause is allowed.
fn monitor(m: &mut Machine<'_>) -> Step {
    if m.cpl > 0 && m.instruction.mnemonic() == Mnemonic::Monitor {
        return Err(Stop::undefined());
    }
    if m.cpu.registers().rcx as u32 != 0 {
        return Err(Stop::protection(0));
    }
    let (segment, offset) = implicit_rax(m);
    let operand = m.at(segment, offset, 1, Access::Read)?;
    m.span(operand, 1, Access::Read)?;
    Ok(())
}

fn mwait(m: &mut Machine<'_>) -> Step {
    let extended = m.instruction.mnemonic() == Mnemonic::Mwaitx;
    if m.cpl > 0 && !extended {
        return Err(Stop::undefined());
    }
    // Bit 0: interrupts wake even if masked. Bit 1 (MWAITX): EBX holds a time limit.
    let allowed = if extended { 3 } else { 1 };
    if m.cpu.registers().rcx as u32 & !allowed != 0 {
        return Err(Stop::protection(0));
    }
    Ok(())
}
