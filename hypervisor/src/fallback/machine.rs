//! One instruction and the vCPU that it runs on: what all handlers share.

use iced_x86::{Instruction, OpKind, Register};

use super::decode::Bytes;
use super::mmu::{Access, CR4_PKE, MemoryFault, Mmu, Span};
use super::{CpuState, xstate};
use crate::memory::GuestRam;
use crate::x86::{CpuidEntry, Segment, SpecialRegisters};

pub(super) const CR0_PE: u64 = 1;
pub(super) const CR0_MP: u64 = 1 << 1;
pub(super) const CR0_EM: u64 = 1 << 2;
pub(super) const CR0_TS: u64 = 1 << 3;
pub(super) const CR0_NE: u64 = 1 << 5;
pub(super) const CR4_OSFXSR: u64 = 1 << 9;
pub(super) const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LMA: u64 = 1 << 10;

pub(super) const RFLAGS_ZF: u64 = 1 << 6;
pub(super) const RFLAGS_AC: u64 = 1 << 18;
/// CF, PF, AF, ZF, SF, OF.
pub(super) const RFLAGS_STATUS: u64 = 0x8d5;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;

pub(super) const DB: u8 = 1;
pub(super) const BP: u8 = 3;
pub(super) const OF: u8 = 4;
const UD: u8 = 6;
const NM: u8 = 7;
const SS: u8 = 12;
const GP: u8 = 13;
const PF: u8 = 14;
const MF: u8 = 16;

/// An exception that the instruction raises.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Exception {
    pub(super) vector: u8,
    pub(super) error_code: Option<u32>,
    pub(super) cr2: Option<u64>,
}

/// Why an instruction does not simply complete.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Stop {
    /// It raises an exception, as the architecture says.
    Exception(Exception),
    /// It is not carried out.
    Refuse(String),
}

/// Result of a handler.
pub(super) type Step<T = ()> = Result<T, Stop>;

impl Stop {
    pub(super) fn exception(vector: u8) -> Self {
        Self::Exception(Exception {
            vector,
            error_code: None,
            cr2: None,
        })
    }

    /// #UD.
    pub(super) fn undefined() -> Self {
        Self::exception(UD)
    }

    /// #NM.
    pub(super) fn no_math() -> Self {
        Self::exception(NM)
    }

    /// #MF.
    pub(super) fn math_fault() -> Self {
        Self::exception(MF)
    }

    /// #GP with an error code.
    pub(super) fn protection(error_code: u32) -> Self {
        Self::Exception(Exception {
            vector: GP,
            error_code: Some(error_code),
            cr2: None,
        })
    }

    pub(super) fn refuse(why: impl Into<String>) -> Self {
        Self::Refuse(why.into())
    }

    /// What a failed access through `segment` becomes.
    pub(super) fn memory(fault: MemoryFault, segment: Register) -> Self {
        match fault {
            MemoryFault::Page { error_code, cr2 } => Self::Exception(Exception {
                vector: PF,
                error_code: Some(error_code),
                cr2: Some(cr2),
            }),
            MemoryFault::NotCanonical => segment_fault(segment),
            MemoryFault::NotRam { gpa } => {
                Self::Refuse(format!("guest-physical {gpa:#x} is not RAM"))
            }
            MemoryFault::Unstable => Self::refuse("its page tables keep changing"),
            MemoryFault::TooLong => Self::refuse("its operand is too long"),
        }
    }
}

fn segment_fault(segment: Register) -> Stop {
    if segment == Register::SS {
        Stop::Exception(Exception {
            vector: SS,
            error_code: Some(0),
            cr2: None,
        })
    } else {
        Stop::protection(0)
    }
}

/// A memory operand: where, and through which segment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Operand {
    pub(super) segment: Register,
    /// Offset in the segment: the effective address.
    pub(super) offset: u64,
    pub(super) linear: u64,
}

/// The vCPU at one instruction.
pub(super) struct Machine<'a> {
    pub(super) cpu: &'a mut dyn CpuState,
    pub(super) ram: &'a dyn GuestRam,
    /// Copied at the start: no handler changes them.
    pub(super) special: SpecialRegisters,
    pub(super) mmu: Mmu,
    pub(super) cpl: u8,
    /// 16, 32 or 64.
    pub(super) bits: u32,
    pub(super) instruction: Instruction,
    /// Its bytes.
    pub(super) bytes: Bytes,
}

impl<'a> Machine<'a> {
    pub(super) fn new(cpu: &'a mut dyn CpuState, ram: &'a dyn GuestRam) -> Step<Self> {
        let special = *cpu.special();
        let rflags = cpu.registers().rflags;
        let long = special.efer & EFER_LMA != 0;
        let bits = match (long && special.cs.l != 0, special.cs.db != 0) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        let cpl = if special.cr0 & CR0_PE == 0 {
            0
        } else if rflags & RFLAGS_VM != 0 {
            3
        } else {
            special.ss.dpl & 3
        };
        let physical_bits = cpuid(cpu.cpuid(), 0x8000_0008, 0).map_or(36, |leaf| leaf.eax as u8);
        let mut mmu = Mmu::new(&special, rflags, cpl, physical_bits);
        if special.cr4 & CR4_PKE != 0 {
            mmu = mmu.with_pkru(xstate::pkru(cpu)?);
        }
        Ok(Self {
            cpu,
            ram,
            special,
            mmu,
            cpl,
            bits,
            instruction: Instruction::default(),
            bytes: Bytes::default(),
        })
    }

