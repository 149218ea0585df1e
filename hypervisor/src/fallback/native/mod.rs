//! Instructions that compute: they run on the host's own processor.
//!
//! Nothing of the guest's runs as it is. An instruction of the allow-list ([`allow`]) is encoded
//! anew with its memory operand, if it has one, redirected to a copy; the encoding is decoded again
//! and compared; and then it runs in the thunk with the guest's registers. Beforehand all its faults
//! are ruled out by hand: CPUID of guest and host, control registers, alignment, unmasked
//! floating-point exceptions, and the memory operand's translation, for writing if it writes.

mod allow;
mod thunk;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, InstructionInfoFactory,
    MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

use allow::{Kind, allowed, needs_alignment};
use thunk::{General, IMAGE, State};

use super::machine::{Machine, Operand, RFLAGS_STATUS, Step, Stop};
use super::mmu::{Access, Span};
use super::xstate::{self, FDP, FIP, FOP, MXCSR, SSE, ST, X87, XMM, XMM_END};
use super::{decode, fpcontrol};

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
    let memory = memory(m, kind)?;
    if kind == Kind::X87 && memory.is_some_and(|memory| memory.writes) {
        // A store that an unmasked exception would suppress.
        let masks = xstate::fcw(xstate::image(m.cpu)?) & 0x3f;
        if masks != 0x3f {
            return Err(Stop::refuse("FCW has an exception unmasked"));
        }
    }
    let code = encode(&m.instruction)?;
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
        _ => Some(load_image(m)?),
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
        let pointers = pointers(m, kind, memory, &before[..len])?;
        save_image(m, &image, pointers)?;
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
    // SAFETY: `encode` let only an instruction of the allow-list through, with its memory operand
    // at the thunk's data page and no use of RSP; `run` ruled its faults out; `load_image` made
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

/// The instruction for the thunk: same code and operands, 64-bit mode, memory operand at the data
/// page.
fn encode(original: &Instruction) -> Step<Vec<u8>> {
    let refuse = || Stop::refuse("it cannot be encoded for the thunk");
    let (code_at, data_at) = thunk::addresses().map_err(Stop::Refuse)?;
    let mut wanted = *original;
    wanted.set_has_rep_prefix(false);
    wanted.set_has_repne_prefix(false);
    wanted.set_segment_prefix(Register::None);
    let has_memory = wanted.op_kinds().any(|kind| kind == OpKind::Memory);
    if has_memory {
        wanted.set_memory_base(Register::RIP);
        wanted.set_memory_index(Register::None);
        wanted.set_memory_index_scale(1);
        wanted.set_memory_displ_size(8);
        wanted.set_memory_displacement64(data_at);
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&wanted, code_at).map_err(|_| refuse())?;
    let bytes = encoder.take_buffer();

    // What will run is judged by its bytes, not by what they were made from.
    let mut decoder = Decoder::with_ip(64, &bytes, code_at, DecoderOptions::NONE);
    let encoded = decoder.decode();
    let same = encoded.code() == original.code()
        && encoded.len() == bytes.len()
        && bytes.len() <= 15
        && (0..original.op_count()).all(|n| same_operand(original, &encoded, n))
        && encoded.op_mask() == original.op_mask()
        && encoded.is_broadcast() == original.is_broadcast();
    let operand_ok = !has_memory
        || (encoded.memory_base() == Register::RIP
            && encoded.memory_index() == Register::None
            && encoded.memory_displacement64() == data_at
            && encoded.segment_prefix() == Register::None);
    if !same || !operand_ok || allowed(&encoded).is_none() || !is_contained(&encoded) {
        return Err(refuse());
    }
    Ok(bytes)
}

fn same_operand(a: &Instruction, b: &Instruction, n: u32) -> bool {
    a.op_kind(n) == b.op_kind(n)
        && match a.op_kind(n) {
            OpKind::Register => a.op_register(n) == b.op_register(n),
            OpKind::Memory => a.memory_size() == b.memory_size(),
            _ => a.immediate(n) == b.immediate(n),
        }
}

/// Whatever the allow-list says: no change of RIP, no stack, no segment or control register, no
/// memory beyond one explicit operand.
fn is_contained(encoded: &Instruction) -> bool {
    if encoded.code() == Code::INVALID
        || encoded.flow_control() != FlowControl::Next
        || encoded.is_privileged()
        || encoded.is_stack_instruction()
        || encoded.is_string_instruction()
        || encoded.is_vsib()
    {
        return false;
    }
    let explicit = encoded
        .op_kinds()
        .filter(|kind| *kind == OpKind::Memory)
        .count();
    let kinds_ok = encoded.op_kinds().all(|kind| {
        matches!(
            kind,
            OpKind::Register
                | OpKind::Memory
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64
        )
    });
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(encoded);
    kinds_ok
        && explicit <= 1
        && info.used_memory().len() == explicit
        && info.used_registers().iter().all(|used| {
            let register = used.register();
            let full = register.full_register();
            full != Register::RSP
                && (register.is_gpr()
                    || register.is_vector_register()
                    || register.is_mm()
                    || register.is_st()
                    || register.is_k()
                    || (register.is_segment_register() && used.access() == OpAccess::Read))
        })
}

/// The components that go in and out.
fn exchanged(m: &mut Machine<'_>) -> Step<u64> {
    let xcr0 = m.cpu.xcr0().map_err(Stop::Refuse)?;
    Ok((xcr0 | (1 << X87) | (1 << SSE)) & thunk::components())
}

