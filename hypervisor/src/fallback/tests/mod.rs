//! A vCPU and RAM that are plain data, and the instructions run on them.
#![allow(clippy::unwrap_used, clippy::panic)]

mod control;
mod memory;
mod native;
mod random;
mod special;
mod states;

use std::collections::HashMap;
use std::sync::Mutex;

use super::{CpuState, Outcome, Refusal, step};
use crate::memory::{GuestRam, RamError};
use crate::x86::{CpuidEntry, DebugRegisters, Registers, Segment, SpecialRegisters, XsaveArea};

/// Where code is, and the data pages (linear).
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;
/// Read-only page.
const READ_ONLY: u64 = 0x51_0000;
/// Page that user code may use.
const USER: u64 = 0x52_0000;
/// No page.
const NOWHERE: u64 = 0x53_0000;
/// Descriptor tables.
const TABLES: u64 = 0x54_0000;
/// Mapped, but not to RAM.
const DEVICE: u64 = 0x55_0000;
const NOT_CANONICAL: u64 = 0x8000_0000_0000;
const PAGE_TABLE: u64 = 0x4000;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER_BIT: u64 = 4;

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;

struct Ram {
    bytes: Mutex<Vec<u8>>,
    /// What another vCPU writes where, just before the next compare and exchange.
    interference: Mutex<Option<(u64, u128)>>,
}

impl Ram {
    fn access(&self, gpa: u64, len: usize, f: impl FnOnce(&mut [u8])) -> Result<(), RamError> {
        let mut bytes = self.bytes.lock().unwrap();
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
        let mut done = false;
        self.access(gpa, 16, |ram| {
            if let Some((at, value)) = self.interference.lock().unwrap().take() {
                assert_eq!(at, gpa);
                ram.copy_from_slice(&u128::to_le_bytes(value));
            }
            if *ram == current.to_le_bytes() {
                ram.copy_from_slice(&new.to_le_bytes());
                done = true;
            }
        })?;
        Ok(done)
    }
}

struct Cpu {
    registers: Registers,
    special: SpecialRegisters,
    xsave: XsaveArea,
    xsave_written: bool,
    xcr0: u64,
    msrs: HashMap<u32, u64>,
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
        self.xsave_written = true;
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
        Ok(DebugRegisters::default())
    }
    fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }
}

