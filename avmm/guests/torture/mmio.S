/*
 * All instructions except strings with one operand in the device's memory, within a page.
 */
#include "shape.h"

        SHAPES  mmio_shapes
        WRITE   mov %bl, DEVICE(0x400)
        WRITE   mov %bx, DEVICE(0x402)
        WRITE   mov %ebx, DEVICE(0x404)
        WRITE   mov %rbx, DEVICE(0x408)
        WRITE   movw $0x1234, DEVICE(0x410)
        WRITE   movq $-2, DEVICE(0x418)

        READ    mov DEVICE(0x400), %al
        READ    mov DEVICE(0x401), %ah
        READ    mov DEVICE(0x402), %ax
        READ    mov DEVICE(0x404), %eax
        READ    mov DEVICE(0x408), %rax

        READ    movzbl DEVICE(0x420), %eax
        READ    movzwl DEVICE(0x422), %eax
        READ    movsbq DEVICE(0x424), %rax
        READ    movswl DEVICE(0x426), %eax
        READ    movslq DEVICE(0x428), %rax

        /* Unaligned. */
        WRITE   mov %ebx, DEVICE(0x433)
        WRITE   mov %rbx, DEVICE(0x43b)
        READ    mov DEVICE(0x433), %eax
        READ    mov DEVICE(0x43b), %rax

        /* Read, change, write. */
        FLAGS   incb DEVICE(0x450)
        FLAGS   decq DEVICE(0x458)
        FLAGS   add %ebx, DEVICE(0x460)
        WRITE   orw $0x0180, DEVICE(0x470)      /* leaves AF undefined */
        WRITE   notb DEVICE(0x472)              /* changes no flags */
        FLAGS   negl DEVICE(0x474)

        /* KVM ignores the lock prefix for a device's memory, and notes that in the host's log. */
        EXCHANGE xchg %eax, DEVICE(0x480)
        EXCHANGE xchg %rax, DEVICE(0x488)
        FLAGS   lock incl DEVICE(0x490)
        FLAGS   lock addw $0x4321, DEVICE(0x494)
        EXCHANGE lock xadd %rax, DEVICE(0x498)
        READ    lock cmpxchg %ebx, DEVICE(0x4a0)

        /* Reads whose value goes elsewhere, or is used in a computation. */
        push    DEVICE(0x4b0)
        READ    pop %rax
        push    %rbx
        WRITE   pop DEVICE(0x4b8)
        FLAGS   cmp DEVICE(0x4c0), %ebx
        testw   $0x0210, DEVICE(0x4c6)          /* leaves AF undefined */
        setz    %al
        READ    setp %ah
        READ    imul $0x4321, DEVICE(0x4c8), %rax
        READ    sub DEVICE(0x4d0), %rax
        END_SHAPES

        .section .note.GNU-stack, "", @progbits
