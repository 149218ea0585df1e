//! Interrupts into the guest, and events out of it without an exit.

use hypervisor::{IoEventAddress, IrqRoute, IrqTarget, MsiMessage, VmExit};
use vmm_sys_util::eventfd::EventFd;

use crate::guest::{CODE, DATA, Guest, MMIO, RAM, kvm};
use crate::guest_code;

const VECTOR: u32 = 0x40;
const HANDLER: u64 = CODE + 0x1000;

/// Fixed delivery of [`VECTOR`] to APIC id 0 (Intel SDM volume 3, section 11.11).
const MESSAGE: MsiMessage = MsiMessage {
    address_low: 0xfee0_0000,
    address_high: 0,
    data: VECTOR,
    device_id: 0,
};

/// A guest that halts with interrupts on and writes its count of them to port 0x21 after each.
fn waiting_guest() -> Option<Guest> {
    let kvm = kvm()?;
    let mut guest = Guest::with_lapic(&kvm);
    guest.set_gate(VECTOR.into(), HANDLER);
    guest.load(
        HANDLER,
        guest_code!(
            "inc ebx",
            "mov ecx, 0x80b",
            "xor eax, eax",
            "xor edx, edx",
            "wrmsr",
            "mov eax, ebx",
            "out 0x21, eax",
            "iretq",
        ),
    );
    guest.start(guest_code!(
        "mov ecx, 0x1b",
        "rdmsr",
        "or eax, 0xc00",
        "wrmsr",
        "mov ecx, 0x80f",
        "mov eax, 0x1ff",
        "xor edx, edx",
        "wrmsr",
        "out 0x20, al",
        "sti",
        "20:",
        "hlt",
        "jmp 20b",
    ));
    assert_eq!(guest.next_out().0, 0x20);
    Some(guest)
}

#[test]
fn a_message_interrupts() {
    let Some(mut guest) = waiting_guest() else {
        return;
    };
    for count in 1..=3 {
        assert!(guest.vm.signal_msi(&MESSAGE).unwrap());
        assert_eq!(guest.next_out(), (0x21, count));
    }
}

#[test]
fn a_message_to_nobody_is_not_delivered() {
    let Some(guest) = waiting_guest() else { return };
    let to_nobody = MsiMessage {
        address_low: 0xfee7_0000,
        ..MESSAGE
    };
    assert!(!guest.vm.signal_msi(&to_nobody).unwrap());
}

#[test]
fn an_event_interrupts_by_the_route_of_its_gsi() {
    let Some(mut guest) = waiting_guest() else {
        return;
    };
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    guest
        .vm
        .set_irq_routes(&[IrqRoute {
            gsi: 30,
            target: IrqTarget::Msi(MESSAGE),
        }])
        .unwrap();
    guest.vm.register_irqfd(&event, 30).unwrap();
    event.write(1).unwrap();
    assert_eq!(guest.next_out(), (0x21, 1));
    event.write(1).unwrap();
    assert_eq!(guest.next_out(), (0x21, 2));

    guest.vm.unregister_irqfd(&event, 30).unwrap();
    event.write(1).unwrap();
    assert!(guest.vm.signal_msi(&MESSAGE).unwrap());
    assert_eq!(guest.next_out(), (0x21, 3), "the event gave none");
    assert_eq!(event.read().unwrap(), 1, "nobody took it");
}

#[test]
fn a_failed_registration_says_what() {
    let Some(guest) = waiting_guest() else { return };
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    guest.vm.register_irqfd(&event, 30).unwrap();
    let error = guest.vm.register_irqfd(&event, 31).unwrap_err();
    assert_eq!(error.to_string(), "connecting an event to interrupt 31");
}

#[test]
fn a_second_vcpu_waits_for_its_start() {
    let Some(guest) = waiting_guest() else { return };
    const RUNNABLE: u32 = 0;
    const UNINITIALIZED: u32 = 1;
    let second = guest.vm.create_vcpu(1).unwrap();
    assert_eq!(second.id(), 1);
    assert_eq!(guest.vcpu.mp_state().unwrap().mp_state, RUNNABLE);
    assert_eq!(second.mp_state().unwrap().mp_state, UNINITIALIZED);
    assert!(guest.vm.create_vcpu(1).is_err(), "there is one already");
}

#[test]
fn an_nmi_is_taken() {
    let Some(mut guest) = waiting_guest() else {
        return;
    };
    guest.set_gate(2, HANDLER + 0x100);
    guest.load(HANDLER + 0x100, guest_code!("out 0x22, al", "iretq"));
    guest.vcpu.nmi().unwrap();
    assert_eq!(guest.next_out().0, 0x22);
}

#[test]
fn writes_become_events() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    let [any, seven, port] = [(); 3].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let (queue, doorbell) = (
        IoEventAddress::Mmio(MMIO + 0x100),
        IoEventAddress::Mmio(MMIO),
    );
    let legacy = IoEventAddress::Port(0x600);
    guest.vm.register_ioeventfd(&any, doorbell, None).unwrap();
    guest.vm.register_ioeventfd(&seven, queue, Some(7)).unwrap();
    guest.vm.register_ioeventfd(&port, legacy, None).unwrap();
    let code = guest_code!(
        "mov ebx, 0x10000000",
        "mov word ptr [rbx], 1",
        "mov dword ptr [rbx], 2",
        "mov dword ptr [rbx + 0x100], 7",
        "mov dx, 0x600",
        "out dx, al",
        "mov dword ptr [rbx + 0x100], 8",
        "hlt",
    );
    guest.start(code);
    match guest.vcpu.run().unwrap() {
        VmExit::MmioWrite { address, data } => {
            assert_eq!(
                (address, data[0]),
                (MMIO + 0x100, 8),
                "the first that is no event"
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    let counts = [&any, &seven, &port].map(|event| event.read().unwrap());
    assert_eq!(counts, [2, 1, 1]);

    guest.vm.unregister_ioeventfd(&any, doorbell, None).unwrap();
    guest
        .vm
        .unregister_ioeventfd(&seven, queue, Some(7))
        .unwrap();
    guest.vm.unregister_ioeventfd(&port, legacy, None).unwrap();
    guest.go_to(CODE);
    assert!(matches!(
        guest.vcpu.run().unwrap(),
        VmExit::MmioWrite { address: MMIO, .. }
    ));
}

#[test]
fn the_dirty_log_has_each_written_page_once() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.set_ram_slot(false, true);
    guest.start(guest_code!(
        "mov byte ptr [0x20000], 1",
        "mov byte ptr [0x2fff8], 1",
        "hlt",
    ));
    guest.vm.dirty_log(0, RAM as u64).unwrap();
    assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Hlt));
    let log = guest.vm.dirty_log(0, RAM as u64).unwrap();
    assert_eq!(log.len(), RAM / 4096 / 64);
    let dirty = |page: u64| log[page as usize / 64] >> (page % 64) & 1 == 1;
    assert!(dirty(DATA / 4096) && dirty(0x2f));
    assert!(!dirty(0x21));
    assert!(
        guest
            .vm
            .dirty_log(0, RAM as u64)
            .unwrap()
            .iter()
            .all(|&word| word == 0)
    );
}

#[test]
fn a_missing_slot_has_no_dirty_log() {
    let Some(kvm) = kvm() else { return };
    let error = Guest::new(&kvm).vm.dirty_log(9, 0x1000).unwrap_err();
    assert_eq!(error.to_string(), "reading the dirty log of memory slot 9");
}