struct Guest {
    cpu: Cpu,
    ram: Ram,
}

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry {
        function,
        index,
        flags: 1,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Everything that the fallback asks for, and the XSAVE layout of a processor with AVX-512 and PKRU.
fn full_cpuid() -> Vec<CpuidEntry> {
    vec![
        leaf(1, 0, [0, 0, !0, !0]),
        leaf(7, 0, [1, !0, !0, !0]),
        leaf(7, 1, [!0, 0, 0, 0]),
        leaf(0xd, 0, [0x2e7, 2440, 2440, 0]),
        leaf(0xd, 1, [0xf, 2440, 0x1800, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 5, [64, 832, 0, 0]),
        leaf(0xd, 6, [512, 896, 0, 0]),
        leaf(0xd, 7, [1024, 1408, 0, 0]),
        leaf(0xd, 9, [8, 2432, 0, 0]),
        leaf(0xd, 11, [16, 0, 1, 0]),
        leaf(0xd, 12, [24, 0, 3, 0]),
        leaf(0x8000_0001, 0, [0, 0, !0, !0]),
        leaf(0x8000_0008, 0, [40, !0, 0, 0]),
    ]
}

impl Guest {
    /// 64-bit kernel code, everything enabled, four data pages at scattered frames.
    fn new() -> Self {
        let code = Segment {
            limit: !0,
            selector: 8,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = Segment {
            selector: 16,
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
            // PE, MP, NE, WP, PG
            cr0: 0x8001_0023,
            cr3: 0x1000,
            // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
            cr4: 0x4_0620,
            // LME, LMA, NXE, SCE
            efer: 0xd01,
            ..Default::default()
        };
        special.gdt.base = TABLES;
        special.gdt.limit = 0xff;
        special.ldt.unusable = 1;
        special.idt.base = TABLES + 0x100;
        special.idt.limit = 0xeff;
        let mut xsave = vec![0; 4096];
        xsave[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        xsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        xsave[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        xsave[512] = 3;
        let guest = Self {
            cpu: Cpu {
                registers: Registers {
                    rflags: 2,
                    ..Default::default()
                },
                special,
                xsave,
                xsave_written: false,
                xcr0: 0x2e7,
                msrs: HashMap::from([
                    (0x10, 0x1234_5678_9abc),
                    (0xc000_0103, 0x42),
                    (0xda0, 0),
                    (0x6a0, 0),
                    (0x6a7, 0),
                ]),
                cpuid: full_cpuid(),
            },
            ram: Ram {
                bytes: Mutex::new(vec![0; 0x10_0000]),
                interference: Mutex::new(None),
            },
        };
        let upper = PRESENT | WRITE | USER_BIT;
        guest.put64(0x1000, 0x2000 | upper);
        guest.put64(0x2000, 0x3000 | upper);
        guest.put64(0x3000 + 2 * 8, PAGE_TABLE | upper);
        guest.map(CODE, 0x10000, PRESENT);
        guest.map(CODE + 0x1000, 0x12000, PRESENT);
        for (n, frame) in [0x27000, 0x23000, 0x2b000, 0x21000].into_iter().enumerate() {
            guest.map(DATA + 0x1000 * n as u64, frame, PRESENT | WRITE);
        }
        guest.map(READ_ONLY, 0x30000, PRESENT);
        guest.map(USER, 0x31000, PRESENT | WRITE | USER_BIT);
        guest.map(TABLES, 0x32000, PRESENT | WRITE);
        guest.map(TABLES + 0x1000, 0x33000, PRESENT | WRITE);
        guest.map(DEVICE, 0xe000_0000, PRESENT | WRITE);
        guest
    }

    fn put64(&self, gpa: u64, value: u64) {
        self.ram.write(gpa, &value.to_le_bytes()).unwrap();
    }

    fn get64(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read(gpa, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn entry(linear: u64) -> u64 {
        assert_eq!(linear >> 21, CODE >> 21);
        PAGE_TABLE + ((linear >> 12) & 511) * 8
    }

    fn map(&self, linear: u64, gpa: u64, flags: u64) {
        self.put64(Self::entry(linear), gpa | flags);
    }

    /// Guest-physical address of a linear one, by the page table alone.
    fn gpa(&self, linear: u64) -> u64 {
        (self.get64(Self::entry(linear)) & 0x000f_ffff_ffff_f000) + linear % 4096
    }

    fn poke(&self, linear: u64, bytes: &[u8]) {
        for (at, byte) in (linear..).zip(bytes) {
            self.ram.write(self.gpa(at), &[*byte]).unwrap();
        }
    }

    fn peek<const N: usize>(&self, linear: u64) -> [u8; N] {
        let mut bytes = [0; N];
        for (at, byte) in (linear..).zip(&mut bytes) {
            let mut one = [0];
            self.ram.read(self.gpa(at), &mut one).unwrap();
            *byte = one[0];
        }
        bytes
    }

    fn ring3(&mut self) {
        self.cpu.special.cs.dpl = 3;
        self.cpu.special.cs.selector = 0x1b;
        self.cpu.special.ss.dpl = 3;
        for page in [CODE, CODE + 0x1000] {
            let entry = self.get64(Self::entry(page));
            self.put64(Self::entry(page), entry | USER_BIT);
        }
    }

    fn without(&mut self, (function, index, register, bit): (u32, u32, u8, u8)) {
        for entry in &mut self.cpu.cpuid {
            if (entry.function, entry.index) == (function, index) {
                let target = match register {
                    0 => &mut entry.eax,
                    1 => &mut entry.ebx,
                    2 => &mut entry.ecx,
                    _ => &mut entry.edx,
                };
                *target &= !(1 << bit);
            }
        }
    }

    fn run(&mut self, code: &[u8]) -> Result<Outcome, Refusal> {
        self.poke(CODE, code);
        self.cpu.registers.rip = CODE;
        step(&mut self.cpu, &self.ram)
    }

    /// Runs one instruction that must complete and be of this name.
    #[track_caller]
    fn done(&mut self, name: &str, code: &[u8]) {
        match self.run(code) {
            Ok(Outcome::Done(found)) => assert_eq!(found, name),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(self.cpu.registers.rip, CODE + code.len() as u64, "{name}");
    }

    /// Runs one instruction that must raise an exception and leave RIP.
    #[track_caller]
    fn raises(&mut self, code: &[u8], vector: u8, error_code: Option<u32>, cr2: Option<u64>) {
        match self.run(code) {
            Ok(Outcome::Exception {
                vector: v,
                error_code: e,
                cr2: c,
                ..
            }) => assert_eq!((v, e, c), (vector, error_code, cr2)),
            other => panic!("{other:?}"),
        }
        assert_eq!(self.cpu.registers.rip, CODE);
    }

    #[track_caller]
    fn undefined(&mut self, code: &[u8]) {
        self.raises(code, 6, None, None);
    }

    #[track_caller]
    fn protection(&mut self, code: &[u8]) {
        self.raises(code, 13, Some(0), None);
    }

    #[track_caller]
    fn refused(&mut self, code: &[u8]) -> Refusal {
        match self.run(code) {
            Err(refusal) => refusal,
            other => panic!("{other:?}"),
        }
    }

    fn in_use(&self) -> u64 {
        u64::from_le_bytes(self.cpu.xsave[512..520].try_into().unwrap())
    }

    fn xmm(&self, n: usize) -> u128 {
        let at = 160 + 16 * n;
        u128::from_le_bytes(self.cpu.xsave[at..at + 16].try_into().unwrap())
    }

    fn set_xmm(&mut self, n: usize, value: u128) {
        let at = 160 + 16 * n;
        self.cpu.xsave[at..at + 16].copy_from_slice(&value.to_le_bytes());
        self.cpu.xsave[512] |= 2;
    }

    fn status(&self) -> u64 {
        self.cpu.registers.rflags & (CF | PF | AF | ZF | SF | OF)
    }
}
