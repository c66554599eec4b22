/*
 * Loads and stores that may fault.
 *
 * A fault between guarded_begin and guarded_end continues at guarded_fault. Nothing else has to be
 * undone, because the code in between does not touch the stack. The result is a struct access:
 * RAX has the value, RDX whether it faulted.
 */
        .text
        .globl  guarded_load, guarded_store, guarded_begin, guarded_end, guarded_fault
guarded_begin:

guarded_load:                           /* RDI = address, ESI = width */
        xor     %eax, %eax
        xor     %edx, %edx
        cmp     $2, %esi
        jb      1f
        je      2f
        cmp     $4, %esi
        je      4f
        mov     (%rdi), %rax
        ret
1:      mov     (%rdi), %al
        ret
2:      mov     (%rdi), %ax
        ret
4:      mov     (%rdi), %eax
        ret

guarded_store:                          /* RDX = value */
        mov     %rdx, %rax
        xor     %edx, %edx
        cmp     $2, %esi
        jb      1f
        je      2f
        cmp     $4, %esi
        je      4f
        mov     %rax, (%rdi)
        ret
1:      mov     %al, (%rdi)
        ret
2:      mov     %ax, (%rdi)
        ret
4:      mov     %eax, (%rdi)
        ret

guarded_end:
guarded_fault:
        mov     $1, %edx
        ret

        .section .note.GNU-stack, "", @progbits
