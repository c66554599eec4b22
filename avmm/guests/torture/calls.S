/*
 * Exits that are not accesses to ports or memory: MSRs and hypercalls.
 */
#include "shape.h"

#define HC_MAP_GPA_RANGE 12

        .macro  READ_MSR
        rdmsr
        MIX     %rax
        MIX     %rdx
        .endm

        SHAPES  msr_shapes
        mov     WINDOW_MSR(%r14), %ecx
        READ_MSR
        mov     %ebx, %eax
        mov     %rbx, %rdx
        shr     $32, %rdx
        WRITE   wrmsr
        READ_MSR
        END_SHAPES

/*
 * "This page of RAM is not encrypted", which is true anyway. KVM may pass this call on to the VMM.
 */
        .macro  HYPERCALL instruction
        mov     %rbx, %r13
        mov     $HC_MAP_GPA_RANGE, %eax
        lea     RAM(BORDER), %rbx
        mov     $1, %ecx                /* page */
        xor     %edx, %edx              /* attributes */
        \instruction
        mov     %r13, %rbx
        MIX     %rax
        .endm

        SHAPES  vmcall_shape            /* Intel's */
        HYPERCALL vmcall
        END_SHAPES

        SHAPES  vmmcall_shape           /* AMD's */
        HYPERCALL vmmcall
        END_SHAPES

        .section .note.GNU-stack, "", @progbits
