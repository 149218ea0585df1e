//! The vCPU's vector and x87 state as an XSAVE image of the host's, and back.

use iced_x86::{MemorySize, Mnemonic};

use super::allow::Kind;
use super::thunk::{self, IMAGE};
use crate::fallback::decode;
use crate::fallback::machine::{Machine, Operand, Step, Stop};
use crate::fallback::xstate::{self, FDP, FIP, FOP, MXCSR, SSE, ST, X87, XMM, XMM_END};

/// The components that go in and out.
fn exchanged(m: &mut Machine<'_>) -> Step<u64> {
    let xcr0 = m.cpu.xcr0().map_err(Stop::Refuse)?;
    Ok((xcr0 | (1 << X87) | (1 << SSE)) & thunk::components())
}

/// The vCPU's state as an image for the thunk.
pub(super) fn load(m: &mut Machine<'_>) -> Step<Box<[u8; IMAGE]>> {
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
pub(super) fn save(m: &mut Machine<'_>, source: &[u8; IMAGE], pointers: Pointers) -> Step {
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
pub(super) struct Pointers {
    fip: u64,
    fdp: u64,
    fop: u16,
}

/// The pointers after the instruction. They are not taken from the host: what it holds is the
/// thunk's address, or nothing, since some processors keep them only for pending exceptions.
pub(super) fn pointers(
    m: &mut Machine<'_>,
    kind: Kind,
    operand: Option<Operand>,
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
            if let Some(operand) = operand {
                pointers.fdp = operand.offset;
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
