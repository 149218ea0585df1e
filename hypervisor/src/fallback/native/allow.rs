//! Which instructions may run natively, and what CPUID must say for each.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::fallback::machine::CpuidBit;

/// What kind of state an instruction uses; it decides which checks come first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// General registers only.
    General,
    /// x87, leaves its address in the instruction pointer field.
    X87,
    /// x87 environment or state, loaded.
    X87Load,
    /// x87 environment or state, stored without looking at pending exceptions.
    X87Store,
    /// MMX registers.
    Mmx,
    /// XMM registers, legacy encoding.
    Sse,
    /// Both of these.
    SseMmx,
    /// XMM and YMM registers, VEX encoding.
    Avx,
    /// EVEX encoding or opmask registers.
    Avx512,
}

/// The kind of an instruction on the list; `None` for all others.
pub(super) fn allowed(instruction: &Instruction) -> Option<Kind> {
    let known = instruction
        .cpuid_features()
        .iter()
        .all(|feature| bit(*feature).is_some());
    if !known || instruction.is_vsib() {
        return None;
    }
    let mnemonic = instruction.mnemonic();
    if is_general(mnemonic) {
        return Some(Kind::General);
    }
    if is_x87(mnemonic) {
        return Some(Kind::X87);
    }
    match mnemonic {
        Mnemonic::Fldenv | Mnemonic::Frstor => return Some(Kind::X87Load),
        Mnemonic::Fnstenv | Mnemonic::Fnsave => return Some(Kind::X87Store),
        Mnemonic::Vzeroupper | Mnemonic::Vzeroall => return Some(Kind::Avx),
        // Memory that no operand names.
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => return None,
        _ => {}
    }
    let has = |test: fn(Register) -> bool| {
        (0..instruction.op_count())
            .any(|n| instruction.op_kind(n) == OpKind::Register && test(instruction.op_register(n)))
    };
    let (mm, vector) = (
        has(|register| register.is_mm()),
        has(|register| register.is_vector_register()),
    );
    match instruction.encoding() {
        EncodingKind::Legacy if mm && vector => Some(Kind::SseMmx),
        EncodingKind::Legacy if mm => Some(Kind::Mmx),
        EncodingKind::Legacy if vector => Some(Kind::Sse),
        EncodingKind::VEX if has(|register| register.is_k()) => Some(Kind::Avx512),
        EncodingKind::VEX if vector => Some(Kind::Avx),
        EncodingKind::EVEX => Some(Kind::Avx512),
        _ => None,
    }
}

fn is_general(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{
        Adcx, Adox, Andn, Bextr, Blsi, Blsmsk, Blsr, Bzhi, Cmpxchg16b, Crc32, Lzcnt, Movbe,
        Movdiri, Movnti, Mulx, Pdep, Pext, Popcnt, Rorx, Sarx, Shlx, Shrx, Tzcnt,
    };
    matches!(
        mnemonic,
        Adcx | Adox
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bzhi
            | Cmpxchg16b
            | Crc32
            | Lzcnt
            | Movbe
            | Movdiri
            | Movnti
            | Mulx
            | Pdep
            | Pext
            | Popcnt
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Tzcnt
    )
}

