//! A small 64-bit guest for the tests: RAM, flat segments, an IDT, and code written as assembly.

use std::sync::{Arc, mpsc};

use hypervisor::kvm::Kvm;
use hypervisor::x86::{
    CpuidEntry, DescriptorTable, MsrEntry, Registers, Segment, SpecialRegisters,
};
use hypervisor::{Hypervisor, MemorySlot, Vcpu, Vm, VmExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Bytes of RAM at guest-physical address 0.
pub const RAM: usize = 0x20_0000;
/// Guest-physical addresses from here on have no memory; they are mapped at the same linear ones.
pub const MMIO: u64 = 0x1000_0000;
/// Linear address from which user code sees the RAM.
pub const USER: u64 = 0x4000_0000;
/// Where [`Guest::start`] puts the code.
pub const CODE: u64 = 0x1_0000;
/// A place for data.
pub const DATA: u64 = 0x2_0000;
/// Top of the stack of ring 0.
pub const STACK: u64 = 0x3_0000;
/// Top of the stack that exceptions of user code get.
const TSS_STACK: u64 = 0x4_0000;

pub const KERNEL_CS: u16 = 0x08;
const USER_SS: u16 = 0x1b;
const USER_CS: u16 = 0x23;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const KERNEL_DIRECTORY: u64 = 0x3000;
const USER_DIRECTORY: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x5100;
const IDT: u64 = 0x6000;

/// The bytes of 64-bit code in Intel syntax. Labels in it are decimal and below 90.
#[macro_export]
macro_rules! guest_code {
    ($($line:expr),+ $(,)?) => {{
        let (begin, end): (*const u8, *const u8);
        // SAFETY: the block computes two addresses in read-only data, the second not below the
        // first, and changes nothing; the bytes between them live as long as the program.
        unsafe {
            std::arch::asm!(
                "lea {begin}, [rip + 97f]",
                "lea {end}, [rip + 98f]",
                ".pushsection .rodata",
                "97:",
                $($line,)+
                "98:",
                ".popsection",
                begin = out(reg) begin,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags),
            );
            std::slice::from_raw_parts(begin, end.offset_from(begin) as usize)
        }
    }};
}

/// KVM, or `None` where the tests are to do without.
///
/// # Panics
/// If there is no usable `/dev/kvm` and `CH_TESTS_WITHOUT_KVM=1` is not set.
pub fn kvm() -> Option<Kvm> {
    if std::env::var_os("CH_TESTS_WITHOUT_KVM").is_some_and(|value| value == "1") {
        return None;
    }
    // A guest that never comes back ends the test program by SIGALRM.
    // SAFETY: the call has no preconditions.
    unsafe { libc::alarm(120) };
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(e) => panic!(
            "this test needs KVM ({e}: {:?}); set CH_TESTS_WITHOUT_KVM=1 to skip it",
            std::error::Error::source(&e)
        ),
    }
}

/// A VM with RAM and one vCPU. Fields are in the order in which they are to go.
pub struct Guest {
    pub vcpu: Box<dyn Vcpu>,
    pub vm: Arc<dyn Vm>,
    pub ram: Arc<GuestMemoryMmap>,
}

impl Guest {
    /// Without a local APIC: HLT exits.
    pub fn new(kvm: &Kvm) -> Self {
        Self::build(kvm, |_| {})
    }

    /// With a local APIC in the kernel: HLT waits for an interrupt.
    pub fn with_lapic(kvm: &Kvm) -> Self {
        Self::build(kvm, |vm| vm.enable_split_irqchip(24).unwrap())
    }

    fn build(kvm: &Kvm, prepare: impl FnOnce(&dyn Vm)) -> Self {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
        let vm = kvm.create_vm(Arc::new(ram.clone())).unwrap();
        prepare(&*vm);
        let guest = Self {
            vcpu: vm.create_vcpu(0).unwrap(),
            vm,
            ram,
        };
        guest.set_ram_slot(false, false);
        guest.vcpu.set_cpuid(&cpuid(kvm)).unwrap();
        guest.fill_tables();
        guest
            .vcpu
            .set_special_registers(&ring_0(&*guest.vcpu))
            .unwrap();
        guest
    }

    /// Slot 0 is the RAM.
    pub fn set_ram_slot(&self, read_only: bool, log_dirty: bool) {
        let slot = MemorySlot {
            slot: 0,
            guest_address: 0,
            size: RAM as u64,
            host_address: self.ram.get_host_address(GuestAddress(0)).unwrap() as u64,
            read_only,
            log_dirty,
        };
        // SAFETY: the mapping is ours and outlives the VM.
        unsafe { self.vm.set_memory_slot(&slot) }.unwrap();
    }

