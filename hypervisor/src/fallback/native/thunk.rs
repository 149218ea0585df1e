//! The one place where an instruction of the guest's runs on the host.
//!
//! A process has one thunk: a memory file with a code page, which is mapped twice (once to write,
//! once to execute, never both in one mapping), and a data page next to the executable mapping, to
//! which the instruction's memory operand is redirected. [`run`] loads the general registers except
//! RSP, the status flags and, if asked, the vector state; calls the code page; and saves all that
//! back. What may be run is decided by the caller; see the parent module.
#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::ffi::c_void;
use std::mem::offset_of;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Bytes that the instruction may use at its memory operand.
pub(super) const OPERAND: usize = 512;
/// Room for the instruction and the RET behind it.
pub(super) const CODE: usize = 32;
/// Size of an XSAVE image that the thunk loads and saves.
pub(super) const IMAGE: usize = 4096;

const PAGE: usize = 4096;
const RET: u8 = 0xc3;
const INT3: u8 = 0xcc;

#[repr(C, align(64))]
struct Image([u8; IMAGE]);

/// General registers in the order RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8 to R15.
pub(super) type General = [u64; 15];

/// What the assembly reads and writes.
#[repr(C, align(64))]
struct Context {
    guest: Image,
    host: Image,
    general: General,
    flags: u64,
    /// Components to swap; 0 for none.
    mask: u64,
    code: *const c_void,
}

/// What a run starts from and ends with.
pub(super) struct State<'a> {
    /// General registers.
    pub(super) general: General,
    /// Status flags (CF, PF, AF, ZF, SF, OF), nothing else.
    pub(super) flags: u64,
    /// XSAVE image in the host's standard format, if the instruction uses vector or x87 state.
    pub(super) image: Option<&'a mut [u8; IMAGE]>,
    /// The copy of the memory operand.
    pub(super) operand: &'a mut [u8],
}

struct Thunk {
    /// Writable mapping of the code page.
    write: *mut u8,
    /// Executable mapping of it.
    code: *const u8,
    /// The page behind `code`.
    data: *mut u8,
    context: Box<Context>,
}

// SAFETY: the pointers are to mappings of the process that live as long as it, and the thunk is
// only used under the mutex below.
unsafe impl Send for Thunk {}

static THUNK: OnceLock<Result<Mutex<Thunk>, String>> = OnceLock::new();

fn thunk() -> Result<&'static Mutex<Thunk>, String> {
    THUNK
        .get_or_init(|| Thunk::new().map(Mutex::new))
        .as_ref()
        .map_err(Clone::clone)
}

/// Makes the thunk, unless it is there already: a memory file and two mappings.
///
/// # Errors
///
/// A sentence, when the system refuses.
pub(super) fn prepare() -> Result<(), String> {
    thunk().map(drop)
}

/// The address that the code is run at and the one of its operand.
pub(super) fn addresses() -> Result<(u64, u64), String> {
    let thunk = thunk()?.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((thunk.code as u64, thunk.data as u64))
}

/// Components that the thunk can swap: those of x87, SSE, AVX and AVX-512 that the host has.
pub(super) fn components() -> u64 {
    static COMPONENTS: OnceLock<u64> = OnceLock::new();
    *COMPONENTS.get_or_init(|| {
        let osxsave = __cpuid(1).ecx & (1 << 27) != 0;
        if !osxsave || __cpuid(0).eax < 0xd {
            return 0;
        }
        let enabled = __cpuid_count(0xd, 0);
        let mut bits = u64::from(enabled.eax) & 0xe7;
        for number in 2..8 {
            if place(number).is_none() {
                bits &= !(1 << number);
            }
        }
        bits
    })
}

/// Offset and size of component 2 to 7 in the host's standard format, if it fits the image.
pub(super) fn place(number: u32) -> Option<(usize, usize)> {
    static PLACES: OnceLock<[Option<(usize, usize)>; 8]> = OnceLock::new();
    let places = PLACES.get_or_init(|| {
        let mut places = [None; 8];
        for (number, place) in (0..).zip(&mut places).skip(2) {
            let leaf = __cpuid_count(0xd, number);
            let (offset, size) = (leaf.ebx as usize, leaf.eax as usize);
            *place = (size != 0 && offset + size <= IMAGE).then_some((offset, size));
        }
        places
    });
    places.get(number as usize).copied().flatten()
}

/// Runs `code`, one instruction that was encoded for [`addresses`].
///
/// # Safety
///
/// The instruction must neither fault, nor leave its place, nor use RSP or memory other than the
/// first [`OPERAND`] bytes at the data address, nor change any state of the processor other than
/// the general registers, the status flags and, if `state.image` is given, the components of
/// [`components`]. The image must be one that XRSTOR accepts for those.
pub(super) unsafe fn run(code: &[u8], state: &mut State<'_>) -> Result<(), String> {
    let mut thunk = thunk()?.lock().unwrap_or_else(PoisonError::into_inner);
    let thunk = &mut *thunk;
    if code.len() >= CODE || state.operand.len() > OPERAND {
        return Err("the instruction or its operand is too long".into());
    }
    let mut bytes = [INT3; CODE];
    bytes[..code.len()].copy_from_slice(code);
    bytes[code.len()] = RET;

    let context = &mut *thunk.context;
    context.general = state.general;
    context.flags = state.flags;
    context.mask = 0;
    context.code = thunk.code.cast();
    if let Some(image) = &state.image {
        context.mask = components();
        if context.mask == 0 {
            return Err("the host has no XSAVE".into());
        }
        context.guest.0 = **image;
    }
    // SAFETY: both pages are mapped writable, at least CODE and OPERAND bytes long, and nobody
    // else uses them while the mutex is held. The caller answers for the instruction; `enter`
    // restores all that the ABI wants restored.
    unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr(), thunk.write, CODE);
        ptr::copy_nonoverlapping(state.operand.as_ptr(), thunk.data, state.operand.len());
        enter(context);
        ptr::copy_nonoverlapping(thunk.data, state.operand.as_mut_ptr(), state.operand.len());
    }
    state.general = context.general;
    state.flags = context.flags;
    if let Some(image) = &mut state.image {
        **image = context.guest.0;
    }
    Ok(())
}