    /// Real mode or virtual-8086 mode, where segments are not described by tables.
    pub(super) fn no_tables(&mut self) -> bool {
        self.special.cr0 & CR0_PE == 0 || self.cpu.registers().rflags & RFLAGS_VM != 0
    }

    /// 64-bit mode, compatibility mode, or neither: is long mode active?
    pub(super) fn long_mode(&self) -> bool {
        self.special.efer & EFER_LMA != 0
    }

    /// Moves RIP past the instruction and clears RF.
    pub(super) fn finish(&mut self) {
        let next = self.instruction.next_ip();
        let mask = self.address_mask();
        let registers = self.cpu.registers();
        registers.rip = next & mask;
        registers.rflags &= !RFLAGS_RF;
    }

    /// EIP does not wrap at 64 KiB in 16-bit code: the limit of the segment ends it, at the next fetch.
    fn address_mask(&self) -> u64 {
        match self.bits {
            64 => u64::MAX,
            _ => 0xffff_ffff,
        }
    }

    /// Tests a CPUID bit of the guest.
    pub(super) fn has(&self, bit: CpuidBit) -> bool {
        cpuid(self.cpu.cpuid(), bit.0, bit.1)
            .is_some_and(|leaf| register(leaf, bit.2) & (1 << bit.3) != 0)
    }

    /// #UD unless the guest's CPUID has the bit.
    pub(super) fn require(&self, bit: CpuidBit) -> Step {
        if self.has(bit) {
            Ok(())
        } else {
            Err(Stop::undefined())
        }
    }