#[rustfmt::skip]
fn is_x87(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{
        F2xm1, Fabs, Fadd, Faddp, Fbld, Fbstp, Fchs, Fcmovb, Fcmovbe, Fcmove, Fcmovnb, Fcmovnbe,
        Fcmovne, Fcmovnu, Fcmovu, Fcom, Fcomi, Fcomip, Fcomp, Fcompp, Fcos, Fdecstp, Fdiv, Fdivp,
        Fdivr, Fdivrp, Ffree, Fiadd, Ficom, Ficomp, Fidiv, Fidivr, Fild, Fimul, Fincstp, Fist,
        Fistp, Fisttp, Fisub, Fisubr, Fld, Fld1, Fldl2e, Fldl2t, Fldlg2, Fldln2, Fldpi, Fldz, Fmul,
        Fmulp, Fnop, Fpatan, Fprem, Fprem1, Fptan, Frndint, Fscale, Fsin, Fsincos, Fsqrt, Fst,
        Fstp, Fsub, Fsubp, Fsubr, Fsubrp, Ftst, Fucom, Fucomi, Fucomip, Fucomp, Fucompp, Fxam, Fxch,
        Fxtract, Fyl2x, Fyl2xp1,
    };
    matches!(
        mnemonic,
        F2xm1 | Fabs | Fadd | Faddp | Fbld | Fbstp | Fchs | Fcmovb | Fcmovbe | Fcmove | Fcmovnb
            | Fcmovnbe | Fcmovne | Fcmovnu | Fcmovu | Fcom | Fcomi | Fcomip | Fcomp | Fcompp | Fcos
            | Fdecstp | Fdiv | Fdivp | Fdivr | Fdivrp | Ffree | Fiadd | Ficom | Ficomp | Fidiv
            | Fidivr | Fild | Fimul | Fincstp | Fist | Fistp | Fisttp | Fisub | Fisubr | Fld | Fld1
            | Fldl2e | Fldl2t | Fldlg2 | Fldln2 | Fldpi | Fldz | Fmul | Fmulp | Fnop | Fpatan
            | Fprem | Fprem1 | Fptan | Frndint | Fscale | Fsin | Fsincos | Fsqrt | Fst | Fstp
            | Fsub | Fsubp | Fsubr | Fsubrp | Ftst | Fucom | Fucomi | Fucomip | Fucomp | Fucompp
            | Fxam | Fxch | Fxtract | Fyl2x | Fyl2xp1
    )
}

/// Does the instruction fault when its memory operand is not aligned to its size?
/// (SDM volume 2, §2.4, exception types 1, 2 and 4; CMPXCHG16B.)
pub(super) fn needs_alignment(instruction: &Instruction, kind: Kind) -> bool {
    use Mnemonic::{
        Cmpxchg16b, Lddqu, Movdqu, Movupd, Movups, Pcmpestri, Pcmpestri64, Pcmpestrm, Pcmpestrm64,
        Pcmpistri, Pcmpistrm, Vmovapd, Vmovaps, Vmovdqa, Vmovdqa32, Vmovdqa64, Vmovntdq, Vmovntdqa,
        Vmovntpd, Vmovntps,
    };
    let mnemonic = instruction.mnemonic();
    match kind {
        Kind::General => mnemonic == Cmpxchg16b,
        Kind::Sse => {
            instruction.memory_size().size() == 16
                && !matches!(
                    mnemonic,
                    Lddqu
                        | Movdqu
                        | Movupd
                        | Movups
                        | Pcmpestri
                        | Pcmpestri64
                        | Pcmpestrm
                        | Pcmpestrm64
                        | Pcmpistri
                        | Pcmpistrm
                )
        }
        Kind::Avx | Kind::Avx512 => matches!(
            mnemonic,
            Vmovapd
                | Vmovaps
                | Vmovdqa
                | Vmovdqa32
                | Vmovdqa64
                | Vmovntdq
                | Vmovntdqa
                | Vmovntpd
                | Vmovntps
        ),
        _ => false,
    }
}

const LEAF_1_ECX: (u32, u32, u8) = (1, 0, 2);
const LEAF_1_EDX: (u32, u32, u8) = (1, 0, 3);
const LEAF_7_EBX: (u32, u32, u8) = (7, 0, 1);
const LEAF_7_ECX: (u32, u32, u8) = (7, 0, 2);
const LEAF_7_1_EAX: (u32, u32, u8) = (7, 1, 0);
const EXTENDED_1_ECX: (u32, u32, u8) = (0x8000_0001, 0, 2);

