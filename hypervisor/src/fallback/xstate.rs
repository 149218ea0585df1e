//! The XSAVE image of a vCPU: standard format (Intel SDM volume 1, §13.4), with the components
//! where the guest's CPUID leaf 0xD says.

use super::CpuState;
use super::machine::{Step, Stop, cpuid};
use crate::x86::{CpuidEntry, XsaveArea};

/// Component numbers.
pub(super) const X87: u32 = 0;
pub(super) const SSE: u32 = 1;
const PKRU: u32 = 9;

/// XCR0 bits 2:1, which VEX instructions need.
pub(super) const XCR0_AVX: u64 = 6;
/// XCR0 bits 7:5 and 2:1, which EVEX and opmask instructions need.
pub(super) const XCR0_AVX512: u64 = 0xe6;

/// Sizes and places in the legacy region.
pub(super) const HEADER: usize = 512;
pub(super) const EXTENDED: usize = 576;
pub(super) const FCW: usize = 0;
pub(super) const FSW: usize = 2;
pub(super) const FTW: usize = 4;
pub(super) const FOP: usize = 6;
pub(super) const FIP: usize = 8;
pub(super) const FDP: usize = 16;
pub(super) const MXCSR: usize = 24;
pub(super) const ST: usize = 32;
pub(super) const XMM: usize = 160;
pub(super) const XMM_END: usize = 416;

pub(super) const FCW_INIT: u16 = 0x37f;
pub(super) const MXCSR_INIT: u32 = 0x1f80;
/// MXCSR bits that may be set where the image does not say (SDM volume 1, §11.6.6).
const MXCSR_MASK_DEFAULT: u32 = 0xffbf;

/// One component of the extended region.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Component {
    /// Offset in the standard format, bytes.
    pub(super) offset: usize,
    /// Size, bytes.
    pub(super) size: usize,
    /// Starts at a multiple of 64 bytes in the compacted format.
    pub(super) aligned: bool,
}

/// Where component `number` (2 and up) lies, or `None` if the CPU has no such component.
pub(super) fn component(entries: &[CpuidEntry], number: u32) -> Option<Component> {
    let leaf = cpuid(entries, 0xd, number)?;
    // The longest that exists is AMX tile data, 8192 bytes.
    (leaf.eax != 0 && leaf.eax <= 8192 && leaf.ebx <= 16384).then_some(Component {
        offset: leaf.ebx as usize,
        size: leaf.eax as usize,
        aligned: leaf.ecx & 2 != 0,
    })
}

/// The image, checked to hold the legacy region and the header.
pub(super) fn image(cpu: &mut dyn CpuState) -> Step<&XsaveArea> {
    let image = cpu.xsave().map_err(Stop::Refuse)?;
    if image.len() < EXTENDED {
        return Err(Stop::refuse("the vCPU's XSAVE image is too short"));
    }
    Ok(image)
}

/// The same, to change.
pub(super) fn image_mut(cpu: &mut dyn CpuState) -> Step<&mut XsaveArea> {
    image(cpu)?;
    cpu.xsave_mut().map_err(Stop::Refuse)
}

pub(super) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

pub(super) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

pub(super) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Copies `value` to offset `at`; nothing happens where it does not fit.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at + value.len()) {
        target.copy_from_slice(value);
    }
}

/// XSTATE_BV: the components that are not in their initial configuration.
pub(super) fn in_use(image: &[u8]) -> u64 {
    get_u64(image, HEADER)
}

pub(super) fn set_in_use(image: &mut [u8], bits: u64) {
    put(image, HEADER, &bits.to_le_bytes());
}

/// MXCSR bits that the processor knows.
pub(super) fn mxcsr_mask(image: &[u8]) -> u32 {
    match get_u32(image, MXCSR + 4) {
        0 => MXCSR_MASK_DEFAULT,
        mask => mask,
    }
}

pub(super) fn mxcsr(image: &[u8]) -> u32 {
    get_u32(image, MXCSR)
}

/// Sets MXCSR. It counts as part of the SSE component, which is marked as in use when MXCSR
/// changes, also to its initial value: KVM does not look at MXCSR otherwise.
pub(super) fn set_mxcsr(image: &mut [u8], value: u32) {
    if value != mxcsr(image) || value != MXCSR_INIT {
        materialise(image, SSE, None);
        put(image, MXCSR, &value.to_le_bytes());
    }
}

/// The x87 control word, with the initial value where the component is not in use.
pub(super) fn fcw(image: &[u8]) -> u16 {
    if in_use(image) & 1 == 0 {
        FCW_INIT
    } else {
        get_u16(image, FCW)
    }
}

/// The x87 status word, likewise.
pub(super) fn fsw(image: &[u8]) -> u16 {
    if in_use(image) & 1 == 0 {
        0
    } else {
        get_u16(image, FSW)
    }
}

/// Sets FSW's summary bits (ES and B) to what the flags and FCW's masks say.
pub(super) fn summarise(image: &mut [u8]) {
    let (fcw, mut fsw) = (fcw(image), fsw(image));
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    } else {
        fsw &= !0x8080;
    }
    put(image, FSW, &fsw.to_le_bytes());
}

/// Puts a component into its initial configuration, values included. `place` is for numbers 2 and
/// up. MXCSR is left alone.
pub(super) fn initialise(image: &mut [u8], number: u32, place: Option<Component>) {
    match number {
        X87 => {
            fill(image, 0, MXCSR);
            fill(image, ST, XMM);
            put(image, FCW, &FCW_INIT.to_le_bytes());
        }
        SSE => fill(image, XMM, XMM_END),
        _ => {
            // Supervisor components have no place in the standard format; CPUID gives offset 0.
            if let Some(place) = place.filter(|place| place.offset >= EXTENDED) {
                fill(image, place.offset, place.offset + place.size);
            }
        }
    }
    let bits = in_use(image) & !(1 << number);
    set_in_use(image, bits);
}

/// Marks a component as in use; if it was not, its initial values are written out first.
pub(super) fn materialise(image: &mut [u8], number: u32, place: Option<Component>) {
    if in_use(image) & (1 << number) == 0 {
        initialise(image, number, place);
        let bits = in_use(image) | (1 << number);
        set_in_use(image, bits);
    }
}

fn fill(bytes: &mut [u8], from: usize, to: usize) {
    if let Some(target) = bytes.get_mut(from..to) {
        target.fill(0);
    }
}

/// PKRU, 0 where the component is initial or absent.
pub(super) fn pkru(cpu: &mut dyn CpuState) -> Step<u32> {
    let Some(place) = component(cpu.cpuid(), PKRU) else {
        return Ok(0);
    };
    let image = image(cpu)?;
    Ok(if in_use(image) & (1 << PKRU) == 0 {
        0
    } else {
        get_u32(image, place.offset)
    })
}

/// Sets PKRU.
pub(super) fn set_pkru(cpu: &mut dyn CpuState, value: u32) -> Step {
    let place = component(cpu.cpuid(), PKRU)
        .ok_or_else(|| Stop::refuse("CPUID leaf 0xD has no place for PKRU"))?;
    let image = image_mut(cpu)?;
    materialise(image, PKRU, Some(place));
    put(image, place.offset, &value.to_le_bytes());
    Ok(())
}
