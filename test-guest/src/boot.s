# Entry points, page tables and the processor start-up path.

.section .head, "ax"
.code32
head:                       # the 32-bit Linux protocol is not one of ours
    cli
1:  hlt
    jmp 1b

.org 0x200
.code64
.globl start64
start64:                    # 64-bit Linux protocol: RSI holds the zero page
    cli
    cld
    movq %rsi, entry_block+8(%rip)
    lea boot_stack_top(%rip), %rsp
    pushfq
    popq %rax
    movq %rax, entry_block+16(%rip)
    movq %cr0, %rax
    movq %rax, entry_block+24(%rip)
    movq %cr4, %rax
    movq %rax, entry_block+32(%rip)
    xorl %eax, %eax
    movw %cs, %ax
    movq %rax, entry_block+40(%rip)
    movw %ds, %ax
    movq %rax, entry_block+48(%rip)
    movw %ss, %ax
    movq %rax, entry_block+56(%rip)
    movl $0xc0000080, %ecx
    rdmsr
    movl %eax, entry_block+64(%rip)
    movq $2, entry_block(%rip)
    movq %cr4, %rax
    orq $0x620, %rax
    movq %rax, %cr4
    lea pml4(%rip), %rcx
    testl $0x1000, %eax     # five levels: put one table above ours
    jz 1f
    lea pml5(%rip), %rcx
1:  movq %rcx, %cr3
    movl %ecx, cr3_value(%rip)
    movl %eax, cr4_value(%rip)
    lgdt gdt_pointer(%rip)
    pushq $0x08
    lea common64(%rip), %rax
    pushq %rax
    lretq

.code32
.globl start32
start32:                    # PVH: EBX holds the start info, paging is off
    cli
    cld
    movl %ebx, entry_block+8
    movl $boot_stack_top, %esp
    pushfl
    popl %eax
    movl %eax, entry_block+16
    movl %cr0, %eax
    movl %eax, entry_block+24
    movl %cr4, %eax
    movl %eax, entry_block+32
    xorl %eax, %eax
    movw %cs, %ax
    movl %eax, entry_block+40
    movw %ds, %ax
    movl %eax, entry_block+48
    movw %ss, %ax
    movl %eax, entry_block+56
    movl $1, entry_block
    lgdt gdt_pointer
    movl $0x620, cr4_value
    movl $pml4, cr3_value
long_mode:
    movl cr4_value, %eax
    movl %eax, %cr4
    movl cr3_value, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax  # PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmp $0x08, $common64

.code64
common64:
    movl $0x10, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movq %cr0, %rax
    andq $~0xc, %rax        # no emulation, no task-switched trap
    orq $0x2, %rax
    movq %rax, %cr0
    movl $1, %eax
    lock xaddl %eax, cpus_started(%rip)
    testl %eax, %eax
    jnz 2f
    lea boot_stack_top(%rip), %rsp
    xorl %ebp, %ebp
    call guest_main
1:  hlt
    jmp 1b
2:  movl %eax, %edi         # an application processor: number from 1
    shll $13, %eax
    lea ap_stacks(%rip), %rsp
    addq %rax, %rsp
    xorl %ebp, %ebp
    call ap_main
3:  hlt
    jmp 3b

# Copied to 0x1000; a start-up IPI with vector 1 begins here in real mode.
.code16
.globl trampoline
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt - trampoline
    movl %cr0, %eax
    andl $0x9fffffff, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $ap32
.align 4
trampoline_gdt:
    .word 63
    .long gdt
.globl trampoline_end
trampoline_end:

.code32
ap32:
    movl $0x10, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    jmp long_mode
.code64

.section .note.Xen, "a", @note
    .long 4, 8, 18          # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start32

# Identity map of 16 GiB with 2 MiB pages, open to CPL 3, and once more from 512 GiB on for CPL 0
# alone. `map.rs` adds a window at 1 TiB.
.section .tables, "aw"
.balign 4096
.globl pml4
pml4:
    .quad pdpt + 7
    .quad pdpt + 3
    .fill 510, 8, 0
pml5:
    .quad pml4 + 7
    .fill 511, 8, 0
pdpt:
    .set n, 0
    .rept 16
    .quad pds + n * 4096 + 7
    .set n, n + 1
    .endr
    .fill 496, 8, 0
pds:
    .set n, 0
    .rept 16 * 512
    .quad n * 0x200000 + 0x87
    .set n, n + 1
    .endr

.balign 16
.globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff # 08 code, 64-bit, CPL 0
    .quad 0x00cf93000000ffff # 10 data, CPL 0
    .quad 0x00cf9b000000ffff # 18 code, 32-bit, CPL 0
    .quad 0x00cff3000000ffff # 20 data, CPL 3
    .quad 0x00affb000000ffff # 28 code, 64-bit, CPL 3
.globl gdt_tss
gdt_tss:
    .quad 0, 0               # 30 TSS, filled in at run time
gdt_pointer:
    .word 63
    .quad gdt
cr3_value: .long 0
cr4_value: .long 0
.globl cpus_started
cpus_started: .long 0
.balign 8
.globl entry_block
entry_block: .fill 9, 8, 0

.section .bss
.balign 16
    .skip 32768
boot_stack_top:
.balign 4096
ap_stacks:                  # 8 KiB each, for up to 253 further processors
    .skip 254 * 8192
.text
