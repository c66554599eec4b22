/*
 * How the lists of shapes are written: one line a shape, which does the access and lets what
 * came of it into the sum. No branch depends on what a device answers.
 *
 * RBX = the sum, RBP = the device's window, R12 = RAM, R13 = the first port, R14 = the window.
 * RAX is whatever the shape before has left there, on purpose: a load that changes more of it
 * than it should shows.
 */
#include "window.h"

#define DEVICE(offset)  (offset)(%rbp)
#define RAM(offset)     (offset)(%r12)

/* Where strings in RAM begin; and page borders in both windows. */
#define STRING          0x100
#define BORDER          0x1000

        .macro  SHAPES name
        .text
        .globl  \name
\name:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        mov     %rdi, %r14
        mov     WINDOW_SUM(%r14), %rbx
        mov     WINDOW_DEVICE(%r14), %rbp
        mov     WINDOW_RAM(%r14), %r12
        mov     WINDOW_PORTS(%r14), %r13
        TAKE_SUM
        .endm

        .macro  END_SHAPES
        mov     %rbx, WINDOW_SUM(%r14)
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret
        .endm

/* Both are reversible, so a difference that once is in the sum never leaves it. */
        .macro  STEP
        imul    $0x5bd1e995, %rbx, %rbx
        rol     $29, %rbx
        .endm

        .macro  MIX     what
        xor     \what, %rbx
        STEP
        .endm

/*
 * RAX = the sum, to be written somewhere. The sum goes on, or it would be 0 when they meet
 * again in MIX %rax, and all that was in it would be lost.
 */
        .macro  TAKE_SUM
        mov     %rbx, %rax
        STEP
        .endm

/* Loads, and whatever else ends in RAX. */
        .macro  READ    access:vararg
        \access
        MIX     %rax
        .endm

/* Stores, as a rule of the sum. */
        .macro  WRITE   access:vararg
        \access
        STEP
        .endm

/* Stores RAX and loads all of it. */
        .macro  EXCHANGE access:vararg
        TAKE_SUM
        READ    \access
        .endm

/* What ends in the arithmetic flags, all of them. */
        .macro  FLAGS   access:vararg
        \access
        pushfq
        pop     %rax
        MIX     %rax
        .endm

        .macro  READ_PORT port, access:vararg
        lea     \port(%r13), %edx
        READ    \access
        .endm

        .macro  WRITE_PORT port, access:vararg
        lea     \port(%r13), %edx
        TAKE_SUM
        \access
        .endm

/*
 * String instructions: `count` of them where there is a REP, from RSI, to RDI; what they leave
 * in RAX, RCX, RSI and RDI counts.
 */
        .macro  STRING_UP count, from, to, access:vararg
        lea     \from, %rsi
        lea     \to, %rdi
        mov     $\count, %ecx
        \access
        MIX     %rax
        MIX     %rcx
        MIX     %rsi
        MIX     %rdi
        .endm

        .macro  STRING_DOWN count, from, to, access:vararg
        std
        STRING_UP \count, \from, \to, \access
        cld
        .endm

/*
 * Takes `count` words of 8 bytes of RAM into the sum and puts the sum in their place: what a
 * string access has read counts, and what the next one writes depends on all before.
 */
        .macro  STIR    where, count
        lea     \where, %rsi
        mov     $\count, %ecx
        call    stir
        .endm
