//! Any instruction on any vCPU, through `hypervisor::fallback::step`, which carries some out on the host's own processor.
//!
//! Holds to: no panic, and the host lives. What is done moves RIP past the instruction; what is refused has changed nothing; a fault leaves
//! RIP where it was.

#![no_main]

use std::collections::HashMap;
use std::sync::{Mutex, Once};

use arbitrary::Arbitrary;
use hypervisor::fallback::{CpuState, Outcome, prepare, step};
use hypervisor::x86::{
    CpuidEntry, DebugRegisters, Registers, Segment, SpecialRegisters, XsaveArea,
};
use hypervisor::{GuestRam, RamError};
use libfuzzer_sys::fuzz_target;

/// Bytes of RAM.
const RAM: usize = 0x2_0000;
/// Page tables: one of each level, for linear addresses from 4 MiB. The same addresses are good without paging.
const TABLES: u64 = 0x1000;
const PAGE_TABLE: u64 = 0x4000;
/// Where RAM past them starts.
const BEHIND_TABLES: usize = 0x5000;
/// First of 16 linear pages, which are the frames of RAM from 0x1_0000 on in another order.
const PAGES: u64 = 0x40_0000;
/// TSC, TSC_AUX, XSS, and two that XSAVES saves.
const MSRS: [u32; 5] = [0x10, 0xc000_0103, 0xda0, 0x6a0, 0x6a7];
/// Bytes of the XSAVE area.
const XSAVE: usize = 4096;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    code: [u8; 15],
    mode: Mode,
    user: bool,
    /// Offset of the code in its page.
    at: u16,
    registers: [Value; 16],
    rflags: u32,
    changes: Vec<Change<'a>>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Mode {
    Long,
    Compatibility,
    Protected,
    Real,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Any(u64),
    /// In or near the pages.
    Page(u16),
    Small(u8),
    /// Just below the end of the lower half, or of everything.
    Edge(u8, bool),
}

#[derive(Arbitrary, Debug)]
enum Change<'a> {
    Memory(u16, &'a [u8]),
    PageTable(u8, u64),
    Xsave(u16, &'a [u8]),
    Xcr0(u64),
    Cr0(u32),
    Cr4(u32),
    Efer(u16),
    Segment(u8, Segmented),
    Cpuid(u8, u8, u32),
    Msr(u8, u64),
    Debug(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Segmented {
    base: u64,
    limit: u32,
    selector: u16,
    flags: u16,
}

struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn access(&self, gpa: u64, len: usize, f: impl FnOnce(&mut [u8])) -> Result<(), RamError> {
        let mut bytes = self.0.lock().expect("one thread");
        let range = usize::try_from(gpa)
            .ok()
            .and_then(|from| Some(from..from.checked_add(len)?));
        f(range
            .and_then(|range| bytes.get_mut(range))
            .ok_or(RamError { gpa, len })?);
        Ok(())
    }
}

impl GuestRam for Ram {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), RamError> {
        self.access(gpa, buf.len(), |ram| buf.copy_from_slice(ram))
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), RamError> {
        self.access(gpa, buf.len(), |ram| ram.copy_from_slice(buf))
    }

    fn compare_exchange(&self, gpa: u64, current: u128, new: u128) -> Result<bool, RamError> {
        assert!(gpa.is_multiple_of(16), "16 bytes at {gpa:#x}");
        let mut done = false;
        self.access(gpa, 16, |ram| {
            done = *ram == current.to_le_bytes();
            if done {
                ram.copy_from_slice(&new.to_le_bytes());
            }
        })?;
        Ok(done)
    }
}

#[derive(Clone, PartialEq)]
struct Cpu {
    registers: Registers,
    special: SpecialRegisters,
    xsave: XsaveArea,
    xcr0: u64,
    msrs: HashMap<u32, u64>,
    debug: DebugRegisters,
    cpuid: Vec<CpuidEntry>,
}

impl CpuState for Cpu {
    fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }
    fn special(&mut self) -> &mut SpecialRegisters {
        &mut self.special
    }
    fn xsave(&mut self) -> Result<&XsaveArea, String> {
        Ok(&self.xsave)
    }
    fn xsave_mut(&mut self) -> Result<&mut XsaveArea, String> {
        Ok(&mut self.xsave)
    }
    fn xcr0(&mut self) -> Result<u64, String> {
        Ok(self.xcr0)
    }
    fn msr(&mut self, index: u32) -> Option<u64> {
        self.msrs.get(&index).copied()
    }
    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        self.msrs.get_mut(&index).map(|msr| *msr = value).is_some()
    }
    fn debug(&mut self) -> Result<DebugRegisters, String> {
        Ok(self.debug)
    }
    fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }
}

