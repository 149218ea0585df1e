# Interrupt stubs, and the way into and out of CPL 3.

.text
.balign 16
.globl vector_stubs
vector_stubs:               # 64 stubs of 16 bytes
.set n, 0
.rept 64
    .balign 16
    .if (n == 8) || (n == 10) || (n == 11) || (n == 12) || (n == 13) || (n == 14) || (n == 17) || (n == 21) || (n == 29) || (n == 30)
    .else
    pushq $0
    .endif
    pushq $n
    jmp vector_common
    .set n, n + 1
.endr
.balign 16

vector_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    movq %rsp, %rbp
    andq $-16, %rsp
    call on_vector
    movq %rbp, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

# extern "C" fn enter_user(function, argument, stack_top, &mut rsp0) -> u64
.globl enter_user
enter_user:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushfq
    movq %rsp, user_return_stack(%rip)
    movq %rsp, (%rcx)
    movq %rdi, %rax
    movq %rsi, %rdi
    pushq $0x23
    pushq %rdx
    pushq $0x3202           # IOPL 3, interrupts on
    pushq $0x2b
    lea user_start(%rip), %rdx
    pushq %rdx
    iretq
user_start:
    call *%rax
.globl user_done
user_done:                  # the #UD handler sees this address and calls leave_user
    ud2

# extern "C" fn leave_user(value) -> !: back to whoever called enter_user
.globl leave_user
leave_user:
    movq user_return_stack(%rip), %rsp
    movq %rdi, %rax
    movl $0x10, %ecx
    movw %cx, %ss
    popfq
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

# SYSCALL target: answers RDI + 1 with the CPL seen at entry in RDX.
.globl syscall_entry
syscall_entry:
    movq %rsp, syscall_user_stack(%rip)
    movl %cs, %edx
    leaq 1(%rdi), %rax
    sysretq

# extern "C" fn user_syscall(argument) -> u64, at CPL 3
.globl user_syscall
user_syscall:
    syscall
    shlq $32, %rdx
    orq %rdx, %rax
    ret

.bss
.balign 8
user_return_stack: .skip 8
syscall_user_stack: .skip 8
.text
