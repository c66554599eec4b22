/*
 * Accesses across the border of two pages. Each causes at least two exits, and the instruction is
 * done only after the last one.
 */
#include "shape.h"

        SHAPES  straddle_shapes
        .irp    low, 1, 2, 3, 4, 5, 6, 7        /* bytes on the lower page */
        WRITE   mov %rbx, DEVICE(BORDER - \low)
        READ    mov DEVICE(BORDER - \low), %rax
        .endr

        .irp    low, 1, 2
        WRITE   mov %ebx, DEVICE(2 * BORDER - \low)
        READ    mov DEVICE(2 * BORDER - \low), %eax
        .endr

        WRITE   mov %bx, DEVICE(3 * BORDER - 1)
        READ    mov DEVICE(3 * BORDER - 1), %ax

        FLAGS   add %rbx, DEVICE(4 * BORDER - 3)
        EXCHANGE lock xadd %eax, DEVICE(4 * BORDER - 2)
        push    DEVICE(5 * BORDER - 5)
        READ    pop %rax
        push    %rbx
        WRITE   pop DEVICE(5 * BORDER - 2)
        END_SHAPES

        .section .note.GNU-stack, "", @progbits
