//! A vCPU's state in and out.

use hypervisor::x86::{ClockData, DebugRegisters};
use hypervisor::{Hypervisor, Vcpu, VcpuError, VmExit};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{CODE, Guest, RAM, STACK, USER, kvm, msr, ring_3};
use crate::guest_code;

const TSC_DEADLINE: u32 = 0x6e0;
const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// No CPU has it.
const NO_MSR: u32 = 0x0bad_0bad;

/// Carries everything of a stopped vCPU over to a new one.
fn carry(from: &dyn Vcpu, to: &dyn Vcpu, indices: &[u32]) {
    to.set_cpuid(&from.cpuid().unwrap()).unwrap();
    to.set_xcrs(&from.xcrs().unwrap()).unwrap();
    to.set_special_registers(&from.special_registers().unwrap())
        .unwrap();
    to.set_xsave(&from.xsave().unwrap()).unwrap();
    to.set_lapic(&from.lapic().unwrap()).unwrap();
    to.set_msrs(&from.msrs(indices).unwrap()).unwrap();
    to.set_registers(&from.registers().unwrap()).unwrap();
    to.set_debug_registers(&from.debug_registers().unwrap())
        .unwrap();
    to.set_mp_state(from.mp_state().unwrap()).unwrap();
    to.set_events(&from.events().unwrap()).unwrap();
}

/// A second guest that goes on where the first was stopped.
fn carry_guest(from: &Guest) -> Guest {
    let kvm = kvm().unwrap();
    let to = Guest::with_lapic(&kvm);
    let mut ram = vec![0; RAM];
    from.ram.read_slice(&mut ram, GuestAddress(0)).unwrap();
    to.ram.write_slice(&ram, GuestAddress(0)).unwrap();
    carry(&*from.vcpu, &*to.vcpu, &kvm.msr_indices().unwrap());
    to
}

/// Runs up to the write to a port, and past it, so that nothing is pending.
fn stop_after_out(guest: &mut Guest) {
    assert_eq!(guest.next_out().0, 0x10);
    let kick = guest.vcpu.kick();
    kick.set();
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Interrupted));
    kick.clear();
}

#[test]
fn ring_0_goes_on_in_another_vm() {
    let Some(kvm) = kvm() else { return };
    let mut first = Guest::with_lapic(&kvm);
    first.start(guest_code!(
        "mov ecx, 0xc0000102",
        "mov eax, 0x1234567",
        "xor edx, edx",
        "wrmsr",
        "mov r15, 0x1122334455667788",
        "mov [0x20000], r15",
        "movups xmm7, [0x20000]",
        "push r15",
        "out 0x10, al",
        "movups [0x20010], xmm7",
        "mov eax, [0x20010]",
        "out 0x11, eax",
        "pop rax",
        "out 0x12, eax",
        "mov ecx, 0xc0000102",
        "rdmsr",
        "out 0x13, eax",
        "hlt",
    ));
    stop_after_out(&mut first);
    let mut second = carry_guest(&first);
    drop(first);
    assert_eq!(second.next_out(), (0x11, 0x5566_7788));
    assert_eq!(second.next_out(), (0x12, 0x5566_7788));
    assert_eq!(second.next_out(), (0x13, 0x0123_4567));
}

#[test]
fn user_code_goes_on_in_another_vm() {
    let Some(kvm) = kvm() else { return };
    let mut first = Guest::with_lapic(&kvm);
    first.start(guest_code!(
        "mov r15d, 0x778899aa",
        "movq xmm3, r15",
        "out 0x10, al",
        "movq rax, xmm3",
        "out 0x11, eax",
        "20:",
        "jmp 20b",
    ));
    first
        .vcpu
        .set_special_registers(&ring_3(&*first.vcpu))
        .unwrap();
    first.let_user_code_use_ports(true);
    let mut registers = first.vcpu.registers().unwrap();
    registers.rip = USER + CODE;
    registers.rsp = USER + STACK;
    registers.rflags = 0x202;
    first.vcpu.set_registers(&registers).unwrap();
    stop_after_out(&mut first);
    let mut second = carry_guest(&first);
    assert_eq!(second.next_out(), (0x11, 0x7788_99aa));
}

