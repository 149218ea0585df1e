//! Instructions that a KVM may be unable to emulate work in ring 0. On hardware they never leave
//! the CPU, and the counters stay empty.

use hypervisor::x86::Registers;
use hypervisor::{VcpuError, VmExit};

use crate::guest::{CODE, DATA, Guest, MMIO, STACK, USER, kick_while_running, kvm, ring_0, ring_3};
use crate::guest_code;

const HANDLER: u64 = CODE + 0x1000;
const CR4_OSXSAVE: u64 = 1 << 18;

/// Either the fallback had no work at all, or this much.
fn assert_counted(guest: &Guest, expected: &[(&str, u64)]) {
    let counters = guest.vcpu.counters();
    if counters.is_empty() {
        return;
    }
    let counted: Vec<_> = counters.iter().map(|(n, c)| (n.as_str(), *c)).collect();
    assert_eq!(counted, expected);
}

#[test]
fn registers_and_memory_are_as_the_instruction_leaves_them() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.put(DATA, 0xff00_ff01_u64);
    guest.start(guest_code!(
        "popcnt rax, [0x20000]",
        "out 0x10, eax",
        "mov ecx, 0xf0f",
        "popcnt ecx, ecx",
        "mov eax, ecx",
        "out 0x11, eax",
        "mov rax, [0x20010]",
        "mov rdx, [0x20018]",
        "mov ebx, 5",
        "mov ecx, 6",
        "lock cmpxchg16b [0x20010]",
        "setz al",
        "out 0x12, al",
        "hlt",
    ));
    assert_eq!(guest.next_out(), (0x10, 17));
    assert_eq!(guest.next_out(), (0x11, 8));
    assert_eq!(guest.next_out(), (0x12, 1));
    assert_eq!(guest.get::<[u64; 2]>(DATA + 0x10), [5, 6]);
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    assert_counted(&guest, &[("cmpxchg16b", 1), ("popcnt", 2)]);
}

#[test]
fn vector_state_is_kept() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    let mut special = ring_0(&*guest.vcpu);
    special.cr4 |= CR4_OSXSAVE;
    guest.vcpu.set_special_registers(&special).unwrap();
    guest.put(DATA, *b"Two of eight byt");
    guest.start(guest_code!(
        "movups xmm2, [0x20000]",
        "movups xmm9, [0x20000]",
        "pxor xmm2, xmm9",
        "movups [0x20010], xmm2",
        "xor ecx, ecx",
        "mov eax, 3",
        "xor edx, edx",
        "xsetbv",
        "xsave [0x21000]",
        "pxor xmm9, xmm9",
        "movups [0x20020], xmm9",
        "mov eax, 3",
        "xrstor [0x21000]",
        "movups [0x20030], xmm9",
        "hlt",
    ));
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    assert_eq!(guest.get::<[u64; 2]>(DATA + 0x10), [0, 0]);
    assert_eq!(guest.get::<[u64; 2]>(DATA + 0x20), [0, 0]);
    assert_eq!(&guest.get::<[u8; 16]>(DATA + 0x30), b"Two of eight byt");
    assert_counted(&guest, &[("pxor", 2), ("xrstor", 1), ("xsave", 1)]);
}

#[test]
fn software_interrupts_are_traps() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    for (vector, handler) in [
        (
            3,
            guest_code!("pop rax", "out 0x13, eax", "push rax", "iretq"),
        ),
        (
            0x41,
            guest_code!("pop rax", "out 0x14, eax", "push rax", "iretq"),
        ),
        (
            13,
            guest_code!("pop rax", "out 0x15, eax", "push rax", "iretq"),
        ),
    ] {
        guest.load(HANDLER + vector * 0x10, handler);
        guest.set_gate(vector, HANDLER + vector * 0x10);
    }
    guest.start(guest_code!("int3", "int 0x41", "int 13", "hlt"));
    let rip = |offset| (CODE + offset) as u32;
    assert_eq!(guest.next_out(), (0x13, rip(1)));
    assert_eq!(guest.next_out(), (0x14, rip(3)));
    assert_eq!(guest.next_out(), (0x15, rip(5)));
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    assert_counted(&guest, &[("int", 2), ("int3", 1)]);
}

#[test]
fn an_operand_without_a_page_is_a_page_fault() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.load(
        HANDLER,
        guest_code!(
            "mov rax, cr2",
            "out 0x10, eax",
            "pop rax",
            "out 0x11, eax",
            "pop rax",
            "out 0x12, eax",
            "hlt",
        ),
    );
    guest.set_gate(14, HANDLER);
    guest.start(guest_code!("mov ebx, 0x80000008", "popcnt rax, [rbx]"));
    assert_eq!(guest.next_out(), (0x10, 0x8000_0008), "CR2");
    assert_eq!(guest.next_out(), (0x11, 0), "a read of an absent page");
    assert_eq!(guest.next_out(), (0x12, CODE as u32 + 5), "the instruction");
    assert_counted(&guest, &[("popcnt", 1)]);
}

#[test]
fn a_single_step_ends_behind_the_instruction() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.load(
        HANDLER,
        guest_code!(
            "mov rax, dr6",
            "out 0x10, eax",
            "pop rax",
            "out 0x11, eax",
            "hlt",
        ),
    );
    guest.set_gate(1, HANDLER);
    guest.start(guest_code!(
        "pushfq",
        "or dword ptr [rsp], 0x100",
        "popfq",
        "popcnt eax, ebx",
        "nop",
        "hlt",
    ));
    let (port, dr6) = guest.next_out();
    assert_eq!((port, dr6 & 0x4000), (0x10, 0x4000), "DR6.BS");
    assert_eq!(guest.next_out(), (0x11, CODE as u32 + 13));
}

#[test]
fn what_cannot_be_carried_out_is_told_in_full() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!("mov ebx, 0x10000000", "popcnt rax, [rbx]"));
    match guest.vcpu.run().unwrap_err() {
        VcpuError::Emulation {
            cpu,
            rip,
            instruction,
            bytes,
            why,
        } => {
            assert_eq!((cpu, rip), (0, CODE + 5));
            assert!(instruction.contains("popcnt"), "{instruction}");
            assert!(bytes.starts_with("f3 48 0f b8 03"), "{bytes}");
            assert!(!why.is_empty());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn user_code_gets_an_exception_for_it() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.load(HANDLER, guest_code!("pop rax", "out 0x10, eax", "hlt"));
    guest.set_gate(6, HANDLER);
    guest.load(CODE, guest_code!("popcnt rax, [rbx]"));
    guest
        .vcpu
        .set_special_registers(&ring_3(&*guest.vcpu))
        .unwrap();
    guest
        .vcpu
        .set_registers(&Registers {
            rip: USER + CODE,
            rsp: USER + STACK,
            rbx: USER + MMIO,
            rflags: 0x202,
            ..Default::default()
        })
        .unwrap();
    assert_eq!(guest.next_out(), (0x10, (USER + CODE) as u32));
}

#[test]
fn a_kick_ends_a_run_that_is_all_fallback() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!(
        "out 0x10, al",
        "20:",
        "popcnt rax, rax",
        "jmp 20b"
    ));
    assert_eq!(guest.next_out(), (0x10, 0));
    kick_while_running(guest);
}