impl Thunk {
    fn new() -> Result<Self, String> {
        let failed = |what: &str| {
            format!(
                "{what} for the instruction thunk: {}",
                std::io::Error::last_os_error()
            )
        };
        // SAFETY: plain system calls on a new file and new mappings; the fixed mapping replaces
        // pages of the reservation that was just made.
        unsafe {
            let fd = libc::memfd_create(c"instruction-thunk".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(failed("memfd_create"));
            }
            let map = |fd, address: *mut c_void, size, protection, flags| {
                let at = libc::mmap(address, size, protection, flags, fd, 0);
                (at != libc::MAP_FAILED).then_some(at)
            };
            let read_write = libc::PROT_READ | libc::PROT_WRITE;
            let maps = || {
                if libc::ftruncate(fd, PAGE as libc::off_t) != 0 {
                    return None;
                }
                let write = map(fd, ptr::null_mut(), PAGE, read_write, libc::MAP_SHARED)?;
                let pair = map(
                    -1,
                    ptr::null_mut(),
                    2 * PAGE,
                    read_write,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                )?;
                let code = map(
                    fd,
                    pair,
                    PAGE,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                )?;
                Some((write, code))
            };
            let mapped = maps().ok_or_else(|| failed("mapping"));
            libc::close(fd);
            let (write, code) = mapped?;
            Ok(Self {
                write: write.cast(),
                code: code.cast_const().cast(),
                data: code.cast::<u8>().add(PAGE),
                context: Box::new(Context {
                    guest: Image([0; IMAGE]),
                    host: Image([0; IMAGE]),
                    general: [0; 15],
                    flags: 0,
                    mask: 0,
                    code: ptr::null(),
                }),
            })
        }
    }
}

/// Swaps state, calls `context.code`, swaps back.
///
/// # Safety
///
/// See [`run`]; `context` must be exclusively the callee's.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter(context: *mut Context) {
    std::arch::naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        // The code was written through another mapping: IRETQ, which serialises, before it runs.
        "mov rax, rsp",
        "mov ecx, ss",
        "push rcx",
        "push rax",
        "pushfq",
        "mov ecx, cs",
        "push rcx",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2:",
        "push qword ptr [rdi + {code}]",
        "push rdi",
        // Vector state.
        "mov rax, [rdi + {mask}]",
        "test rax, rax",
        "jz 3f",
        "xor edx, edx",
        "xsave64 [rdi + {host}]",
        "xrstor64 [rdi + {guest}]",
        "3:",
        "push qword ptr [rdi + {flags}]",
        "popfq",
        "mov rax, [rdi + {general} + 0]",
        "mov rbx, [rdi + {general} + 8]",
        "mov rcx, [rdi + {general} + 16]",
        "mov rdx, [rdi + {general} + 24]",
        "mov rsi, [rdi + {general} + 32]",
        "mov rbp, [rdi + {general} + 48]",
        "mov r8, [rdi + {general} + 56]",
        "mov r9, [rdi + {general} + 64]",
        "mov r10, [rdi + {general} + 72]",
        "mov r11, [rdi + {general} + 80]",
        "mov r12, [rdi + {general} + 88]",
        "mov r13, [rdi + {general} + 96]",
        "mov r14, [rdi + {general} + 104]",
        "mov r15, [rdi + {general} + 112]",
        "mov rdi, [rdi + {general} + 40]",
        "call [rsp + 8]",
        // On the stack: context, code. None of the moves and pushes changes a flag.
        "push rdi",
        "mov rdi, [rsp + 8]",
        "pop [rdi + {general} + 40]",
        "pushfq",
        "pop [rdi + {flags}]",
        "mov [rdi + {general} + 0], rax",
        "mov [rdi + {general} + 8], rbx",
        "mov [rdi + {general} + 16], rcx",
        "mov [rdi + {general} + 24], rdx",
        "mov [rdi + {general} + 32], rsi",
        "mov [rdi + {general} + 48], rbp",
        "mov [rdi + {general} + 56], r8",
        "mov [rdi + {general} + 64], r9",
        "mov [rdi + {general} + 72], r10",
        "mov [rdi + {general} + 80], r11",
        "mov [rdi + {general} + 88], r12",
        "mov [rdi + {general} + 96], r13",
        "mov [rdi + {general} + 104], r14",
        "mov [rdi + {general} + 112], r15",
        "mov rax, [rdi + {mask}]",
        "test rax, rax",
        "jz 4f",
        "xor edx, edx",
        "xsave64 [rdi + {guest}]",
        "xrstor64 [rdi + {host}]",
        "4:",
        "add rsp, 16",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        code = const offset_of!(Context, code),
        mask = const offset_of!(Context, mask),
        host = const offset_of!(Context, host),
        guest = const offset_of!(Context, guest),
        flags = const offset_of!(Context, flags),
        general = const offset_of!(Context, general),
    )
}
