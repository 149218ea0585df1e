//! XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS in both address widths
//! (Intel SDM volume 1, chapter 13).

use iced_x86::Mnemonic;

use super::machine::{CR0_TS, CR4_OSXSAVE, CpuidBit, Machine, Operand, Step, Stop};
use super::mmu::{Access, Span};
use super::xstate::{
    self, Component, EXTENDED, FDP, FIP, FOP, HEADER, MXCSR, MXCSR_INIT, SSE, ST, X87, XMM, XMM_END,
};

const XSAVE: CpuidBit = (1, 0, 2, 26);
const XSAVEOPT: CpuidBit = (0xd, 1, 0, 0);
const XSAVEC: CpuidBit = (0xd, 1, 0, 1);
const XSAVES: CpuidBit = (0xd, 1, 0, 3);

const MSR_XSS: u32 = 0xda0;
const COMPACTED: u64 = 1 << 63;
/// Components that can exist (bit 63 is the format, bit 62 was LWP).
const NUMBERS: std::ops::Range<u32> = 2..62;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Save {
    Plain,
    Optimised,
    Compacted,
    Supervisor,
}

/// Carries the instruction out; `None` if it is none of these.
pub(super) fn step(m: &mut Machine<'_>) -> Option<Step> {
    Some(match m.instruction.mnemonic() {
        Mnemonic::Xsave => save(m, Save::Plain, false),
        Mnemonic::Xsave64 => save(m, Save::Plain, true),
        Mnemonic::Xsaveopt => save(m, Save::Optimised, false),
        Mnemonic::Xsaveopt64 => save(m, Save::Optimised, true),
        Mnemonic::Xsavec => save(m, Save::Compacted, false),
        Mnemonic::Xsavec64 => save(m, Save::Compacted, true),
        Mnemonic::Xsaves => save(m, Save::Supervisor, false),
        Mnemonic::Xsaves64 => save(m, Save::Supervisor, true),
        Mnemonic::Xrstor => restore(m, false, false),
        Mnemonic::Xrstor64 => restore(m, false, true),
        Mnemonic::Xrstors => restore(m, true, false),
        Mnemonic::Xrstors64 => restore(m, true, true),
        _ => return None,
    })
}

/// The checks that all of them share. Gives the operand, and the components that are enabled:
/// XCR0, with IA32_XSS for the supervisor forms.
fn begin(
    m: &mut Machine<'_>,
    feature: CpuidBit,
    supervisor: bool,
    access: Access,
) -> Step<(Operand, u64)> {
    m.require(feature)?;
    if m.special.cr4 & CR4_OSXSAVE == 0 {
        return Err(Stop::undefined());
    }
    if m.special.cr0 & CR0_TS != 0 {
        return Err(Stop::no_math());
    }
    if supervisor {
        m.require_cpl0()?;
    }
    let operand = m.operand(0, EXTENDED, access)?;
    if operand.linear & 63 != 0 {
        return Err(Stop::protection(0));
    }
    let mut enabled = m.cpu.xcr0().map_err(Stop::Refuse)?;
    if supervisor {
        // Without the MSR there are no supervisor components.
        enabled |= m.cpu.msr(MSR_XSS).unwrap_or(0);
    }
    Ok((operand, enabled & !COMPACTED))
}

fn requested(m: &mut Machine<'_>) -> u64 {
    let registers = m.cpu.registers();
    (registers.rdx << 32) | (registers.rax & 0xffff_ffff)
}

fn place(m: &Machine<'_>, number: u32) -> Step<Component> {
    xstate::component(m.cpu.cpuid(), number).ok_or_else(|| {
        Stop::Refuse(format!(
            "CPUID leaf 0xD does not describe component {number}"
        ))
    })
}

/// Number, offset and size of each component in `wanted`. In the compacted format, `compacted` holds
/// the components that take room, wanted or not; in the standard one each has its place by CPUID.
fn places(m: &Machine<'_>, wanted: u64, compacted: Option<u64>) -> Step<Vec<(u32, usize, usize)>> {
    let mut found = vec![];
    let mut next = EXTENDED;
    for number in NUMBERS {
        let bit = 1_u64 << number;
        if (compacted.unwrap_or(0) | wanted) & bit == 0 {
            continue;
        }
        let component = place(m, number)?;
        let mut offset = component.offset;
        if compacted.is_some() {
            if component.aligned {
                next = next.next_multiple_of(64);
            }
            offset = next;
            next += component.size;
        }
        if wanted & bit != 0 {
            if offset + component.size > Span::MAX {
                return Err(Stop::refuse("its area is too long"));
            }
            found.push((number, offset, component.size));
        }
    }
    Ok(found)
}

fn end(places: &[(u32, usize, usize)]) -> usize {
    places
        .iter()
        .map(|(_, offset, size)| offset + size)
        .max()
        .unwrap_or(EXTENDED)
}