/// The CPUID bit of a feature; `None` if nothing that needs it is on the list.
pub(super) fn bit(feature: CpuidFeature) -> Option<CpuidBit> {
    let ((leaf, subleaf, register), bit) = match feature {
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => (LEAF_1_EDX, 0),
        CpuidFeature::CMOV => (LEAF_1_EDX, 15),
        CpuidFeature::MMX => (LEAF_1_EDX, 23),
        CpuidFeature::SSE => (LEAF_1_EDX, 25),
        CpuidFeature::SSE2 => (LEAF_1_EDX, 26),
        CpuidFeature::SSE3 => (LEAF_1_ECX, 0),
        CpuidFeature::PCLMULQDQ => (LEAF_1_ECX, 1),
        CpuidFeature::SSSE3 => (LEAF_1_ECX, 9),
        CpuidFeature::FMA => (LEAF_1_ECX, 12),
        CpuidFeature::CMPXCHG16B => (LEAF_1_ECX, 13),
        CpuidFeature::SSE4_1 => (LEAF_1_ECX, 19),
        CpuidFeature::SSE4_2 => (LEAF_1_ECX, 20),
        CpuidFeature::MOVBE => (LEAF_1_ECX, 22),
        CpuidFeature::POPCNT => (LEAF_1_ECX, 23),
        CpuidFeature::AES => (LEAF_1_ECX, 25),
        CpuidFeature::AVX => (LEAF_1_ECX, 28),
        CpuidFeature::F16C => (LEAF_1_ECX, 29),
        CpuidFeature::BMI1 => (LEAF_7_EBX, 3),
        CpuidFeature::AVX2 => (LEAF_7_EBX, 5),
        CpuidFeature::BMI2 => (LEAF_7_EBX, 8),
        CpuidFeature::AVX512F => (LEAF_7_EBX, 16),
        CpuidFeature::AVX512DQ => (LEAF_7_EBX, 17),
        CpuidFeature::ADX => (LEAF_7_EBX, 19),
        CpuidFeature::AVX512_IFMA => (LEAF_7_EBX, 21),
        CpuidFeature::AVX512CD => (LEAF_7_EBX, 28),
        CpuidFeature::SHA => (LEAF_7_EBX, 29),
        CpuidFeature::AVX512BW => (LEAF_7_EBX, 30),
        CpuidFeature::AVX512VL => (LEAF_7_EBX, 31),
        CpuidFeature::AVX512_VBMI => (LEAF_7_ECX, 1),
        CpuidFeature::AVX512_VBMI2 => (LEAF_7_ECX, 6),
        CpuidFeature::GFNI => (LEAF_7_ECX, 8),
        CpuidFeature::VAES => (LEAF_7_ECX, 9),
        CpuidFeature::VPCLMULQDQ => (LEAF_7_ECX, 10),
        CpuidFeature::AVX512_VNNI => (LEAF_7_ECX, 11),
        CpuidFeature::AVX512_BITALG => (LEAF_7_ECX, 12),
        CpuidFeature::AVX512_VPOPCNTDQ => (LEAF_7_ECX, 14),
        CpuidFeature::MOVDIRI => (LEAF_7_ECX, 27),
        CpuidFeature::AVX_VNNI => (LEAF_7_1_EAX, 4),
        CpuidFeature::AVX512_BF16 => (LEAF_7_1_EAX, 5),
        CpuidFeature::LZCNT => (EXTENDED_1_ECX, 5),
        CpuidFeature::SSE4A => (EXTENDED_1_ECX, 6),
        _ => return None,
    };
    Some((leaf, subleaf, register, bit))
}

/// Does the host have a feature of [`bit`]'s list?
pub(super) fn host_has(bit: CpuidBit) -> bool {
    static LEAVES: OnceLock<Vec<(u32, u32, [u32; 4])>> = OnceLock::new();
    let leaves = LEAVES.get_or_init(|| {
        [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0)]
            .into_iter()
            .filter(|&(leaf, subleaf)| {
                let top = __cpuid(leaf & 0x8000_0000).eax;
                leaf <= top && (subleaf == 0 || __cpuid_count(leaf, 0).eax >= subleaf)
            })
            .map(|(leaf, subleaf)| {
                let found = __cpuid_count(leaf, subleaf);
                let registers = [found.eax, found.ebx, found.ecx, found.edx];
                (leaf, subleaf, registers)
            })
            .collect()
    });
    leaves
        .iter()
        .find(|(leaf, subleaf, _)| (*leaf, *subleaf) == (bit.0, bit.1))
        .and_then(|(_, _, registers)| registers.get(usize::from(bit.2)))
        .is_some_and(|register| register & (1 << bit.3) != 0)
}
