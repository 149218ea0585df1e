//! CPL 3: a task state segment, the way in and out, and SYSCALL (Intel SDM vol. 3, 5.8.8 and 7.7).
//!
//! The way back is an undefined instruction, as software interrupts from CPL 3 aren't to be had everywhere.

use core::arch::asm;

use super::{rdmsr, wrmsr};

#[repr(C, packed(4))]
struct Tss {
    reserved: u32,
    rsp0: u64,
    rest: [u32; 22],
    io_map: u32,
    /// A clear bit opens a port; the byte past the end is all ones, as the manual wants it.
    ports: [u8; 8193],
}

#[repr(align(16))]
struct Stack(#[expect(dead_code, reason = "only its address is used")] [u8; 65536]);

unsafe extern "C" {
    static mut gdt_tss: [u64; 2];
    static user_done: u8;
    fn enter_user(function: u64, argument: u64, stack: u64, rsp0: *mut u64) -> u64;
    fn leave_user(value: u64) -> !;
    fn syscall_entry();
    /// SYSCALL with an argument: the low half is the argument plus one, the high half the CS that the handler saw.
    fn user_syscall(argument: u64) -> u64;
}

/// What is at address 0 is here too, for CPL 0 alone (see `boot.s`).
const KERNEL_BASE: u64 = 512 << 30;

static mut TSS: Tss = Tss {
    reserved: 0,
    rsp0: 0,
    rest: [0; 22],
    io_map: 104 << 16,
    ports: {
        let mut ports = [0; 8193];
        ports[8192] = 0xff;
        ports
    },
};
static mut STACK: Stack = Stack([0; 65536]);

/// Loads the TSS and sets up SYSCALL on the boot processor.
pub fn init() {
    let base = &raw const TSS as u64;
    let limit = size_of::<Tss>() as u64 - 1;
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    // SAFETY: only the boot processor runs, and the descriptor isn't in use yet.
    unsafe {
        (&raw mut gdt_tss).write_volatile([low, base >> 32]);
        asm!("ltr {:x}", in(reg) 0x30u16, options(nostack));
    }
    wrmsr(0xc000_0080, rdmsr(0xc000_0080) | 1);
    wrmsr(0xc000_0081, 0x1b << 48 | 0x08 << 32);
    // As in any kernel, the entry point is none of user code's.
    wrmsr(0xc000_0082, KERNEL_BASE + syscall_entry as *const () as u64);
    wrmsr(0xc000_0084, 0x200);
}

/// Address of the instruction that ends a run at CPL 3.
pub fn done_address() -> u64 {
    &raw const user_done as u64
}

/// Ends the run at CPL 3 with `value`; called by the exception handler.
pub fn leave(value: u64) -> ! {
    // SAFETY: the handler saw the end of a run, so `enter_user` is waiting.
    unsafe { leave_user(value) }
}

/// Runs `function(argument)` at CPL 3, natively, with all ports (by IOPL 3, and by the TSS where a KVM loses IOPL) and
/// all memory open to it.
pub fn run(function: extern "C" fn(u64) -> u64, argument: u64) -> u64 {
    // SAFETY: one run at a time, on the boot processor; the stack is big enough for the tests given here.
    unsafe {
        let top = &raw const STACK as u64 + 65536;
        enter_user(
            function as *const () as u64,
            argument,
            top,
            &raw mut TSS.rsp0,
        )
    }
}

/// One SYSCALL from CPL 3; low half of the answer is the argument plus one, high half the handler's CS.
pub fn syscall(argument: u64) -> u64 {
    extern "C" fn body(argument: u64) -> u64 {
        // SAFETY: `init` has set the SYSCALL registers up.
        unsafe { user_syscall(argument) }
    }
    run(body, argument)
}
