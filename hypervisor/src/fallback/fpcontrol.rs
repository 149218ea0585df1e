//! Control instructions of x87, MMX and SSE, on the XSAVE image, and the checks that every
//! floating-point or vector instruction makes first (Intel SDM volume 3, §2.5 and chapter 13).

use iced_x86::{Mnemonic, OpKind};

use super::machine::{
    CR0_EM, CR0_MP, CR0_NE, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, CpuidBit, Machine, Step, Stop,
};
use super::mmu::Access;
use super::xstate::{self, FCW, FSW, FTW, X87};

const FPU: CpuidBit = (1, 0, 3, 0);
const MMX: CpuidBit = (1, 0, 3, 23);
const SSE: CpuidBit = (1, 0, 3, 25);
const AVX: CpuidBit = (1, 0, 2, 28);

/// Carries the instruction out; `None` if it is none of these.
pub(super) fn step(m: &mut Machine<'_>) -> Option<Step> {
    Some(match m.instruction.mnemonic() {
        Mnemonic::Wait => wait(m),
        Mnemonic::Fnclex => fnclex(m, false),
        Mnemonic::Fclex => fnclex(m, true),
        Mnemonic::Fninit => fninit(m, false),
        Mnemonic::Finit => fninit(m, true),
        Mnemonic::Fldcw => fldcw(m),
        Mnemonic::Fnstcw => store_word(m, xstate::fcw, false),
        Mnemonic::Fstcw => store_word(m, xstate::fcw, true),
        Mnemonic::Fnstsw => store_word(m, xstate::fsw, false),
        Mnemonic::Fstsw => store_word(m, xstate::fsw, true),
        Mnemonic::Emms | Mnemonic::Femms => emms(m),
        Mnemonic::Ldmxcsr => ldmxcsr(m, false),
        Mnemonic::Vldmxcsr => ldmxcsr(m, true),
        Mnemonic::Stmxcsr => stmxcsr(m, false),
        Mnemonic::Vstmxcsr => stmxcsr(m, true),
        _ => return None,
    })
}

/// #MF if an unmasked x87 exception is pending.
pub(super) fn pending(m: &mut Machine<'_>) -> Step {
    let ne = m.special.cr0 & CR0_NE != 0;
    let image = xstate::image(m.cpu)?;
    if xstate::fsw(image) & !xstate::fcw(image) & 0x3f == 0 {
        Ok(())
    } else if ne {
        Err(Stop::math_fault())
    } else {
        Err(Stop::refuse("an x87 exception is pending and CR0.NE is 0"))
    }
}

/// What an x87 instruction checks. `waiting` is false for the FN forms.
pub(super) fn check_x87(m: &mut Machine<'_>, waiting: bool) -> Step {
    m.require(FPU)?;
    if m.special.cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(Stop::no_math());
    }
    if waiting { pending(m) } else { Ok(()) }
}

/// What an MMX instruction checks.
pub(super) fn check_mmx(m: &mut Machine<'_>) -> Step {
    m.require(MMX)?;
    if m.special.cr0 & CR0_EM != 0 {
        return Err(Stop::undefined());
    }
    if m.special.cr0 & CR0_TS != 0 {
        return Err(Stop::no_math());
    }
    pending(m)
}

/// What a legacy SSE instruction checks.
pub(super) fn check_sse(m: &mut Machine<'_>) -> Step {
    m.require(SSE)?;
    if m.special.cr0 & CR0_EM != 0 || m.special.cr4 & CR4_OSFXSR == 0 {
        return Err(Stop::undefined());
    }
    if m.special.cr0 & CR0_TS != 0 {
        return Err(Stop::no_math());
    }
    Ok(())
}

/// What a VEX or EVEX instruction on vectors checks; `components` are the XCR0 bits it needs.
pub(super) fn check_vector(m: &mut Machine<'_>, components: u64) -> Step {
    m.require(AVX)?;
    if m.special.cr4 & CR4_OSXSAVE == 0 || m.no_tables() {
        return Err(Stop::undefined());
    }
    if m.cpu.xcr0().map_err(Stop::Refuse)? & components != components {
        return Err(Stop::undefined());
    }
    if m.special.cr0 & CR0_TS != 0 {
        return Err(Stop::no_math());
    }
    Ok(())
}

fn wait(m: &mut Machine<'_>) -> Step {
    if m.special.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(Stop::no_math());
    }
    pending(m)
}

fn fnclex(m: &mut Machine<'_>, waiting: bool) -> Step {
    check_x87(m, waiting)?;
    let image = xstate::image(m.cpu)?;
    if xstate::fsw(image) & 0x80ff == 0 {
        return Ok(());
    }
    let image = xstate::image_mut(m.cpu)?;
    let fsw = xstate::fsw(image) & 0x7f00;
    xstate::put(image, FSW, &fsw.to_le_bytes());
    Ok(())
}

fn fninit(m: &mut Machine<'_>, waiting: bool) -> Step {
    check_x87(m, waiting)?;
    let image = xstate::image_mut(m.cpu)?;
    // The registers' contents stay; only their tags say empty.
    if xstate::in_use(image) & (1 << X87) != 0 {
        image[..xstate::MXCSR].fill(0);
        xstate::put(image, FCW, &xstate::FCW_INIT.to_le_bytes());
    }
    Ok(())
}

fn fldcw(m: &mut Machine<'_>) -> Step {
    check_x87(m, true)?;
    let value = m.operand_value(0, 2)? as u16;
    let image = xstate::image_mut(m.cpu)?;
    xstate::materialise(image, X87, None);
    // Bit 6 always reads as 1, bits 7 and 13 to 15 as 0.
    let value = (value & 0x1f3f) | 0x40;
    xstate::put(image, FCW, &value.to_le_bytes());
    xstate::summarise(image);
    Ok(())
}

fn store_word(m: &mut Machine<'_>, word: fn(&[u8]) -> u16, waiting: bool) -> Step {
    check_x87(m, waiting)?;
    let value = word(xstate::image(m.cpu)?);
    if m.instruction.op0_kind() == OpKind::Register {
        let target = m.instruction.op0_register();
        return m.set(target, u64::from(value));
    }
    let operand = m.operand(0, 2, Access::Write)?;
    m.write(operand, &value.to_le_bytes())
}

fn emms(m: &mut Machine<'_>) -> Step {
    check_mmx(m)?;
    let image = xstate::image_mut(m.cpu)?;
    if xstate::in_use(image) & (1 << X87) != 0 {
        xstate::put(image, FTW, &[0, 0]);
    }
    Ok(())
}

fn check_mxcsr(m: &mut Machine<'_>, vex: bool) -> Step {
    if vex {
        check_vector(m, xstate::XCR0_AVX)
    } else {
        check_sse(m)
    }
}

fn ldmxcsr(m: &mut Machine<'_>, vex: bool) -> Step {
    check_mxcsr(m, vex)?;
    let value = m.operand_value(0, 4)? as u32;
    let mask = xstate::mxcsr_mask(xstate::image(m.cpu)?);
    if value & !mask != 0 {
        return Err(Stop::protection(0));
    }
    xstate::set_mxcsr(xstate::image_mut(m.cpu)?, value);
    Ok(())
}

fn stmxcsr(m: &mut Machine<'_>, vex: bool) -> Step {
    check_mxcsr(m, vex)?;
    let operand = m.operand(0, 4, Access::Write)?;
    let value = xstate::mxcsr(xstate::image(m.cpu)?);
    m.write(operand, &value.to_le_bytes())
}
