//! SYSCALL from user code enters the kernel, whether by itself or by the remedy.

use hypervisor::VmExit;
use hypervisor::x86::Registers;

use crate::guest::{CODE, DATA, Guest, KERNEL_CS, RAM, USER, kvm, msr, ring_0, ring_3};
use crate::guest_code;

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;

const ENTRY: u64 = CODE + 0x1000;
const FAULT: u64 = CODE + 0x2000;
const USER_CODE: u64 = CODE + 0x3000;
const USER_STACK: u64 = USER + 0x5_0000;
const STAR_VALUE: u64 = (0x10 << 48) | ((KERNEL_CS as u64) << 32);

/// Adds RDI to the count in memory, and returns. It leaves its CS, SS and flags to be looked at.
fn entry() -> &'static [u8] {
    guest_code!(
        "mov r9, rsp",
        "mov esp, 0x30000",
        "pushfq",
        "pop [0x20010]",
        "mov [0x20018], cs",
        "mov [0x20020], ss",
        "add [0x20000], rdi",
        "mov rsp, r9",
        "sysretq",
    )
}

/// Ten system calls, then a port that ring 0 only may write, which is #GP (vector 13).
fn user_code() -> &'static [u8] {
    guest_code!(
        "mov ebx, 10",
        "20:",
        "mov edi, 3",
        "syscall",
        "dec ebx",
        "jnz 20b",
        "out 0x80, al",
    )
}

/// Goes to user code at [`USER_CODE`].
fn enter_user_code(guest: &Guest) {
    let vcpu = &guest.vcpu;
    vcpu.set_special_registers(&ring_3(&**vcpu)).unwrap();
    vcpu.set_registers(&Registers {
        rip: USER + USER_CODE,
        rsp: USER_STACK,
        rflags: 0x202,
        ..Default::default()
    })
    .unwrap();
}

/// A guest with an entry point, user code that uses it, and a #GP handler that tells the
/// count and runs that user code again.
fn guest() -> Option<Guest> {
    let kvm = kvm()?;
    let guest = Guest::new(&kvm);
    guest.load(ENTRY, entry());
    guest.load(USER_CODE, user_code());
    guest.load(
        CODE + 0x4000,
        guest_code!(
            "mov eax, [0x20000]",
            "out 0x30, eax",
            "add rsp, 8",
            "mov eax, 0x40013000",
            "mov [rsp], rax",
            "iretq",
        ),
    );
    guest.set_gate(13, CODE + 0x4000);
    guest.set_gate(14, FAULT);
    Some(guest)
}

/// What a fault handler of the guest's own does with a real fault: it counts and skips it. They
/// differ in how they begin: without effect, with an effect, and with an instruction that a KVM
/// may be unable to emulate.
fn fault_handlers() -> [&'static [u8]; 3] {
    [
        guest_code!(
            "endbr64",
            "inc dword ptr [0x20028]",
            "add rsp, 8",
            "add qword ptr [rsp], 3",
            "iretq",
        ),
        guest_code!(
            "push rax",
            "inc dword ptr [0x20028]",
            "pop rax",
            "add rsp, 8",
            "add qword ptr [rsp], 3",
            "iretq",
        ),
        guest_code!(
            "popcnt r10, r10",
            "inc dword ptr [0x20028]",
            "add rsp, 8",
            "add qword ptr [rsp], 3",
            "iretq",
        ),
    ]
}

fn set_msrs(guest: &Guest) {
    guest
        .vcpu
        .set_msrs(&[
            msr(STAR, STAR_VALUE),
            msr(LSTAR, ENTRY),
            msr(SFMASK, 0x4_7700),
        ])
        .unwrap();
}

/// All of them if the remedy is in use, none if it is not.
fn assert_mended(guest: &Guest, syscalls: u64) {
    let counters = guest.vcpu.counters();
    let mended = counters.get("syscall").copied();
    assert!(
        counters.is_empty() || mended.unwrap_or(0) == syscalls,
        "{counters:?}"
    );
}

#[test]
fn with_msrs_set_from_outside() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, fault_handlers()[0]);
    set_msrs(&guest);
    enter_user_code(&guest);
    assert_eq!(guest.next_out(), (0x30, 30));
    assert_mended(&guest, 10);
    let flags: u64 = guest.get(DATA + 0x10);
    assert_eq!(flags & 0x1_0200, 0, "the masked IF and RF: {flags:#x}");
    let segments: [u16; 2] = [guest.get(DATA + 0x18), guest.get(DATA + 0x20)];
    assert_eq!(segments, [KERNEL_CS, KERNEL_CS + 8]);
    let registers = guest.vcpu.registers().unwrap();
    assert_eq!(registers.r9, USER_STACK, "RSP is the user's at the entry");
    assert_eq!(registers.r11 & 0x200, 0x200, "RFLAGS in R11");
}

#[test]
fn with_msrs_set_by_the_guest() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, fault_handlers()[0]);
    guest.start(guest_code!(
        "mov ecx, 0xc0000082",
        "mov eax, 0x11000",
        "xor edx, edx",
        "wrmsr",
        "rdmsr",
        "out 0x20, eax",
        "hlt",
    ));
    guest
        .vcpu
        .set_msrs(&[msr(STAR, STAR_VALUE), msr(SFMASK, 0x4_7700)])
        .unwrap();
    assert_eq!(guest.next_out(), (0x20, ENTRY as u32));
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    enter_user_code(&guest);
    assert_eq!(guest.next_out(), (0x30, 30));
    assert_mended(&guest, 10);
}

