//! Finds out whether SYSCALL works here (Intel SDM volume 2B, SYSCALL).
//!
//! On hardware it loads CS and SS of the kernel. A software KVM is known that leaves those of the
//! user program, so that the kernel's entry point takes a page fault as user code would. A VM of
//! its own executes one SYSCALL, and where it halts tells which of the two is the case.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::vcpu::msr_list;
use crate::x86::{DescriptorTable, MsrEntry, Registers, Segment, SpecialRegisters};

/// Guest-physical layout: everything lies in these pages. Linear addresses of the user program
/// are the same; those of its kernel are [`KERNEL`] higher and closed to the user.
const SIZE: usize = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const TSS: u64 = 0x4100;
const IDT: u64 = 0x4200;
const USER_CODE: u64 = 0x5000;
const SYSCALL_ENTRY: u64 = KERNEL + 0x5010;
const FAULT_ENTRY: u64 = KERNEL + 0x5020;
const STACK_TOP: u64 = KERNEL + 0x7000;
const KERNEL: u64 = 0x20_0000;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const HLT: u8 = 0xf4;

const KERNEL_CS: u16 = 0x08;
const USER_SS: u16 = 0x1b;
const USER_CS: u16 = 0x23;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;

/// Present, instruction fetch, by user code: the fault of an entry point that runs in ring 3.
const FETCH_BY_USER: u64 = 0x15;

/// Why nothing was found out.
#[derive(Debug, Error)]
pub(super) enum ProbeError {
    #[error("an ioctl of the probe")]
    Ioctl(#[from] kvm_ioctls::Error),
    #[error("memory of the probe")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("mapping memory for the probe")]
    Mapping(#[from] vm_memory::mmap::FromRangesError),
    #[error("the probe ended with {0}")]
    Exit(String),
}

/// True where SYSCALL enters the kernel in ring 3.
pub(super) fn syscall_keeps_ring_3(kvm: &kvm_ioctls::Kvm) -> Result<bool, ProbeError> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)])?;
    fill(&memory)?;
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: the mapping is ours and is unmapped after the VM and its vCPU are closed, as locals
    // are dropped in reverse order.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_user_code(&vcpu)?;
    match vcpu.run()? {
        VcpuExit::Hlt => {}
        other => return Err(ProbeError::Exit(format!("{other:?}"))),
    }
    let registers = vcpu.get_regs()?;
    let after_hlt = |entry| entry + 1;
    if registers.rip == after_hlt(SYSCALL_ENTRY) {
        return Ok(false);
    }
    let stack = registers.rsp.wrapping_sub(KERNEL);
    let [error_code, rip, cs] = memory.read_obj::<[u64; 3]>(GuestAddress(stack))?;
    if registers.rip == after_hlt(FAULT_ENTRY)
        && error_code & FETCH_BY_USER == FETCH_BY_USER
        && rip == SYSCALL_ENTRY
        && cs & 3 == 3
    {
        return Ok(true);
    }
    Err(ProbeError::Exit(format!(
        "a halt at {:#x} after error {error_code:#x} at {cs:#x}:{rip:#x}",
        registers.rip
    )))
}

/// Page tables, descriptors and code.
fn fill(memory: &GuestMemoryMmap<()>) -> Result<(), ProbeError> {
    const TABLE: u64 = 0x7;
    const USER_2M: u64 = 0x87;
    const KERNEL_2M: u64 = 0x83;
    let put = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address));
    put(PML4, PDPT | TABLE)?;
    put(PDPT, PAGE_DIRECTORY | TABLE)?;
    put(PAGE_DIRECTORY, USER_2M)?;
    put(PAGE_DIRECTORY + 8, KERNEL_2M)?;

    let descriptors = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (address, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        put(address, descriptor)?;
    }
    // RSP0 at offset 4 of the TSS (Intel SDM volume 3, section 7.7).
    put(TSS + 4, STACK_TOP)?;
    // An interrupt gate for #PF (section 6.14.1).
    let gate = FAULT_ENTRY & 0xffff | u64::from(KERNEL_CS) << 16 | 0x8e << 40;
    put(IDT + 14 * 16, gate | (FAULT_ENTRY >> 16 & 0xffff) << 48)?;

    memory.write_slice(&SYSCALL, GuestAddress(USER_CODE))?;
    memory.write_obj(HLT, GuestAddress(SYSCALL_ENTRY - KERNEL))?;
    memory.write_obj(HLT, GuestAddress(FAULT_ENTRY - KERNEL))?;
    Ok(())
}

/// 64-bit mode, ring 3, at the SYSCALL.
fn enter_user_code(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let data = Segment {
        limit: u32::MAX,
        selector: USER_SS,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = Segment {
        selector: USER_CS,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    let task = Segment {
        base: KERNEL + TSS,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    let table = |base: u64, limit| DescriptorTable {
        base: KERNEL + base,
        limit,
        ..Default::default()
    };
    vcpu.set_sregs(&SpecialRegisters {
        cs: code,
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        tr: task,
        gdt: table(GDT, 5 * 8 - 1),
        idt: table(IDT, 15 * 16 - 1),
        // Paging, write protection, protection; PAE, SSE; NXE, LMA, LME, SCE.
        cr0: 0x8001_0033,
        cr3: PML4,
        cr4: 0x620,
        efer: 0xd01,
        ..vcpu.get_sregs()?
    })?;
    let msr = |index, data| MsrEntry {
        index,
        data,
        ..Default::default()
    };
    let msrs = [
        msr(MSR_STAR, u64::from(KERNEL_CS) << 32 | 0x10 << 48),
        msr(MSR_LSTAR, SYSCALL_ENTRY),
        msr(MSR_SFMASK, 0x200),
    ];
    if vcpu.set_msrs(&msr_list(&msrs)?)? != msrs.len() {
        return Err(ProbeError::Exit("a refused MSR".into()));
    }
    vcpu.set_regs(&Registers {
        rip: USER_CODE,
        rflags: 0x2,
        ..Default::default()
    })?;
    Ok(())
}