    fn fill_tables(&self) {
        self.put(PML4, PDPT | 0x7);
        self.put(PDPT, KERNEL_DIRECTORY | 0x7);
        self.put(PDPT + 8, USER_DIRECTORY | 0x7);
        for page in 0..512 {
            self.put(KERNEL_DIRECTORY + page * 8, page << 21 | 0x83);
            self.put(USER_DIRECTORY + page * 8, page << 21 | 0x87);
        }
        self.put(GDT + 8, 0x00af_9b00_0000_ffff_u64);
        self.put(GDT + 16, 0x00cf_9300_0000_ffff_u64);
        self.put(GDT + 24, 0x00cf_f300_0000_ffff_u64);
        self.put(GDT + 32, 0x00af_fb00_0000_ffff_u64);
        self.put(TSS + 4, TSS_STACK);
        self.let_user_code_use_ports(false);
    }

    /// Begins the map of forbidden ports among zeroes of the TSS, or behind its end (Intel SDM
    /// volume 1, section 19.5.2).
    pub fn let_user_code_use_ports(&self, allowed: bool) {
        self.put(TSS + 0x66, if allowed { 0x28_u16 } else { 0x68 });
    }

    /// Writes a value to RAM.
    pub fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.ram.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Reads a value from RAM.
    pub fn get<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.ram.read_obj(GuestAddress(address)).unwrap()
    }

    /// Puts code to RAM.
    pub fn load(&self, address: u64, code: &[u8]) {
        self.ram.write_slice(code, GuestAddress(address)).unwrap();
    }

    /// An interrupt gate that user code may use too.
    pub fn set_gate(&self, vector: u64, target: u64) {
        let low = target & 0xffff | u64::from(KERNEL_CS) << 16 | 0xee << 40;
        self.put(IDT + vector * 16, low | (target >> 16 & 0xffff) << 48);
        self.put(IDT + vector * 16 + 8, target >> 32);
    }

    /// Puts the code to [`CODE`] and the vCPU to its beginning.
    pub fn start(&self, code: &[u8]) {
        self.load(CODE, code);
        self.go_to(CODE);
    }

    /// Sets RIP and RSP, clears the rest.
    pub fn go_to(&self, rip: u64) {
        self.vcpu
            .set_registers(&Registers {
                rip,
                rsp: STACK,
                rflags: 2,
                ..Default::default()
            })
            .unwrap();
    }

    /// Runs up to the next write to a port, and returns the port and the value.
    pub fn next_out(&mut self) -> (u16, u32) {
        match self.vcpu.run().unwrap() {
            VmExit::IoOut { port, data, .. } => {
                let mut value = [0; 4];
                value[..data.len()].copy_from_slice(data);
                (port, u32::from_le_bytes(value))
            }
            other => panic!("a write to a port was to come, not {other:?}"),
        }
    }
}

/// For the signal that is to end a blocking call and no more.
extern "C" fn nothing(_: libc::c_int) {}

/// Runs the guest in a thread of its own, and kicks it from this one.
pub fn kick_while_running(mut guest: Guest) -> Guest {
    let signal = libc::SIGRTMIN();
    // SAFETY: the handler does nothing, which is safe in a signal.
    unsafe { libc::signal(signal, nothing as extern "C" fn(libc::c_int) as usize) };
    let kick = guest.vcpu.kick();
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // SAFETY: the call has no preconditions.
        sender.send(unsafe { libc::pthread_self() }).unwrap();
        assert!(matches!(guest.vcpu.run().unwrap(), VmExit::Interrupted));
        guest
    });
    let thread_id = receiver.recv().unwrap();
    kick.set();
    // SAFETY: the thread is not joined yet.
    unsafe { libc::pthread_kill(thread_id, signal) };
    let guest = thread.join().unwrap();
    kick.clear();
    guest
}

/// Everything that KVM offers, for APIC id 0.
pub fn cpuid(kvm: &Kvm) -> Vec<CpuidEntry> {
    kvm.supported_cpuid().unwrap()
}

/// 64-bit mode in ring 0.
pub fn ring_0(vcpu: &dyn Vcpu) -> SpecialRegisters {
    let data = Segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let table = |base, limit| DescriptorTable {
        base,
        limit,
        ..Default::default()
    };
    SpecialRegisters {
        cs: Segment {
            selector: KERNEL_CS,
            type_: 11,
            db: 0,
            l: 1,
            ..data
        },
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        tr: Segment {
            base: TSS,
            limit: 0x67,
            selector: 0x28,
            type_: 11,
            present: 1,
            ..Default::default()
        },
        gdt: table(GDT, 5 * 8 - 1),
        idt: table(IDT, 256 * 16 - 1),
        cr0: 0x8001_0033,
        cr3: PML4,
        cr4: 0x620,
        efer: 0xd01,
        ..vcpu.special_registers().unwrap()
    }
}

/// 64-bit mode in ring 3.
pub fn ring_3(vcpu: &dyn Vcpu) -> SpecialRegisters {
    let mut special = ring_0(vcpu);
    special.cs.selector = USER_CS;
    special.cs.dpl = 3;
    for segment in [
        &mut special.ss,
        &mut special.ds,
        &mut special.es,
        &mut special.fs,
        &mut special.gs,
    ] {
        segment.selector = USER_SS;
        segment.dpl = 3;
    }
    special
}

/// An MSR's number and value.
pub fn msr(index: u32, data: u64) -> MsrEntry {
    MsrEntry {
        index,
        data,
        ..Default::default()
    }
}
