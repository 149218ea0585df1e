//! The local APIC as firmware leaves it (MultiProcessor Specification 1.4 §3.6.2.2, virtual wire mode; Intel SDM
//! volume 3, section 10.5.1): LINT0 takes external interrupts, LINT1 the NMI.

use hypervisor::x86::LapicState;

/// Offset of the LINT0 entry of the local vector table.
const LVT_LINT0: usize = 0x350;
/// Offset of the LINT1 entry.
const LVT_LINT1: usize = 0x360;
/// Delivery mode, bits 8 to 10 of an entry.
const MODE_MASK: u32 = 0x700;
const MODE_NMI: u32 = 0x400;
const MODE_EXTINT: u32 = 0x700;

/// Sets the delivery modes of both pins; all other bits, the masks included, stay as they are.
pub fn set_lint(lapic: &mut LapicState) {
    set_mode(lapic, LVT_LINT0, MODE_EXTINT);
    set_mode(lapic, LVT_LINT1, MODE_NMI);
}

fn set_mode(lapic: &mut LapicState, offset: usize, mode: u32) {
    let Some(register) = lapic.regs.get_mut(offset..offset + 4) else {
        return;
    };
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(register.iter()) {
        *to = from.to_le_bytes()[0];
    }
    let value = (u32::from_le_bytes(value) & !MODE_MASK) | mode;
    for (to, from) in register.iter_mut().zip(value.to_le_bytes()) {
        *to = i8::from_le_bytes([from]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lapic: &LapicState, offset: usize) -> u32 {
        let bytes: Vec<u8> = lapic.regs[offset..offset + 4]
            .iter()
            .map(|b| b.to_le_bytes()[0])
            .collect();
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn only_the_delivery_modes_change() {
        let mut lapic = LapicState { regs: [-1; 1024] };
        set_lint(&mut lapic);
        assert_eq!(read(&lapic, 0x350), u32::MAX);
        assert_eq!(read(&lapic, 0x360), 0xffff_fcff);
        assert!(lapic.regs[..0x350].iter().all(|b| *b == -1));
        assert!(lapic.regs[0x364..].iter().all(|b| *b == -1));
    }

    #[test]
    fn masked_pins_stay_masked() {
        let mut lapic = LapicState { regs: [0; 1024] };
        for offset in [0x350, 0x360] {
            lapic.regs[offset + 2] = 1;
        }
        set_lint(&mut lapic);
        assert_eq!(read(&lapic, 0x350), 0x1_0700);
        assert_eq!(read(&lapic, 0x360), 0x1_0400);
    }
}
