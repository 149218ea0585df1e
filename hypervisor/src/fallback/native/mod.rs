//! Instructions that compute: they run on the host's own processor.
//!
//! Nothing of the guest's runs as it is. An instruction of the allow-list ([`allow`]) is encoded
//! anew with its memory operand, if it has one, redirected to a copy; the encoding is decoded again
//! and compared; and then it runs in the thunk with the guest's registers. Beforehand all its faults
//! are ruled out by hand: CPUID of guest and host, control registers, alignment, unmasked
//! floating-point exceptions, and the memory operand's translation, for writing if it writes.

mod allow;
mod encode;
mod image;
mod thunk;

use iced_x86::{InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind};

use allow::{Kind, allowed, needs_alignment};
use thunk::{General, State};

use super::machine::{Machine, Operand, RFLAGS_STATUS, Step, Stop};
use super::mmu::{Access, Span};
use super::{fpcontrol, xstate};

/// The longest memory operand that is copied: a ZMM register, or FNSAVE's area.
const LONGEST: usize = 128;
const MXCSR_MASKS: u32 = 0x1f80;
/// How often a locked instruction is tried while other vCPUs change its operand.
const ATTEMPTS: u32 = 1000;

/// Gets ready to run instructions, so that none of the system calls that this needs (memfd_create,
/// mmap) comes later.
pub(super) fn prepare() -> Result<(), String> {
    thunk::prepare()
}

/// Carries the instruction out; `None` if it is not on the list.
pub(super) fn step(m: &mut Machine<'_>) -> Option<Step> {
    let kind = allowed(&m.instruction)?;
    Some(run(m, kind))
}

/// The memory operand of the instruction at hand.
#[derive(Clone, Copy)]
struct Memory {
    operand: Operand,
    span: Span,
    len: usize,
    reads: bool,
    writes: bool,
    /// Not all bytes need be read or written.
    partial: bool,
}

fn run(m: &mut Machine<'_>, kind: Kind) -> Step {
    check_features(m)?;
    check_state(m, kind)?;
    let mut memory = memory(m, kind)?;
    if let Some(memory) = &mut memory {
        // An unmasked exception suppresses an x87 store.
        memory.partial |= kind == Kind::X87 && xstate::fcw(xstate::image(m.cpu)?) & 0x3f != 0x3f;
    }
    let code = encode::encode(&m.instruction)?;
    for _ in 0..ATTEMPTS {
        if attempt(m, kind, memory, &code)? {
            return Ok(());
        }
    }
    Err(Stop::refuse("its operand keeps changing"))
}

