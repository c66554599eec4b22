#include "shape.h"

        .text
        .globl  stir
stir:                                   /* RSI = where, RCX = how many words */
        mov     %rsi, %rdi
1:      lodsq
        MIX     %rax
        mov     %rbx, %rax
        stosq
        loop    1b
        STEP                            /* because RAX is the sum: see TAKE_SUM */
        ret

        .section .note.GNU-stack, "", @progbits
