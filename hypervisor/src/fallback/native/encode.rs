//! Encodes an instruction for the thunk, and judges the result by its bytes.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, InstructionInfoFactory,
    OpAccess, OpKind, Register,
};

use super::allow::allowed;
use super::thunk;
use crate::fallback::machine::{Step, Stop};

/// The instruction for the thunk: same code and operands, 64-bit mode, memory operand at the data
/// page.
pub(super) fn encode(original: &Instruction) -> Step<Vec<u8>> {
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