/// MSRs that make up a supervisor component, in the order of its layout (SDM volume 1, §13.5.9).
fn supervisor_msrs(number: u32) -> Option<&'static [u32]> {
    match number {
        // IA32_U_CET, IA32_PL3_SSP
        11 => Some(&[0x6a0, 0x6a7]),
        // IA32_PL0_SSP to IA32_PL2_SSP
        12 => Some(&[0x6a4, 0x6a5, 0x6a6]),
        _ => None,
    }
}

fn unknown_supervisor(number: u32) -> Stop {
    Stop::Refuse(format!("supervisor component {number} is not supported"))
}

fn save(m: &mut Machine<'_>, kind: Save, wide: bool) -> Step {
    let (feature, supervisor) = match kind {
        Save::Plain => (XSAVE, false),
        Save::Optimised => (XSAVEOPT, false),
        Save::Compacted => (XSAVEC, false),
        Save::Supervisor => (XSAVES, true),
    };
    let (operand, enabled) = begin(m, feature, supervisor, Access::Write)?;
    let xcr0 = m.cpu.xcr0().map_err(Stop::Refuse)?;
    let wanted = enabled & requested(m);
    let compacted = matches!(kind, Save::Compacted | Save::Supervisor);

    let mut image = xstate::image(m.cpu)?.clone();
    let mut in_use = xstate::in_use(&image);
    let mut supervised: Vec<(u32, Vec<u8>)> = vec![];
    for number in NUMBERS.filter(|n| wanted & !xcr0 & (1 << n) != 0) {
        let mut bytes = vec![];
        for &msr in supervisor_msrs(number).ok_or_else(|| unknown_supervisor(number))? {
            bytes.extend_from_slice(&m.msr(msr)?.to_le_bytes());
        }
        in_use &= !(1 << number);
        if bytes.iter().any(|&byte| byte != 0) {
            in_use |= 1 << number;
        }
        supervised.push((number, bytes));
    }
    if compacted && xstate::mxcsr(&image) != MXCSR_INIT {
        in_use |= 1 << SSE;
    }
    // The image's XSTATE_BV is the truth about which values in it count.
    let valid = xstate::in_use(&image);
    for number in [X87, SSE].into_iter().chain(NUMBERS) {
        if valid & (1 << number) == 0 {
            let place = xstate::component(m.cpu.cpuid(), number);
            xstate::initialise(&mut image, number, place);
        }
    }

    let written = if kind == Save::Plain {
        wanted
    } else {
        wanted & in_use
    };
    let places = places(m, written & !3, compacted.then_some(wanted))?;
    let mut pieces: Vec<(usize, &[u8])> = vec![];
    for &(number, offset, size) in &places {
        let piece = match supervised.iter().find(|(n, _)| *n == number) {
            Some((_, bytes)) => bytes.get(..size.min(bytes.len())),
            None => {
                let from = place(m, number)?.offset;
                image.get(from..from + size)
            }
        };
        let piece = piece.ok_or_else(|| Stop::refuse("the vCPU's XSAVE image is too short"))?;
        pieces.push((offset, piece));
    }
    let span = m.span(operand, end(&places), Access::Write)?;
    let put = |at: usize, bytes: &[u8]| {
        span.write(m.ram, at, bytes)
            .map_err(|fault| Stop::memory(fault, operand.segment))
    };

    if written & (1 << X87) != 0 {
        let mut first = [0; MXCSR];
        first.copy_from_slice(&image[..MXCSR]);
        if !wide {
            // FCS and FDS are deprecated and saved as 0.
            first[FIP + 4..FDP].fill(0);
            first[FDP + 4..].fill(0);
        }
        put(0, &first)?;
        put(ST, &image[ST..XMM])?;
    }
    if written & (1 << SSE) != 0 {
        put(XMM, &image[XMM..XMM_END])?;
    }
    let with_mxcsr = if compacted {
        written & (1 << SSE)
    } else {
        wanted & xstate::XCR0_AVX
    };
    if with_mxcsr != 0 {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&xstate::mxcsr(&image).to_le_bytes());
        bytes[4..].copy_from_slice(&xstate::mxcsr_mask(&image).to_le_bytes());
        put(MXCSR, &bytes)?;
    }
    for (offset, bytes) in pieces {
        put(offset, bytes)?;
    }

    if compacted {
        put(HEADER, &(wanted & in_use).to_le_bytes())?;
        put(HEADER + 8, &(wanted | COMPACTED).to_le_bytes())?;
    } else {
        let mut old = [0; 8];
        span.read(m.ram, HEADER, &mut old)
            .map_err(|fault| Stop::memory(fault, operand.segment))?;
        let bits = (u64::from_le_bytes(old) & !wanted) | (in_use & wanted);
        put(HEADER, &bits.to_le_bytes())?;
    }
    Ok(())
}

