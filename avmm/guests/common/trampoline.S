/*
 * The first instructions of an application processor.
 *
 * A SIPI starts it in real mode at a page below 1 MiB, so smp.c copies this there. It needs only a
 * GDT to enter 32-bit mode and continue in start.S. The copy has its own pointer to the GDT,
 * because real mode cannot reach the pointer at 1 MiB.
 */
#include "layout.h"

        .section .rodata.trampoline, "a"
        .globl  trampoline, trampoline_end
        .code16
trampoline:
        cli
        lgdtl   %cs:low_gdt_pointer - trampoline
        mov     $0x11, %eax             /* PE, ET */
        mov     %eax, %cr0
        ljmpl   $KERNEL_CODE32, $ap_entry

low_gdt_pointer:
        .word   0xffff
        .long   gdt
trampoline_end:

        .section .note.GNU-stack, "", @progbits