    /// #GP(0) unless at CPL 0.
    pub(super) fn require_cpl0(&self) -> Step {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(Stop::protection(0))
        }
    }

    pub(super) fn msr(&mut self, index: u32) -> Step<u64> {
        self.cpu
            .msr(index)
            .ok_or_else(|| Stop::Refuse(format!("MSR {index:#x} cannot be read")))
    }

    /// A general register, zero-extended.
    pub(super) fn get(&mut self, register: Register) -> Step<u64> {
        let value = *self
            .slot(register.full_register())
            .ok_or_else(|| not_general(register))?;
        Ok(match register.size() {
            1 if is_high_byte(register) => (value >> 8) & 0xff,
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        })
    }

    /// Sets a general register: 32-bit writes clear the upper half, shorter ones keep the rest.
    pub(super) fn set(&mut self, register: Register, value: u64) -> Step {
        let slot = self
            .slot(register.full_register())
            .ok_or_else(|| not_general(register))?;
        *slot = match register.size() {
            1 if is_high_byte(register) => (*slot & !0xff00) | ((value & 0xff) << 8),
            1 => (*slot & !0xff) | (value & 0xff),
            2 => (*slot & !0xffff) | (value & 0xffff),
            4 => value & 0xffff_ffff,
            _ => value,
        };
        Ok(())
    }

    fn slot(&mut self, full: Register) -> Option<&mut u64> {
        let r = self.cpu.registers();
        Some(match full {
            Register::RAX => &mut r.rax,
            Register::RBX => &mut r.rbx,
            Register::RCX => &mut r.rcx,
            Register::RDX => &mut r.rdx,
            Register::RSI => &mut r.rsi,
            Register::RDI => &mut r.rdi,
            Register::RBP => &mut r.rbp,
            Register::RSP => &mut r.rsp,
            Register::R8 => &mut r.r8,
            Register::R9 => &mut r.r9,
            Register::R10 => &mut r.r10,
            Register::R11 => &mut r.r11,
            Register::R12 => &mut r.r12,
            Register::R13 => &mut r.r13,
            Register::R14 => &mut r.r14,
            Register::R15 => &mut r.r15,
            _ => return None,
        })
    }

    pub(super) fn set_flag(&mut self, flag: u64, on: bool) {
        let registers = self.cpu.registers();
        if on {
            registers.rflags |= flag;
        } else {
            registers.rflags &= !flag;
        }
    }

    /// The instruction's memory operand number `n`. `len` bytes at it will be used (for segment
    /// limits outside 64-bit mode).
    pub(super) fn operand(&mut self, n: u32, len: usize, access: Access) -> Step<Operand> {
        let instruction = self.instruction;
        let segment = instruction.memory_segment();
        let registers = *self.cpu.registers();
        let mut probe = RegisterValues(registers);
        let offset = instruction
            .virtual_address(n, 0, |register, _, _| probe.value(register))
            .ok_or_else(|| Stop::refuse("its address is not computable"))?;
        self.at(segment, offset, len, access)
    }

    /// The memory at `offset` in `segment`.
    pub(super) fn at(
        &mut self,
        segment: Register,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Step<Operand> {
        let descriptor = match segment {
            Register::CS => self.special.cs,
            Register::DS => self.special.ds,
            Register::ES => self.special.es,
            Register::FS => self.special.fs,
            Register::GS => self.special.gs,
            Register::SS => self.special.ss,
            _ => return Err(Stop::refuse("its segment is unknown")),
        };
        let linear = if self.bits == 64 {
            match segment {
                Register::FS | Register::GS => offset.wrapping_add(descriptor.base),
                _ => offset,
            }
        } else {
            if !within(&descriptor, offset, len, access, self.no_tables()) {
                return Err(segment_fault(segment));
            }
            offset.wrapping_add(descriptor.base) & 0xffff_ffff
        };
        Ok(Operand {
            segment,
            offset,
            linear,
        })
    }

    /// Translates `len` bytes at an operand.
    pub(super) fn span(&self, operand: Operand, len: usize, access: Access) -> Step<Span> {
        let last = operand.linear.wrapping_add(len.max(1) as u64 - 1);
        if !self.mmu.is_canonical(operand.linear) || !self.mmu.is_canonical(last) {
            return Err(segment_fault(operand.segment));
        }
        self.mmu
            .span(self.ram, operand.linear, len, access)
            .map_err(|fault| Stop::memory(fault, operand.segment))
    }

    pub(super) fn read(&self, operand: Operand, buf: &mut [u8]) -> Step {
        self.span(operand, buf.len(), Access::Read)?
            .read(self.ram, 0, buf)
            .map_err(|fault| Stop::memory(fault, operand.segment))
    }

    pub(super) fn write(&self, operand: Operand, buf: &[u8]) -> Step {
        self.span(operand, buf.len(), Access::Write)?
            .write(self.ram, 0, buf)
            .map_err(|fault| Stop::memory(fault, operand.segment))
    }

    /// Operand `n` as a number: a general register, or memory of `size` bytes (at most 8).
    pub(super) fn operand_value(&mut self, n: u32, size: usize) -> Step<u64> {
        if self.instruction.op_kind(n) == OpKind::Register {
            return self.get(self.instruction.op_register(n));
        }
        let operand = self.operand(n, size, Access::Read)?;
        let mut bytes = [0; 8];
        let target = bytes
            .get_mut(..size)
            .ok_or_else(|| Stop::refuse("its operand is too long"))?;
        self.read(operand, target)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Values of registers for iced's address computation; segments count as zero.
struct RegisterValues(crate::x86::Registers);

impl RegisterValues {
    fn value(&mut self, register: Register) -> Option<u64> {
        if register.is_segment_register() {
            return Some(0);
        }
        let r = &self.0;
        let full = match register.full_register() {
            Register::RAX => r.rax,
            Register::RBX => r.rbx,
            Register::RCX => r.rcx,
            Register::RDX => r.rdx,
            Register::RSI => r.rsi,
            Register::RDI => r.rdi,
            Register::RBP => r.rbp,
            Register::RSP => r.rsp,
            Register::R8 => r.r8,
            Register::R9 => r.r9,
            Register::R10 => r.r10,
            Register::R11 => r.r11,
            Register::R12 => r.r12,
            Register::R13 => r.r13,
            Register::R14 => r.r14,
            Register::R15 => r.r15,
            _ => return None,
        };
        Some(match register.size() {
            2 => full & 0xffff,
            4 => full & 0xffff_ffff,
            _ => full,
        })
    }
}

/// Segment limit and type (SDM volume 3, §5.3 and §5.5), for modes other than 64-bit.
fn within(segment: &Segment, offset: u64, len: usize, access: Access, no_tables: bool) -> bool {
    let Some(last) = offset.checked_add(len.max(1) as u64 - 1) else {
        return false;
    };
    let code = segment.type_ & 8 != 0;
    if !no_tables {
        let allowed = match access {
            Access::Execute => code,
            Access::Read => !code || segment.type_ & 2 != 0,
            Access::Write => !code && segment.type_ & 2 != 0,
        };
        if segment.unusable != 0 || !allowed {
            return false;
        }
    }
    let limit = u64::from(segment.limit);
    if !no_tables && !code && segment.type_ & 4 != 0 {
        let top = if segment.db != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}

fn not_general(register: Register) -> Stop {
    Stop::Refuse(format!("{register:?} is not a general register"))
}

/// A CPUID bit: leaf, subleaf, register (0 = EAX to 3 = EDX), bit.
pub(super) type CpuidBit = (u32, u32, u8, u8);

/// The entry for a leaf and subleaf.
pub(super) fn cpuid(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
    const SIGNIFICANT_INDEX: u32 = 1;
    entries.iter().find(|entry| {
        entry.function == leaf && (entry.flags & SIGNIFICANT_INDEX == 0 || entry.index == subleaf)
    })
}

fn register(leaf: &CpuidEntry, which: u8) -> u32 {
    match which {
        0 => leaf.eax,
        1 => leaf.ebx,
        2 => leaf.ecx,
        _ => leaf.edx,
    }
}