#[test]
fn setters_are_seen_by_getters() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::with_lapic(&kvm);
    let vcpu = &guest.vcpu;

    let mut fpu = vcpu.fpu().unwrap();
    fpu.xmm[5] = *b"sixteen bytes !!";
    vcpu.set_fpu(&fpu).unwrap();
    assert_eq!(vcpu.fpu().unwrap().xmm[5], fpu.xmm[5]);

    // XMM6 in the legacy region, XSTATE_BV in the header (Intel SDM volume 1, section 13.4).
    let mut area = vcpu.xsave().unwrap();
    area[160 + 6 * 16..][..16].copy_from_slice(b"sixteen others !");
    area[512] |= 0b10;
    vcpu.set_xsave(&area).unwrap();
    assert_eq!(vcpu.xsave().unwrap(), area);
    assert_eq!(&vcpu.fpu().unwrap().xmm[6], b"sixteen others !");

    let debug = DebugRegisters {
        db: [CODE, 0, 0, 0],
        ..vcpu.debug_registers().unwrap()
    };
    vcpu.set_debug_registers(&debug).unwrap();
    assert_eq!(vcpu.debug_registers().unwrap().db[0], CODE);

    let mut lapic = vcpu.lapic().unwrap();
    lapic.regs[0x80] = 0x20;
    vcpu.set_lapic(&lapic).unwrap();
    assert_eq!(vcpu.lapic().unwrap().regs[0x80], 0x20, "the task priority");

    vcpu.notify_paused().unwrap();
    assert!(vcpu.tsc_khz().unwrap() > 0);
}

#[test]
fn an_xsave_area_of_another_length_is_refused() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm);
    let mut area = guest.vcpu.xsave().unwrap();
    area.push(0);
    for wrong in [&area[..], &[]] {
        let error = guest.vcpu.set_xsave(wrong).unwrap_err();
        assert_eq!(error.to_string(), "vCPU 0: setting the XSAVE area");
    }
}

#[test]
fn listed_msrs_can_be_read_and_set() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::with_lapic(&kvm);
    let indices = kvm.msr_indices().unwrap();
    assert!(indices.contains(&LSTAR) && indices.contains(&TSC_DEADLINE));
    let msrs = guest.vcpu.msrs(&indices).unwrap();
    let read: Vec<u32> = msrs.iter().map(|msr| msr.index).collect();
    assert_eq!(read, indices, "all, in their order");
    guest.vcpu.set_msrs(&msrs).unwrap();
}

#[test]
fn unknown_msrs_are_left_out_or_named() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm);
    let vcpu = &guest.vcpu;
    let wanted = [NO_MSR, KERNEL_GS_BASE, NO_MSR + 1, LSTAR, NO_MSR + 2];
    let read: Vec<u32> = vcpu
        .msrs(&wanted)
        .unwrap()
        .iter()
        .map(|msr| msr.index)
        .collect();
    assert_eq!(read, [KERNEL_GS_BASE, LSTAR]);
    let list = [msr(KERNEL_GS_BASE, 7), msr(NO_MSR, 0), msr(LSTAR, 8)];
    match vcpu.set_msrs(&list).unwrap_err() {
        VcpuError::Msr { cpu: 0, index } => assert_eq!(index, NO_MSR),
        other => panic!("{other:?}"),
    }
    let values: Vec<u64> = vcpu
        .msrs(&[KERNEL_GS_BASE, LSTAR])
        .unwrap()
        .iter()
        .map(|msr| msr.data)
        .collect();
    assert_eq!(values, [7, 0], "up to the refused one");
}

#[test]
fn the_clock_goes_on_from_where_it_is_set() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::with_lapic(&kvm);
    const HOUR: u64 = 3_600_000_000_000;
    let clock = ClockData {
        clock: HOUR,
        // What a saved clock of another host says beside the nanoseconds has no effect.
        flags: u32::MAX,
        realtime: 5,
        host_tsc: 6,
        ..Default::default()
    };
    guest.vm.set_clock(&clock).unwrap();
    let now = guest.vm.clock().unwrap().clock;
    assert!((HOUR..2 * HOUR).contains(&now), "{now}");
}

#[test]
fn limits_are_those_of_kvm() {
    let Some(kvm) = kvm() else { return };
    assert!(kvm.max_vcpus() >= 1);
    assert!(kvm.max_memory_slots() >= 32);
    assert!(!kvm.supported_cpuid().unwrap().is_empty());
    for (name, _) in kvm.missing_optional() {
        assert!(name.starts_with("KVM_CAP_"), "{name}");
    }
}
