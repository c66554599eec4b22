/*
 * How the lists of shapes are written. Each shape is one line, which does the access and mixes its
 * result into the sum. No branch depends on what a device answers.
 *
 * RBX = the sum, RBP = the device's window, R12 = RAM, R13 = the first port, R14 = the window. RAX
 * deliberately keeps what the shape before left there, so that a load which changes too much of it
 * shows.
 */
#include "window.h"

#define DEVICE(offset)  (offset)(%rbp)
#define RAM(offset)     (offset)(%r12)

/* Where strings in RAM begin, and where the page borders are in both windows. */
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

/* Both operations are reversible, so a difference in the sum never disappears again. */
        .macro  STEP
        imul    $0x5bd1e995, %rbx, %rbx
        rol     $29, %rbx
        .endm

        .macro  MIX     what
        xor     \what, %rbx
        STEP
        .endm

/*
 * RAX = the sum, to be written somewhere. Then the sum is changed, because MIX %rax would
 * otherwise combine two equal values into 0, and everything that was in the sum would be lost.
 */
        .macro  TAKE_SUM
        mov     %rbx, %rax
        STEP
        .endm

/* Loads, and everything else whose result is in RAX. */
        .macro  READ    access:vararg
        \access
        MIX     %rax
        .endm

/* Stores, which usually write the sum. */
        .macro  WRITE   access:vararg
        \access
        STEP
        .endm

/* Stores RAX, and loads all of its bytes again. */
        .macro  EXCHANGE access:vararg
        TAKE_SUM
        READ    \access
        .endm

/* Instructions whose result is in the arithmetic flags. All flags count. */
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
 * String instructions from RSI to RDI, repeated `count` times with a REP. What they leave in RAX,
 * RCX, RSI and RDI is added to the sum.
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
 * Adds `count` words of 8 bytes of RAM to the sum, and puts the sum in their place. So what a
 * string access has read counts, and what the next one writes depends on everything before it.
 */
        .macro  STIR    where, count
        lea     \where, %rsi
        mov     $\count, %ecx
        call    stir
        .endm