fn restore(m: &mut Machine<'_>, supervisor: bool, wide: bool) -> Step {
    let feature = if supervisor { XSAVES } else { XSAVE };
    let (operand, enabled) = begin(m, feature, supervisor, Access::Read)?;
    let xcr0 = m.cpu.xcr0().map_err(Stop::Refuse)?;
    let wanted = enabled & requested(m);

    let mut area = vec![0; EXTENDED];
    m.read(operand, &mut area)?;
    let (present, list) = header(m, &area, enabled, supervisor)?;
    let loaded = wanted & present;
    let places = places(m, loaded & !3, list)?;
    area.resize(end(&places), 0);
    m.read(operand, &mut area)?;

    // The second read may differ from what was checked; take the header's word from the first.
    let new_mxcsr = match list {
        None if wanted & xstate::XCR0_AVX != 0 => Some(xstate::mxcsr(&area)),
        Some(_) if loaded & (1 << SSE) != 0 => Some(xstate::mxcsr(&area)),
        Some(_) if wanted & (1 << SSE) != 0 => Some(MXCSR_INIT),
        _ => None,
    };
    let mask = xstate::mxcsr_mask(xstate::image(m.cpu)?);
    if new_mxcsr.is_some_and(|value| value & !mask != 0) {
        return Err(Stop::protection(0));
    }

    let user = wanted & xcr0;
    let mut targets = vec![];
    for number in NUMBERS.filter(|n| user & (1 << n) != 0) {
        targets.push((number, place(m, number)?));
    }
    let length = xstate::image(m.cpu)?.len();
    if targets.iter().any(|(_, t)| t.offset + t.size > length) {
        return Err(Stop::refuse("the vCPU's XSAVE image is too short"));
    }

    for number in NUMBERS.filter(|n| wanted & !xcr0 & (1 << n) != 0) {
        let from = places.iter().find(|(n, _, _)| *n == number);
        let msrs = supervisor_msrs(number).ok_or_else(|| unknown_supervisor(number))?;
        for (n, &msr) in msrs.iter().enumerate() {
            let value = from.map_or(0, |(_, offset, _)| xstate::get_u64(&area, offset + 8 * n));
            if !m.cpu.set_msr(msr, value) {
                return Err(Stop::protection(0));
            }
        }
    }

    let image = xstate::image_mut(m.cpu)?;
    for number in [X87, SSE] {
        if user & (1 << number) != 0 {
            xstate::initialise(image, number, None);
        }
    }
    if loaded & (1 << X87) != 0 {
        load_x87(image, &area, wide);
    }
    if loaded & (1 << SSE) != 0 {
        xstate::materialise(image, SSE, None);
        image[XMM..XMM_END].copy_from_slice(&area[XMM..XMM_END]);
    }
    for (number, target) in targets {
        xstate::initialise(image, number, Some(target));
        if let Some(&(_, from, size)) = places.iter().find(|(n, _, _)| *n == number) {
            xstate::materialise(image, number, Some(target));
            xstate::put(image, target.offset, &area[from..from + size]);
        }
    }
    if let Some(value) = new_mxcsr {
        xstate::set_mxcsr(image, value);
    }
    Ok(())
}

/// Checks the header (SDM volume 1, §13.8 and §13.12). Gives XSTATE_BV and, for the compacted
/// format, the components that XCOMP_BV lists.
fn header(
    m: &Machine<'_>,
    area: &[u8],
    enabled: u64,
    supervisor: bool,
) -> Step<(u64, Option<u64>)> {
    let present = xstate::get_u64(area, HEADER);
    let list = xstate::get_u64(area, HEADER + 8);
    let compacted = list & COMPACTED != 0;
    let ok = if compacted {
        (supervisor || m.has(XSAVEC))
            && list & !COMPACTED & !enabled == 0
            && present & !list == 0
            && present & COMPACTED == 0
            && area[HEADER + 16..EXTENDED].iter().all(|&byte| byte == 0)
    } else {
        !supervisor
            && present & !enabled == 0
            && area[HEADER + 8..HEADER + 24].iter().all(|&byte| byte == 0)
    };
    if ok {
        Ok((present, compacted.then_some(list & !COMPACTED)))
    } else {
        Err(Stop::protection(0))
    }
}

fn load_x87(image: &mut [u8], area: &[u8], wide: bool) {
    xstate::materialise(image, X87, None);
    image[..FOP + 2].copy_from_slice(&area[..FOP + 2]);
    image[FIP..FIP + 4].copy_from_slice(&area[FIP..FIP + 4]);
    image[FDP..FDP + 4].copy_from_slice(&area[FDP..FDP + 4]);
    if wide {
        image[FIP + 4..FDP].copy_from_slice(&area[FIP + 4..FDP]);
        image[FDP + 4..MXCSR].copy_from_slice(&area[FDP + 4..MXCSR]);
    }
    for at in (ST..XMM).step_by(16) {
        // 80 bits each; the rest of the 16 bytes is reserved.
        image[at..at + 10].copy_from_slice(&area[at..at + 10]);
    }
}