/// Runs the instruction and takes its results over; false if it was locked and the operand changed
/// meanwhile, so that nothing has happened.
fn attempt(m: &mut Machine<'_>, kind: Kind, memory: Option<Memory>, code: &[u8]) -> Step<bool> {
    let mut before = [0; LONGEST];
    let mut after = [0; LONGEST];
    let len = memory.map_or(0, |memory| memory.len);
    if let Some(memory) = memory
        && (memory.reads || memory.partial)
    {
        memory
            .span
            .read(m.ram, 0, &mut before[..len])
            .map_err(|fault| Stop::memory(fault, memory.operand.segment))?;
        after = before;
    }

    let mut image = match kind {
        Kind::General => None,
        _ => Some(image::load(m)?),
    };
    let r = *m.cpu.registers();
    let general: General = [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    let mut state = State {
        general,
        flags: (r.rflags & RFLAGS_STATUS) | 2,
        image: image.as_deref_mut(),
        operand: &mut after[..len],
    };
    execute(code, &mut state)?;
    let (general, flags) = (state.general, state.flags);

    if let Some(memory) = memory
        && memory.writes
        && !store(m, memory, &before[..len], &after[..len])?
    {
        return Ok(false);
    }
    if let Some(image) = image {
        let pointers =
            image::pointers(m, kind, memory.map(|memory| memory.operand), &before[..len])?;
        image::save(m, &image, pointers)?;
    }
    let r = m.cpu.registers();
    [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ] = general;
    r.rflags = (r.rflags & !RFLAGS_STATUS) | (flags & RFLAGS_STATUS);
    Ok(true)
}

#[allow(unsafe_code)]
fn execute(code: &[u8], state: &mut State<'_>) -> Step {
    // SAFETY: `encode::encode` let only an instruction of the allow-list through, with its memory operand
    // at the thunk's data page and no use of RSP; `run` ruled its faults out; `image::load` made
    // an image with only the thunk's components and a valid MXCSR.
    unsafe { thunk::run(code, state) }.map_err(Stop::Refuse)
}

/// Writes the operand back: of one that need not be written in full, only what changed; of a locked
/// instruction, in one step, or not at all and false if it is no longer what was read.
fn store(m: &Machine<'_>, memory: Memory, before: &[u8], after: &[u8]) -> Step<bool> {
    let segment = memory.operand.segment;
    let write = |at: usize, bytes: &[u8]| {
        memory
            .span
            .write(m.ram, at, bytes)
            .map_err(|fault| Stop::memory(fault, segment))
    };
    if m.instruction.has_lock_prefix() {
        let (Some(gpa), Ok(before), Ok(after)) = (
            memory.span.contiguous(),
            before.try_into().map(u128::from_le_bytes),
            after.try_into().map(u128::from_le_bytes),
        ) else {
            return Err(Stop::refuse("it locks other than 16 bytes"));
        };
        return m
            .ram
            .compare_exchange(gpa, before, after)
            .map_err(|error| Stop::memory(error.into(), segment));
    }
    if memory.partial {
        for (at, (old, new)) in before.iter().zip(after).enumerate() {
            if old != new {
                write(at, &[*new])?;
            }
        }
    } else {
        write(0, after)?;
    }
    Ok(true)
}

/// #UD for what the guest's CPUID lacks; refused if it is the host that lacks it.
fn check_features(m: &Machine<'_>) -> Step {
    for feature in m.instruction.cpuid_features() {
        let bit = allow::bit(*feature).ok_or_else(|| Stop::refuse("it is not on the list"))?;
        if !m.has(bit) {
            // Without the feature these two are BSR and BSF.
            if matches!(m.instruction.mnemonic(), Mnemonic::Lzcnt | Mnemonic::Tzcnt) {
                return Err(Stop::refuse("the guest's CPUID lacks it"));
            }
            return Err(Stop::undefined());
        }
        if !allow::host_has(bit) {
            return Err(Stop::Refuse(format!("the host lacks {feature:?}")));
        }
    }
    Ok(())
}

fn check_state(m: &mut Machine<'_>, kind: Kind) -> Step {
    let host = |bits: u64| {
        if thunk::components() & bits == bits {
            Ok(())
        } else {
            Err(Stop::refuse("the host has not enabled its vector state"))
        }
    };
    match kind {
        Kind::General => return Ok(()),
        Kind::X87 => return fpcontrol::check_x87(m, true),
        Kind::X87Load | Kind::X87Store => {
            if m.no_tables() {
                return Err(Stop::refuse("its format differs in real mode"));
            }
            return fpcontrol::check_x87(m, kind == Kind::X87Load);
        }
        Kind::Mmx => fpcontrol::check_mmx(m)?,
        Kind::Sse => fpcontrol::check_sse(m)?,
        Kind::SseMmx => {
            fpcontrol::check_sse(m)?;
            fpcontrol::pending(m)?;
        }
        Kind::Avx => {
            fpcontrol::check_vector(m, xstate::XCR0_AVX)?;
            host(xstate::XCR0_AVX)?;
        }
        Kind::Avx512 => {
            fpcontrol::check_vector(m, xstate::XCR0_AVX512)?;
            host(xstate::XCR0_AVX512)?;
        }
    }
    if xstate::mxcsr(xstate::image(m.cpu)?) & MXCSR_MASKS != MXCSR_MASKS {
        return Err(Stop::refuse("MXCSR has an exception unmasked"));
    }
    Ok(())
}

/// Finds and translates the memory operand.
fn memory(m: &mut Machine<'_>, kind: Kind) -> Step<Option<Memory>> {
    let instruction = m.instruction;
    let Some(n) = (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory)
    else {
        return Ok(None);
    };
    let size = match instruction.memory_size() {
        MemorySize::Unknown => 0,
        size => size.size(),
    };
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(&instruction).op_access(n);
    let (reads, writes, mut partial) = match used {
        OpAccess::Read => (true, false, false),
        OpAccess::CondRead => (true, false, true),
        OpAccess::Write => (false, true, false),
        OpAccess::CondWrite => (false, true, true),
        OpAccess::ReadWrite => (true, true, false),
        OpAccess::ReadCondWrite => (true, true, false),
        OpAccess::None | OpAccess::NoMemAccess => return Err(Stop::refuse("it only names memory")),
    };
    partial |= instruction.has_op_mask() && !instruction.is_broadcast();
    if size == 0 || size > LONGEST {
        return Err(Stop::refuse("its operand's size is not fixed"));
    }
    let access = if writes { Access::Write } else { Access::Read };
    let operand = m.operand(n, size, access)?;
    if needs_alignment(&instruction, kind) && operand.linear & (size as u64 - 1) != 0 {
        return Err(Stop::protection(0));
    }
    let span = match m.span(operand, size, access) {
        Err(Stop::Exception(_)) if partial => {
            return Err(Stop::refuse(
                "its masked operand may reach an unmapped page",
            ));
        }
        other => other?,
    };
    Ok(Some(Memory {
        operand,
        span,
        len: size,
        reads,
        writes,
        partial,
    }))
}
