/*
 * The loops that are measured: the access, one instruction that keeps the index or the sum, and
 * the branch. They read the clock themselves. So both readings are taken in the ring that is
 * measured, and the way into the ring and back is not measured.
 *
 * RDI = job. In the loop: RDX = where, RCX = how many are left, RAX = the index to be written
 * or the value read (a narrow access leaves its upper bytes zero), RSI = the sum.
 */
#include "job.h"

        .macro  CLOCK
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        .endm

        .macro  REPEAT name, account, access:vararg
        .globl  \name
        .balign 64
\name:
        CLOCK
        mov     %rax, %r8
        mov     JOB_WHERE(%rdi), %rdx
        mov     JOB_COUNT(%rdi), %rcx
        xor     %eax, %eax
        xor     %esi, %esi
1:      \access
        \account
        loop    1b
        mov     %rsi, JOB_SUM(%rdi)
        CLOCK
        sub     %r8, %rax
        mov     %rax, JOB_CYCLES(%rdi)
        ret
        .endm

        .text
        REPEAT  out_1, "inc %rax", out %al, (%dx)
        REPEAT  out_2, "inc %rax", out %ax, (%dx)
        REPEAT  out_4, "inc %rax", out %eax, (%dx)

        REPEAT  in_1, "add %rax, %rsi", in (%dx), %al
        REPEAT  in_2, "add %rax, %rsi", in (%dx), %ax
        REPEAT  in_4, "add %rax, %rsi", in (%dx), %eax

        REPEAT  store_1, "inc %rax", mov %al, (%rdx)
        REPEAT  store_2, "inc %rax", mov %ax, (%rdx)
        REPEAT  store_4, "inc %rax", mov %eax, (%rdx)
        REPEAT  store_8, "inc %rax", mov %rax, (%rdx)

        REPEAT  load_1, "add %rax, %rsi", mov (%rdx), %al
        REPEAT  load_2, "add %rax, %rsi", mov (%rdx), %ax
        REPEAT  load_4, "add %rax, %rsi", mov (%rdx), %eax
        REPEAT  load_8, "add %rax, %rsi", mov (%rdx), %rax

        .section .note.GNU-stack, "", @progbits
