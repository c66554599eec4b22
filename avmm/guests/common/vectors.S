/*
 * Leads from an interrupt or exception to trap() in trap.c. A stub of 16 bytes for each vector
 * makes all frames alike (some exceptions push an error code, most do not). Only the registers
 * that C may change are saved: here a push can cost 0.7 us.
 */
#include "layout.h"

        .text
        .balign 16
        .globl  vectors
vectors:
        .set    vector, 0
        .rept   VECTORS
        .balign 16
        /* 8, 10..14, 17, 21, 29 and 30 come with an error code */
        .if     !((0x60227d00 >> vector) & 1) || vector > 31
        push    $0
        .endif
        push    $vector
        jmp     enter
        .set    vector, vector + 1
        .endr

enter:
        cld
        push    %rax
        push    %rcx
        push    %rdx
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        mov     %rsp, %rdi
        call    trap
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rdx
        pop     %rcx
        pop     %rax
        add     $16, %rsp               /* vector and error code */
        iretq

        .section .note.GNU-stack, "", @progbits