/// All features, and the XSAVE layout of a processor with AVX-512 and PKRU.
fn cpuid() -> Vec<CpuidEntry> {
    [
        (1, 0, [0, 0, !0, !0]),
        (7, 0, [1, !0, !0, !0]),
        (7, 1, [!0, 0, 0, 0]),
        (0xd, 0, [0x2e7, 2440, 2440, 0]),
        (0xd, 1, [0xf, 2440, 0x1800, 0]),
        (0xd, 2, [256, 576, 0, 0]),
        (0xd, 5, [64, 832, 0, 0]),
        (0xd, 6, [512, 896, 0, 0]),
        (0xd, 7, [1024, 1408, 0, 0]),
        (0xd, 9, [8, 2432, 0, 0]),
        (0xd, 11, [16, 0, 1, 0]),
        (0xd, 12, [24, 0, 3, 0]),
        (0x8000_0001, 0, [0, 0, !0, !0]),
        (0x8000_0008, 0, [40, !0, 0, 0]),
    ]
    .map(|(function, index, [eax, ebx, ecx, edx])| CpuidEntry {
        function,
        index,
        flags: 1,
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    })
    .to_vec()
}

fn value(value: Value) -> u64 {
    match value {
        Value::Any(n) => n,
        Value::Page(n) => PAGES + u64::from(n),
        Value::Small(n) => u64::from(n),
        Value::Edge(n, true) => u64::MAX - u64::from(n),
        Value::Edge(n, false) => 0x8000_0000_0000 - u64::from(n),
    }
}

