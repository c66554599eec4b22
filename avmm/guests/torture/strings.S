/*
 * String instructions with the device's memory as an operand. Those with two operands there, or
 * with one there and the other at a port, cause several exits for one element.
 */
#include "shape.h"

        SHAPES  string_shapes
        /*
         * Port to device: everything is read before the first byte is written. Downwards, KVM
         * drops at each write what it has read ahead and reads it again: 3 + 2 + 1 reads for 3
         * writes.
         */
        lea     0x18(%r13), %edx
        STRING_UP 4, RAM(0), DEVICE(0x100), rep insb
        STRING_UP 9, RAM(0), DEVICE(0x110), rep insw
        STRING_DOWN 3, RAM(0), DEVICE(0x138), rep insl

        /* Device to port. */
        lea     0x1c(%r13), %edx
        STRING_UP 3, DEVICE(0x140), RAM(0), rep outsb
        STRING_DOWN 2, DEVICE(0x152), RAM(0), rep outsw
        STRING_UP 2, DEVICE(0x160), RAM(0), rep outsl

        /* RAM to device. */
        STIR    RAM(STRING), 4
        STRING_UP 1, RAM(STRING), DEVICE(0x180), movsb /* without REP */
        STRING_UP 2, RAM(STRING + 1), DEVICE(0x181), rep movsb
        STRING_UP 2, RAM(STRING + 4), DEVICE(0x188), rep movsw
        STRING_DOWN 2, RAM(STRING + 12), DEVICE(0x194), rep movsl
        STRING_UP 2, RAM(STRING + 16), DEVICE(0x1a0), rep movsq

        /* Device to RAM. */
        STRING_UP 1, DEVICE(0x1c0), RAM(STRING), movsw /* without REP */
        STRING_UP 2, DEVICE(0x1c4), RAM(STRING + 2), rep movsb
        STRING_DOWN 2, DEVICE(0x1ca), RAM(STRING + 8), rep movsw
        STRING_UP 2, DEVICE(0x1d0), RAM(STRING + 12), rep movsl
        STRING_UP 2, DEVICE(0x1e0), RAM(STRING + 24), rep movsq
        STIR    RAM(STRING - 8), 7

        /* Device to device. */
        STRING_UP 2, DEVICE(0x200), DEVICE(0x208), rep movsb
        STRING_DOWN 2, DEVICE(0x224), DEVICE(0x22c), rep movsl
        STRING_UP 1, DEVICE(BORDER - 3), DEVICE(2 * BORDER - 5), movsq /* across pages */

        /* RAX to device. */
        TAKE_SUM
        STRING_UP 3, RAM(0), DEVICE(0x260), rep stosb
        STRING_DOWN 2, RAM(0), DEVICE(0x26a), rep stosw
        STRING_UP 1, RAM(0), DEVICE(0x270), stosl
        STRING_UP 2, RAM(0), DEVICE(0x280), rep stosq

        /* Device to RAX. */
        STRING_UP 1, DEVICE(0x2a0), RAM(0), lodsb
        STRING_UP 1, DEVICE(0x2a2), RAM(0), lodsw
        STRING_UP 1, DEVICE(0x2a4), RAM(0), lodsl
        STRING_DOWN 2, DEVICE(0x2b8), RAM(0), rep lodsq

        /* Comparisons: CMPS makes two reads and no write, SCAS makes one read. */
        lea     DEVICE(0x2c0), %rsi
        lea     DEVICE(0x2c4), %rdi
        FLAGS   cmpsl
        MIX     %rsi
        MIX     %rdi
        FLAGS   scasw
        MIX     %rdi
        END_SHAPES

        .section .note.GNU-stack, "", @progbits
