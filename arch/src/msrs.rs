//! Model-specific registers of a CPU that starts (Intel SDM volume 4, tables 2-2 and 2-3; AMD APM volume 2,
//! section 3.2).

use hypervisor::x86::MsrEntry;

const TSC: u32 = 0x10;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// AMD's hardware configuration register; KVM has it on all hosts.
const HWCR: u32 = 0xc001_0015;

/// Fast string operations.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// MTRRs on, and write-back for all that no other MTRR speaks of.
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
/// The time stamp counter runs at the nominal frequency, whatever the power state.
const HWCR_TSC_FREQUENCY: u64 = 1 << 24;

/// Registers that any x86-64 host lets a VMM set: system call entries cleared, time stamp counter at 0, fast
/// strings on.
pub fn required() -> Vec<MsrEntry> {
    let zero = [
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        STAR,
        LSTAR,
        CSTAR,
        SYSCALL_MASK,
        KERNEL_GS_BASE,
        TSC,
    ];
    let mut entries: Vec<MsrEntry> = zero.into_iter().map(|index| entry(index, 0)).collect();
    entries.push(entry(MISC_ENABLE, MISC_ENABLE_FAST_STRINGS));
    entries
}

/// Registers that some hosts refuse, and without which a guest starts all the same: memory is write-back, the time
/// stamp counter steady.
pub fn optional() -> Vec<MsrEntry> {
    vec![
        entry(MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
        entry(HWCR, HWCR_TSC_FREQUENCY),
    ]
}

fn entry(index: u32, data: u64) -> MsrEntry {
    MsrEntry {
        index,
        data,
        ..MsrEntry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_register_is_set_twice() {
        let mut indices: Vec<u32> = required()
            .iter()
            .chain(&optional())
            .map(|msr| msr.index)
            .collect();
        let count = indices.len();
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), count);
    }

    #[test]
    fn values() {
        let value =
            |list: &[MsrEntry], index| list.iter().find(|m| m.index == index).map(|m| m.data);
        assert_eq!(value(&required(), 0x1a0), Some(1));
        assert_eq!(value(&required(), 0xc000_0082), Some(0));
        assert_eq!(value(&optional(), 0x2ff), Some(0x806));
        assert_eq!(value(&optional(), 0xc001_0015), Some(0x100_0000));
    }
}