#[test]
fn a_wrong_entry_point_is_a_general_protection_fault() {
    let Some(mut guest) = guest() else { return };
    guest.start(guest_code!(
        "mov ecx, 0xc0000082",
        "xor eax, eax",
        "mov edx, 0x800000",
        "wrmsr",
        "hlt",
    ));
    guest.put(DATA, 5_u32);
    assert_eq!(guest.next_out(), (0x30, 5));
    assert_eq!(guest.vcpu.msrs(&[LSTAR]).unwrap()[0].data, 0);
}

#[test]
fn faults_of_user_code_stay_faults() {
    for (number, handler) in fault_handlers().into_iter().enumerate() {
        let Some(mut guest) = guest() else { return };
        guest.load(FAULT, handler);
        // Two faults of three bytes each: a supervisor page, and the entry point's neighbour.
        guest.load(
            USER_CODE,
            guest_code!(
                "mov ebx, 0x20000",
                "mov [rbx], al",
                "nop",
                "mov edi, 3",
                "syscall",
                "mov [rbx], al",
                "nop",
                "syscall",
                "out 0x80, al",
            ),
        );
        set_msrs(&guest);
        enter_user_code(&guest);
        assert_eq!(guest.next_out(), (0x30, 6), "handler {number}");
        assert_eq!(guest.get::<u32>(DATA + 0x28), 2, "handler {number}");
        assert_mended(&guest, 2);
    }
}

#[test]
fn user_code_that_jumps_to_the_entry_point_faults() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, guest_code!("endbr64", "out 0x31, al"));
    guest.load(
        USER_CODE,
        guest_code!(
            "mov ecx, 0x1000",
            "mov r11d, 0x3202",
            "mov eax, 0x11000",
            "jmp rax"
        ),
    );
    set_msrs(&guest);
    enter_user_code(&guest);
    assert_eq!(guest.next_out().0, 0x31);
    assert_mended(&guest, 0);
}

#[test]
fn the_fault_handler_may_change_after_the_entry_point() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, fault_handlers()[0]);
    guest.load(FAULT + 0x800, fault_handlers()[1]);
    set_msrs(&guest);
    enter_user_code(&guest);
    assert_eq!(guest.next_out(), (0x30, 30));
    guest.set_gate(14, FAULT + 0x800);
    assert_eq!(guest.next_out(), (0x30, 60));
    assert_mended(&guest, 20);
}

#[test]
fn the_guest_may_load_its_idt_after_the_entry_point() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, fault_handlers()[0]);
    let mut special = ring_0(&*guest.vcpu);
    let idt = special.idt;
    special.idt.limit = 0;
    guest.vcpu.set_special_registers(&special).unwrap();
    set_msrs(&guest);
    guest.put::<u16>(DATA + 0x100, idt.limit);
    guest.put::<u64>(DATA + 0x102, idt.base);
    // Then out, for it is at an exit that the back end looks at the table, and to user code.
    guest.start(guest_code!(
        "out 0x20, al",
        "lidt [0x20100]",
        "out 0x21, al",
        "mov ax, 0x1b",
        "push 0x1b",
        "mov eax, 0x40050000",
        "push rax",
        "push 0x202",
        "push 0x23",
        "mov eax, 0x40013000",
        "push rax",
        "iretq",
    ));
    assert_eq!(guest.next_out().0, 0x20);
    assert_eq!(guest.next_out().0, 0x21);
    assert_eq!(guest.next_out(), (0x30, 30));
    assert_mended(&guest, 10);
}

#[test]
fn the_guest_may_load_another_idt() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, fault_handlers()[0]);
    guest.load(FAULT + 0x800, fault_handlers()[1]);
    let idt = ring_0(&*guest.vcpu).idt;
    let another = DATA + 0x1000;
    let table: [u64; 30] = guest.get(idt.base);
    guest.set_gate(14, FAULT + 0x800);
    let changed: [u64; 30] = guest.get(idt.base);
    guest.put(another, changed);
    guest.put(idt.base, table);
    guest.put::<u16>(DATA + 0x100, idt.limit);
    guest.put::<u64>(DATA + 0x102, another);
    set_msrs(&guest);
    guest.start(guest_code!(
        "nop",
        "lidt [0x20100]",
        "popcnt eax, eax",
        "push 0x1b",
        "mov eax, 0x40050000",
        "push rax",
        "push 0x202",
        "push 0x23",
        "mov eax, 0x40013000",
        "push rax",
        "iretq",
    ));
    assert_eq!(guest.next_out(), (0x30, 30));
    assert_mended(&guest, 10);
}

#[test]
fn a_stack_without_memory_is_the_guests_own_affair() {
    let Some(mut guest) = guest() else { return };
    guest.load(FAULT, fault_handlers()[0]);
    set_msrs(&guest);
    // The handler entered with a stack past the RAM: nothing there tells of a SYSCALL.
    guest.go_to(FAULT);
    let mut registers = guest.vcpu.registers().unwrap();
    registers.rsp = RAM as u64 + 0x1000;
    guest.vcpu.set_registers(&registers).unwrap();
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::MmioRead { .. }));
    assert_eq!(guest.get::<u32>(DATA + 0x28), 1, "the handler ran");
}
