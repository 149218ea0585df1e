//! Fetches and decodes the instruction at RIP.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Formatter, GasFormatter, Register};

use super::machine::{Machine, Step, Stop};
use super::mmu::{Access, MemoryFault};

/// The longest instruction, in bytes.
const LONGEST: usize = 15;

/// An instruction's bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bytes {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Bytes {
    pub(super) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

/// Reads the bytes at RIP into `machine.bytes` and decodes them into `machine.instruction`.
pub(super) fn fetch(machine: &mut Machine<'_>) -> Step {
    let mut bytes = Bytes::default();
    let result = fetch_into(machine, &mut bytes);
    machine.bytes = bytes;
    result
}

fn fetch_into(machine: &mut Machine<'_>, bytes: &mut Bytes) -> Step {
    let rip = machine.cpu.registers().rip;
    let start = if machine.bits == 64 {
        rip
    } else {
        rip.wrapping_add(machine.special.cs.base) & 0xffff_ffff
    };
    let mut beyond = None;
    bytes.len = LONGEST;
    if let Err(fault) = read(machine, start, &mut bytes.bytes) {
        // Perhaps only the second page is missing, and the instruction does not reach it.
        bytes.len = LONGEST.min(4096 - (start % 4096) as usize);
        beyond = Some(fault);
        let first = bytes.bytes.get_mut(..bytes.len).unwrap_or_default();
        if let Err(fault) = read(machine, start, first) {
            bytes.len = 0;
            return Err(Stop::memory(fault, Register::CS));
        }
    }

    let mut decoder = Decoder::with_ip(machine.bits, bytes.as_slice(), rip, DecoderOptions::NONE);
    decoder.decode_out(&mut machine.instruction);
    match decoder.last_error() {
        DecoderError::None => {
            bytes.len = machine.instruction.len();
            if machine.bits != 64 {
                let last = rip.wrapping_add(bytes.len as u64 - 1);
                if last > u64::from(machine.special.cs.limit) {
                    return Err(Stop::protection(0));
                }
            }
            Ok(())
        }
        DecoderError::NoMoreBytes => Err(match beyond {
            Some(fault) => Stop::memory(fault, Register::CS),
            None => Stop::protection(0),
        }),
        // The decoder calls an instruction that goes on after 15 bytes invalid, too.
        _ if decoder.position() >= LONGEST => Err(Stop::protection(0)),
        _ => Err(Stop::undefined()),
    }
}

fn read(machine: &Machine<'_>, linear: u64, buf: &mut [u8]) -> Result<(), MemoryFault> {
    machine
        .mmu
        .span(machine.ram, linear, buf.len(), Access::Execute)?
        .read(machine.ram, 0, buf)
}

/// The instruction as text, for a refusal.
pub(super) fn text(machine: &Machine<'_>) -> String {
    if machine.instruction.is_invalid() {
        return "?".into();
    }
    let mut text = String::new();
    GasFormatter::new().format(&machine.instruction, &mut text);
    text
}

/// The x87 opcode field (FOP) of an x87 instruction: 11 bits of its last opcode byte and ModR/M.
pub(super) fn x87_opcode(bytes: &[u8]) -> u16 {
    // No prefix byte is 0xd8 to 0xdf.
    let escape = bytes.iter().position(|byte| byte & 0xf8 == 0xd8);
    match escape.and_then(|at| bytes.get(at..at + 2)) {
        Some(&[escape, modrm]) => u16::from(escape & 7) << 8 | u16::from(modrm),
        _ => 0,
    }
}
