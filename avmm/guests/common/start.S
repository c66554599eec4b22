/*
 * Leads from any state in which a loader enters the guest to C in long mode.
 *
 * There are three entries, which all lead to the same place. A PVH loader enters at pvh_entry in
 * flat 32-bit mode with EBX = hvm_start_info. A loader of plain 64-bit ELF files enters at
 * long_mode_entry with RDI = hvm_start_info, or 0. An application processor comes through ap_entry
 * (trampoline.S). All end in in_long_mode, with our GDT and our page tables, on the stack and in
 * the function that boot_stack and boot_main name at that moment.
 */
#include "layout.h"

#define CR0             0x80000031      /* PG, NE, ET, PE */
#define CR4             0x00000020      /* PAE and nothing else: SMEP and SMAP would forbid
                                           ring 0 to touch our pages, which are all user pages */
#define MSR_EFER        0xc0000080
#define EFER_LME        0x100

#define PAGE_TABLE      0x007           /* present, writable, user */
#define PAGE_2M         0x0e7           /* the same, accessed, dirty, 2 MiB */

        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 8, 18                /* sizes of name and value; XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .quad   pvh_entry

        .section .text.start, "ax"
        .code32
        .globl  pvh_entry, ap_entry
ap_entry:
        mov     $KERNEL_DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %ebx, %ebx
pvh_entry:
        cli
        cld
        lgdt    gdt_pointer
        mov     $CR4, %eax
        mov     %eax, %cr4
        mov     $page_root, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     $CR0, %eax
        mov     %eax, %cr0
        ljmp    $KERNEL_CODE, $in_long_mode

        .code64
        .globl  long_mode_entry
long_mode_entry:
        cli
        cld
        mov     %edi, %ebx
        mov     boot_stack, %rsp
        mov     $CR4, %eax              /* before CR3: see CR4 above */
        mov     %rax, %cr4
        mov     $page_root, %eax
        mov     %rax, %cr3
        lgdt    gdt_pointer
        push    $KERNEL_CODE
        push    $in_long_mode
        lretq

in_long_mode:
        mov     $KERNEL_DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     boot_stack, %rsp
        mov     %ebx, %edi
        call    *boot_main
1:      cli
        hlt
        jmp     1b

        .data
        .balign 8
        .globl  boot_stack, boot_main, gdt, gdt_pointer
boot_stack:
        .quad   stack_top
boot_main:
        .quad   guest_main

gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* KERNEL_CODE32 */
        .quad   0x00af9b000000ffff      /* KERNEL_CODE */
        .quad   0x00cf93000000ffff      /* KERNEL_DATA */
        .quad   0x00cff3000000ffff      /* USER_DATA */
        .quad   0x00affb000000ffff      /* USER_CODE */
        .quad   0, 0                    /* TASK_STATE, filled in by trap.c */
gdt_pointer:
        .word   . - gdt - 1
        .quad   gdt

/*
 * The first 4 GiB, mapped one to one and open to ring 3. The assembler builds the tables, because
 * on a host that interprets ring 0, a loop over 2048 entries would visibly delay the boot.
 */
        .balign 4096
page_root:
        .quad   page_directories + PAGE_TABLE
        .fill   511, 8, 0
page_directories:
        .set    gib, 0
        .rept   4
        .quad   page_tables + gib * 4096 + PAGE_TABLE
        .set    gib, gib + 1
        .endr
        .fill   508, 8, 0
page_tables:
        .set    page, 0
        .rept   4 * 512
        .quad   page * 0x200000 + PAGE_2M
        .set    page, page + 1
        .endr

        .bss
        .balign 16
        .fill   8192
stack_top:

        .section .note.GNU-stack, "", @progbits