/// A vCPU in `mode` with everything enabled, its code at `rip`.
fn cpu(case: &Case<'_>, rip: u64) -> Cpu {
    let dpl = if case.user { 3 } else { 0 };
    let long = matches!(case.mode, Mode::Long | Mode::Compatibility);
    let code = Segment {
        limit: !0,
        selector: 8 | u16::from(dpl),
        type_: 11,
        present: 1,
        s: 1,
        l: u8::from(matches!(case.mode, Mode::Long)),
        db: u8::from(matches!(case.mode, Mode::Compatibility | Mode::Protected)),
        g: 1,
        dpl,
        ..Segment::default()
    };
    let data = Segment {
        selector: 16 | u16::from(dpl),
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    let mut special = SpecialRegisters {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        // PE, MP, NE, WP, and PG in long mode
        cr0: if long { 0x8001_0023 } else { 0x1_0023 },
        cr3: TABLES,
        // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        cr4: 0x4_0620,
        efer: if long { 0xd01 } else { 0 },
        ..SpecialRegisters::default()
    };
    if matches!(case.mode, Mode::Real) {
        special.cr0 &= !1;
    }
    special.gdt.base = PAGES + 0xf000;
    special.gdt.limit = 0xff;
    special.idt.base = PAGES + 0xf100;
    special.idt.limit = 0xeff;
    let mut xsave = vec![0; XSAVE];
    xsave[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    xsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    xsave[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
    xsave[512] = 3;
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = case.registers.map(value);
    Cpu {
        registers: Registers {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rbp,
            rsp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags: u64::from(case.rflags) | 2,
        },
        special,
        xsave,
        xcr0: 0x2e7,
        msrs: MSRS.map(|msr| (msr, 0)).into(),
        debug: DebugRegisters::default(),
        cpuid: cpuid(),
    }
}

/// RAM with page tables for the 16 pages, and the code.
fn ram(case: &Case<'_>) -> Vec<u8> {
    let mut ram = vec![0; RAM];
    let mut put = |at: u64, value: u64| {
        ram[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    };
    for level in 0..3 {
        let index = if level == 2 { PAGES >> 21 } else { 0 };
        put(
            TABLES + 0x1000 * level + 8 * index,
            (TABLES + 0x1000 * (level + 1)) | 7,
        );
    }
    for page in 0..16 {
        put(PAGE_TABLE + 8 * page, frame(page) | 7);
    }
    for (n, byte) in case.code.iter().enumerate() {
        ram[physical(case, n)] = *byte;
    }
    ram
}

/// The frame of a page: neighbours are not neighbours in RAM.
fn frame(page: u64) -> u64 {
    0x1_0000 + 0x1000 * (page * 5 % 16)
}

/// Linear address of the code; without paging it is that of the frame.
fn rip(case: &Case<'_>) -> u64 {
    let offset = u64::from(case.at % 0x1800);
    match case.mode {
        Mode::Long | Mode::Compatibility => PAGES + offset,
        Mode::Protected => 0x1_0000 + offset,
        Mode::Real => 0x8000 + offset,
    }
}

fn physical(case: &Case<'_>, n: usize) -> usize {
    let linear = rip(case) + n as u64;
    match case.mode {
        Mode::Long | Mode::Compatibility => {
            (frame((linear - PAGES) >> 12) + linear % 0x1000) as usize
        }
        Mode::Protected | Mode::Real => linear as usize,
    }
}

/// Carries out what the input changes. True if the page tables are no longer ours alone.
fn change(change: &Change<'_>, cpu: &mut Cpu, ram: &mut [u8]) -> bool {
    let copy = |to: &mut [u8], at: u16, bytes: &[u8]| {
        let at = usize::from(at) % to.len();
        for (to, byte) in to[at..].iter_mut().zip(bytes) {
            *to = *byte;
        }
    };
    match *change {
        Change::Memory(at, bytes) => copy(&mut ram[0x1_0000..], at, bytes),
        Change::PageTable(index, entry) => {
            let at = PAGE_TABLE as usize + 8 * usize::from(index % 16);
            ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
            return true;
        }
        Change::Xsave(at, bytes) => copy(&mut cpu.xsave, at, bytes),
        Change::Xcr0(value) => cpu.xcr0 = value,
        Change::Cr0(bits) => cpu.special.cr0 ^= u64::from(bits),
        Change::Cr4(bits) => cpu.special.cr4 ^= u64::from(bits),
        Change::Efer(bits) => cpu.special.efer ^= u64::from(bits),
        Change::Segment(which, to) => {
            let special = &mut cpu.special;
            let segment = match which % 8 {
                0 => &mut special.cs,
                1 => &mut special.ds,
                2 => &mut special.es,
                3 => &mut special.fs,
                4 => &mut special.gs,
                5 => &mut special.ss,
                6 => &mut special.ldt,
                _ => &mut special.tr,
            };
            let bit = |n: u16| (to.flags >> n & 1) as u8;
            *segment = Segment {
                base: to.base,
                limit: to.limit,
                selector: to.selector,
                type_: (to.flags & 0xf) as u8,
                s: bit(4),
                dpl: (to.flags >> 5 & 3) as u8,
                present: bit(7),
                avl: bit(8),
                l: bit(9),
                db: bit(10),
                g: bit(11),
                unusable: bit(12),
                ..Segment::default()
            };
        }
        Change::Cpuid(leaf, register, bits) => {
            let count = cpu.cpuid.len();
            let leaf = &mut cpu.cpuid[usize::from(leaf) % count];
            match register % 4 {
                0 => leaf.eax ^= bits,
                1 => leaf.ebx ^= bits,
                2 => leaf.ecx ^= bits,
                _ => leaf.edx ^= bits,
            }
        }
        Change::Msr(which, value) => {
            cpu.msrs
                .insert(MSRS[usize::from(which) % MSRS.len()], value);
        }
        Change::Debug(dr7) => cpu.debug.dr7 = u64::from(dr7),
    }
    matches!(change, Change::Cr0(_) | Change::Cr4(_) | Change::Efer(_))
}

fuzz_target!(|case: Case<'_>| {
    static READY: Once = Once::new();
    READY.call_once(|| prepare().expect("memory to run instructions in"));

    let rip = rip(&case);
    let (mut cpu, mut bytes) = (cpu(&case, rip), ram(&case));
    let mut tables_changed = false;
    for one in &case.changes {
        tables_changed |= change(one, &mut cpu, &mut bytes);
    }
    fuzz::show(&case);
    let before = cpu.clone();
    let ram = Ram(Mutex::new(bytes.clone()));
    let outcome = step(&mut cpu, &ram);
    fuzz::show(&outcome);
    let moved = cpu.registers.rip.wrapping_sub(rip);
    match outcome {
        Ok(Outcome::Done(_)) => {
            assert!((1..=15).contains(&moved), "done, and RIP moved by {moved}")
        }
        // INT n, INT3, INTO, INT1 and single steps come after their instruction.
        Ok(Outcome::Exception { .. }) => {
            assert!(moved <= 15, "an exception, and RIP moved by {moved}")
        }
        Err(refusal) => {
            assert!(refusal.bytes.len() <= 15, "{refusal:?}");
            assert!(cpu == before, "{refusal:?}, and the vCPU is another");
            // Accessed flags may be set, also in what is a page table by the guest's choice.
            let after = ram.0.into_inner().expect("one thread");
            let unchanged = after[BEHIND_TABLES..] == bytes[BEHIND_TABLES..];
            assert!(
                unchanged || tables_changed,
                "{refusal:?}, and RAM is another"
            );
        }
    }
});
