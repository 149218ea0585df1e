//! What a guest does comes out as the exit that it should.

use hypervisor::{MemorySlot, VmExit};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::guest::{CODE, DATA, Guest, MMIO, USER, kick_while_running, kvm, ring_3};
use crate::guest_code;

/// String output may come in pieces, of whole elements each.
fn collect_out(guest: &mut Guest, port: u16, size: usize, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length {
        match guest.vcpu.run().unwrap() {
            VmExit::IoOut {
                port: p,
                size: s,
                data,
            } => {
                assert_eq!((p, s, data.len() % size), (port, size, 0));
                all.extend_from_slice(data);
            }
            other => panic!("{other:?}"),
        }
    }
    all
}

#[test]
fn ports_of_each_size() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!(
        "mov dx, 0x1234",
        "in al, dx",
        "inc al",
        "out dx, al",
        "in ax, dx",
        "inc ax",
        "out dx, ax",
        "in eax, dx",
        "inc eax",
        "out dx, eax",
        "hlt",
    ));
    for (size, value) in [(1, 0x41_u32), (2, 0x4142), (4, 0x4142_4344)] {
        match guest.vcpu.run().unwrap() {
            VmExit::IoIn {
                port,
                size: s,
                data,
            } => {
                assert_eq!((port, s, data.len()), (0x1234, size, size));
                data.copy_from_slice(&value.to_le_bytes()[..size]);
            }
            other => panic!("{other:?}"),
        }
        match guest.vcpu.run().unwrap() {
            VmExit::IoOut {
                port,
                size: s,
                data,
            } => {
                assert_eq!((port, s), (0x1234, size));
                assert_eq!(data, &(value + 1).to_le_bytes()[..size]);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
}

#[test]
fn string_output() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.load(DATA, b"port by port");
    guest.start(guest_code!(
        "mov esi, 0x20000",
        "mov ecx, 12",
        "mov dx, 0x3f8",
        "rep outsb",
        "mov esi, 0x20000",
        "mov ecx, 3",
        "mov dx, 0x500",
        "rep outsd",
        "hlt",
    ));
    assert_eq!(collect_out(&mut guest, 0x3f8, 1, 12), b"port by port");
    assert_eq!(collect_out(&mut guest, 0x500, 4, 12), b"port by port");
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
}

#[test]
fn string_input() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!(
        "mov edi, 0x20000",
        "mov ecx, 5",
        "mov dx, 0x1f0",
        "rep insw",
        "hlt",
    ));
    let mut next = 0x30_u8;
    loop {
        match guest.vcpu.run().unwrap() {
            VmExit::IoIn { port, size, data } => {
                assert_eq!((port, size, data.len() % 2), (0x1f0, 2, 0));
                for byte in data {
                    *byte = next;
                    next += 1;
                }
            }
            VmExit::Hlt => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(&guest.get::<[u8; 12]>(DATA), b"0123456789\0\0");
}

#[test]
fn mmio_of_each_size() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!(
        "mov ebx, 0x10000010",
        "mov rax, [rbx]",
        "mov [rbx + 8], rax",
        "mov [rbx + 16], eax",
        "mov [rbx + 20], ax",
        "mov [rbx + 22], al",
        "hlt",
    ));
    match guest.vcpu.run().unwrap() {
        VmExit::MmioRead { address, data } => {
            assert_eq!((address, data.len()), (MMIO + 0x10, 8));
            data.copy_from_slice(b"register");
        }
        other => panic!("{other:?}"),
    }
    for (offset, bytes) in [
        (0x18, &b"register"[..]),
        (0x20, b"regi"),
        (0x24, b"re"),
        (0x26, b"r"),
    ] {
        match guest.vcpu.run().unwrap() {
            VmExit::MmioWrite { address, data } => {
                assert_eq!((address, data), (MMIO + offset, bytes));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
}

#[test]
fn an_exception_without_a_handler_is_a_triple_fault() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!("ud2"));
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::TripleFault));
}

#[test]
fn a_write_to_a_read_only_slot_is_mmio() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    let rom = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let slot = MemorySlot {
        slot: 1,
        guest_address: MMIO,
        size: 0x1000,
        host_address: rom.get_host_address(GuestAddress(0)).unwrap() as u64,
        read_only: true,
        log_dirty: false,
    };
    // SAFETY: the mapping is ours and stays until the slot is removed.
    unsafe { guest.vm.set_memory_slot(&slot) }.unwrap();
    let code = guest_code!(
        "mov ebx, 0x10000000",
        "mov eax, [rbx]",
        "mov [rbx], ebx",
        "hlt",
    );
    guest.start(code);
    match guest.vcpu.run().unwrap() {
        VmExit::MmioWrite { address, data } => {
            assert_eq!((address, data), (MMIO, &MMIO.to_le_bytes()[..4]));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    guest.vm.remove_memory_slot(1).unwrap();
    guest.go_to(CODE);
    assert!(matches!(
        guest.vcpu.run().unwrap(),
        VmExit::MmioRead { address: MMIO, .. }
    ));
}

#[test]
fn a_kick_ends_a_halt() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::with_lapic(&kvm);
    guest.start(guest_code!("out 0x10, al", "20:", "hlt", "jmp 20b"));
    assert_eq!(guest.next_out(), (0x10, 0));
    let guest = kick_while_running(guest);
    let kick = guest.vcpu.kick();
    drop(guest);
    // The vCPU is gone; the handle is not.
    kick.set();
}

#[test]
fn a_kick_ends_a_loop_of_user_code() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm);
    guest.start(guest_code!("20:", "jmp 20b"));
    guest
        .vcpu
        .set_special_registers(&ring_3(&*guest.vcpu))
        .unwrap();
    let mut registers = guest.vcpu.registers().unwrap();
    registers.rip = USER + CODE;
    guest.vcpu.set_registers(&registers).unwrap();
    kick_while_running(guest);
}

#[test]
fn a_kick_before_a_run_ends_it() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!("out 0x10, al", "hlt"));
    let kick = guest.vcpu.kick();
    kick.set();
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Interrupted));
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Interrupted));
    assert_eq!(guest.vcpu.registers().unwrap().rip, CODE);
    kick.clear();
    assert_eq!(guest.next_out(), (0x10, 0));
}

#[test]
fn a_kick_lets_a_port_read_be_finished() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.start(guest_code!("in al, 0x10", "hlt"));
    match guest.vcpu.run().unwrap() {
        VmExit::IoIn { data, .. } => data[0] = 0x77,
        other => panic!("{other:?}"),
    }
    let kick = guest.vcpu.kick();
    kick.set();
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Interrupted));
    let registers = guest.vcpu.registers().unwrap();
    assert_eq!((registers.rax, registers.rip), (0x77, CODE + 2));
}