/// The vCPU's state as an image for the thunk.
fn load_image(m: &mut Machine<'_>) -> Step<Box<[u8; IMAGE]>> {
    let components = exchanged(m)?;
    let places = places(m, components)?;
    let mut target = Box::new([0; IMAGE]);
    let image = xstate::image(m.cpu)?;
    let in_use = xstate::in_use(image) & components;
    target[MXCSR..MXCSR + 4].copy_from_slice(&xstate::mxcsr(image).to_le_bytes());
    if xstate::mxcsr(image) & !xstate::mxcsr_mask(image) & 0xffff != 0
        || xstate::mxcsr(image) >> 16 != 0
    {
        return Err(Stop::refuse("MXCSR has a reserved bit set"));
    }
    if in_use & (1 << X87) != 0 {
        target[..MXCSR].copy_from_slice(&image[..MXCSR]);
        target[ST..XMM].copy_from_slice(&image[ST..XMM]);
    }
    if in_use & (1 << SSE) != 0 {
        target[XMM..XMM_END].copy_from_slice(&image[XMM..XMM_END]);
    }
    for place in places {
        if in_use & (1 << place.number) != 0 {
            let from = image
                .get(place.guest..place.guest + place.size)
                .ok_or_else(|| Stop::refuse("the vCPU's XSAVE image is too short"))?;
            target[place.host..place.host + place.size].copy_from_slice(from);
        }
    }
    xstate::set_in_use(target.as_mut_slice(), in_use);
    if in_use & (1 << X87) != 0 {
        xstate::summarise(target.as_mut_slice());
    }
    Ok(target)
}

/// The thunk's image back into the vCPU's state.
fn save_image(m: &mut Machine<'_>, source: &[u8; IMAGE], pointers: Pointers) -> Step {
    let components = exchanged(m)?;
    let places = places(m, components)?;
    let in_use = xstate::in_use(source);
    let image = xstate::image_mut(m.cpu)?;
    for number in [X87, SSE] {
        xstate::initialise(image, number, None);
    }
    if in_use & (1 << X87) != 0 {
        xstate::materialise(image, X87, None);
        image[..MXCSR].copy_from_slice(&source[..MXCSR]);
        image[ST..XMM].copy_from_slice(&source[ST..XMM]);
        set_pointers(image, pointers);
    }
    if in_use & (1 << SSE) != 0 {
        xstate::materialise(image, SSE, None);
        image[XMM..XMM_END].copy_from_slice(&source[XMM..XMM_END]);
    }
    xstate::set_mxcsr(image, xstate::mxcsr(source));
    for place in places {
        let component = Some(place.component);
        xstate::initialise(image, place.number, component);
        if in_use & (1 << place.number) != 0 {
            xstate::materialise(image, place.number, component);
            xstate::put(
                image,
                place.guest,
                &source[place.host..place.host + place.size],
            );
        }
    }
    Ok(())
}

/// Where a component lies in both images.
struct Place {
    number: u32,
    component: xstate::Component,
    guest: usize,
    host: usize,
    size: usize,
}

fn places(m: &Machine<'_>, components: u64) -> Step<Vec<Place>> {
    let mut places = vec![];
    for number in (2..8).filter(|n| components & (1 << n) != 0) {
        let component = xstate::component(m.cpu.cpuid(), number);
        let (Some(component), Some((host, size))) = (component, thunk::place(number)) else {
            return Err(Stop::Refuse(format!("component {number} has no place")));
        };
        if component.size != size {
            return Err(Stop::Refuse(format!("component {number} differs in size")));
        }
        places.push(Place {
            number,
            component,
            guest: component.offset,
            host,
            size,
        });
    }
    Ok(places)
}

/// x87 instruction and data pointers and opcode.
#[derive(Clone, Copy, Default)]
struct Pointers {
    fip: u64,
    fdp: u64,
    fop: u16,
}

/// The pointers after the instruction. They are not taken from the host: what it holds is the
/// thunk's address, or nothing, since some processors keep them only for pending exceptions.
fn pointers(
    m: &mut Machine<'_>,
    kind: Kind,
    memory: Option<Memory>,
    loaded: &[u8],
) -> Step<Pointers> {
    let image = xstate::image(m.cpu)?;
    let mut pointers = if xstate::in_use(image) & (1 << X87) == 0 {
        Pointers::default()
    } else {
        Pointers {
            fip: xstate::get_u64(image, FIP),
            fdp: xstate::get_u64(image, FDP),
            fop: xstate::get_u16(image, FOP),
        }
    };
    match kind {
        Kind::X87 => {
            pointers.fip = m.instruction.ip();
            pointers.fop = decode::x87_opcode(m.bytes.as_slice());
            if let Some(memory) = memory {
                pointers.fdp = memory.operand.offset;
            }
        }
        // SDM volume 1, figures 8-9 and 8-11: the 32-bit and 16-bit protected mode formats.
        Kind::X87Load
            if matches!(
                m.instruction.memory_size(),
                MemorySize::FpuEnv28 | MemorySize::FpuState108
            ) =>
        {
            pointers.fip = u64::from(xstate::get_u32(loaded, 12));
            pointers.fop = xstate::get_u16(loaded, 18) & 0x7ff;
            pointers.fdp = u64::from(xstate::get_u32(loaded, 20));
        }
        Kind::X87Load => {
            pointers.fip = u64::from(xstate::get_u16(loaded, 6));
            pointers.fdp = u64::from(xstate::get_u16(loaded, 10));
        }
        _ if m.instruction.mnemonic() == Mnemonic::Fnsave => pointers = Pointers::default(),
        _ => {}
    }
    Ok(pointers)
}

fn set_pointers(image: &mut [u8], pointers: Pointers) {
    xstate::put(image, FIP, &pointers.fip.to_le_bytes());
    xstate::put(image, FDP, &pointers.fdp.to_le_bytes());
    xstate::put(image, FOP, &pointers.fop.to_le_bytes());
}
