//! VERR, VERW, LAR, LSL: instructions that look at a segment descriptor
//! (Intel SDM volume 2; descriptors: volume 3, §3.4.5 and §3.5).

use iced_x86::{Mnemonic, Register};

use super::machine::{Machine, RFLAGS_ZF, Step, Stop};

/// Carries the instruction out; `None` if it is none of these.
pub(super) fn step(m: &mut Machine<'_>) -> Option<Step> {
    Some(match m.instruction.mnemonic() {
        Mnemonic::Verr => verify(m, false),
        Mnemonic::Verw => verify(m, true),
        Mnemonic::Lar => load(m, false),
        Mnemonic::Lsl => load(m, true),
        _ => return None,
    })
}

/// The two words of a descriptor.
#[derive(Clone, Copy)]
struct Descriptor {
    low: u32,
    high: u32,
}

impl Descriptor {
    fn is_system(self) -> bool {
        self.high & (1 << 12) == 0
    }

    fn is_code(self) -> bool {
        self.high & (1 << 11) != 0
    }

    fn kind(self) -> u32 {
        (self.high >> 8) & 15
    }

    fn dpl(self) -> u8 {
        ((self.high >> 13) & 3) as u8
    }

    /// Code that may be read or data that may be written.
    fn bit_rw(self) -> bool {
        self.high & (1 << 9) != 0
    }

    /// May code at `cpl` with this RPL see the descriptor? Conforming code is seen by all.
    fn is_visible(self, cpl: u8, selector: u16) -> bool {
        let conforming = !self.is_system() && self.is_code() && self.high & (1 << 10) != 0;
        let rpl = (selector & 3) as u8;
        conforming || (cpl <= self.dpl() && rpl <= self.dpl())
    }

    /// Limit in bytes.
    fn limit(self) -> u32 {
        let limit = (self.low & 0xffff) | (self.high & 0xf_0000);
        if self.high & (1 << 23) == 0 {
            limit
        } else {
            (limit << 12) | 0xfff
        }
    }
}

/// Reads the descriptor; `None` for a null selector or one beyond its table's limit.
fn descriptor(m: &Machine<'_>, selector: u16) -> Step<Option<Descriptor>> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let (base, limit) = if selector & 4 == 0 {
        (m.special.gdt.base, u32::from(m.special.gdt.limit))
    } else if m.special.ldt.unusable != 0 || m.special.ldt.present == 0 {
        return Ok(None);
    } else {
        (m.special.ldt.base, m.special.ldt.limit)
    };
    let offset = u32::from(selector & !7);
    if offset + 7 > limit {
        return Ok(None);
    }
    let mut bytes = [0; 8];
    m.mmu
        .system()
        .read(m.ram, base.wrapping_add(u64::from(offset)), &mut bytes)
        .map_err(|fault| Stop::memory(fault, Register::None))?;
    let [a, b, c, d, e, f, g, h] = bytes;
    Ok(Some(Descriptor {
        low: u32::from_le_bytes([a, b, c, d]),
        high: u32::from_le_bytes([e, f, g, h]),
    }))
}

fn verify(m: &mut Machine<'_>, write: bool) -> Step {
    if m.no_tables() {
        return Err(Stop::undefined());
    }
    let selector = m.operand_value(0, 2)? as u16;
    let ok = descriptor(m, selector)?.is_some_and(|d| {
        let allowed = if write {
            !d.is_code() && d.bit_rw()
        } else {
            !d.is_code() || d.bit_rw()
        };
        !d.is_system() && allowed && d.is_visible(m.cpl, selector)
    });
    m.set_flag(RFLAGS_ZF, ok);
    Ok(())
}

fn load(m: &mut Machine<'_>, limit: bool) -> Step {
    if m.no_tables() {
        return Err(Stop::undefined());
    }
    let selector = m.operand_value(1, 2)? as u16;
    let long = m.long_mode();
    let found = descriptor(m, selector)?.filter(|d| {
        let kind_ok = !d.is_system()
            || match d.kind() {
                2 | 9 | 11 => true,
                1 | 3 => !long,
                12 => !limit,
                4 | 5 => !limit && !long,
                _ => false,
            };
        kind_ok && d.is_visible(m.cpl, selector)
    });
    m.set_flag(RFLAGS_ZF, found.is_some());
    if let Some(d) = found {
        let value = if limit {
            d.limit()
        } else {
            d.high & 0x00f0_ff00
        };
        let target = m.instruction.op0_register();
        m.set(target, u64::from(value))?;
    }
    Ok(())
}
