/*
 * An excursion to ring 3 and back.
 *
 * The way out is IRETQ. The way back is a deliberate fault: the function returns to ring3_done,
 * whose UD2 traps, and trap() continues at ring3_return in ring 0. That is the only way that works
 * on every host, because on some hosts SYSCALL and INT from ring 3 do not arrive in ring 0. Any
 * other fault leads there too, but with another result in RAX. Interrupts taken in between use the
 * stack below our own frame.
 */
#include "layout.h"

#define RFLAGS_IOPL3    0x3000

        .text
        .globl  ring3_call, ring3_done, ring3_return
ring3_call:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, ring3_kernel_stack
        mov     %rsp, task_state + 4    /* RSP0 */

        mov     %rdi, %rcx
        mov     %rsi, %rdi
        mov     $ring3_stack_top - 8, %eax
        movq    $ring3_done, (%rax)

        push    $USER_DATA
        push    %rax
        pushfq
        orq     $RFLAGS_IOPL3, (%rsp)
        push    $USER_CODE
        push    %rcx
        iretq

ring3_done:
        ud2

ring3_return:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .bss
        .globl  ring3_kernel_stack
        .balign 16
ring3_kernel_stack:
        .quad   0
        .balign 16
        .fill   4096
ring3_stack_top:

        .section .note.GNU-stack, "", @progbits
