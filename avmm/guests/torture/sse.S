/*
 * Accesses of 16 bytes, which leave KVM in parts of at most 8.
 *
 * The registers are loaded from RAM and stored to RAM, because a host that interprets ring 0 may
 * not know moves between them and the general registers.
 */
#include "shape.h"

#define CR0_EM          0x4
#define CR4_OSFXSR      0x200

        .text
        .globl  enable_sse
enable_sse:
        mov     %cr0, %rax
        and     $~CR0_EM, %rax
        mov     %rax, %cr0
        mov     %cr4, %rax
        or      $CR4_OSFXSR, %rax
        mov     %rax, %cr4
        ret

        SHAPES  sse_shapes
        STIR    RAM(STRING), 4
        movups  RAM(STRING), %xmm0
        movups  RAM(STRING + 16), %xmm1
        WRITE   movups %xmm0, DEVICE(0x600)
        WRITE   movaps %xmm1, DEVICE(0x610)
        WRITE   movdqu %xmm0, DEVICE(0x624)     /* unaligned */
        WRITE   movntdq %xmm1, DEVICE(0x640)
        WRITE   movups %xmm0, DEVICE(BORDER - 5)
        WRITE   movups %xmm1, DEVICE(2 * BORDER - 8)

        movups  DEVICE(0x600), %xmm0
        movaps  DEVICE(0x610), %xmm1
        movups  %xmm0, RAM(STRING)
        movups  %xmm1, RAM(STRING + 16)
        STIR    RAM(STRING), 4
        movups  DEVICE(BORDER - 11), %xmm0
        movdqu  DEVICE(2 * BORDER - 8), %xmm1
        movups  %xmm0, RAM(STRING)
        movups  %xmm1, RAM(STRING + 16)
        STIR    RAM(STRING), 4
        END_SHAPES

        .section .note.GNU-stack, "", @progbits
