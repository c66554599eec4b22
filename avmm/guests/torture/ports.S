/*
 * Ports: IN, OUT and the string instructions between ports and RAM.
 *
 * The forms with the port in the instruction reach only the ports below 0x100, where there is
 * no room for a window for each CPU.
 */
#include "shape.h"

        SHAPES  port_shapes
        WRITE_PORT 0x00, out %al, (%dx)
        WRITE_PORT 0x02, out %ax, (%dx)
        WRITE_PORT 0x04, out %eax, (%dx)
        READ_PORT 0x00, in (%dx), %al
        READ_PORT 0x02, in (%dx), %ax
        READ_PORT 0x04, in (%dx), %eax
        WRITE_PORT 0x05, out %ax, (%dx)            /* unaligned */
        READ_PORT 0x05, in (%dx), %eax

        /* INS: KVM asks for all elements in one exit. */
        lea     0x08(%r13), %edx
        STRING_UP 1, RAM(0), RAM(STRING), insb  /* without REP */
        STRING_UP 1, RAM(0), RAM(STRING + 1), rep insb
        STRING_UP 4, RAM(0), RAM(STRING + 2), rep insb
        STRING_UP 17, RAM(0), RAM(STRING + 6), rep insb
        STIR    RAM(STRING - 8), 5
        lea     0x0a(%r13), %edx
        STRING_UP 4, RAM(0), RAM(STRING), rep insw
        STRING_UP 0, RAM(0), RAM(STRING), rep insw /* nothing at all */
        STIR    RAM(STRING - 8), 3
        lea     0x0c(%r13), %edx
        STRING_UP 17, RAM(0), RAM(STRING), rep insl
        STIR    RAM(STRING - 8), 11

        /* Downwards, KVM asks for them in the same way, and hands them out one by one. */
        lea     0x08(%r13), %edx
        STRING_DOWN 17, RAM(0), RAM(STRING + 16), rep insb
        STIR    RAM(STRING - 8), 5
        lea     0x0a(%r13), %edx
        STRING_DOWN 4, RAM(0), RAM(STRING + 6), rep insw
        STIR    RAM(STRING - 8), 3
        lea     0x0c(%r13), %edx
        STRING_DOWN 4, RAM(0), RAM(STRING + 12), rep insl
        STIR    RAM(STRING - 8), 4

        /* Across pages, KVM asks for as many as fit on one page. */
        lea     0x0a(%r13), %edx
        STRING_UP 4, RAM(0), RAM(BORDER - 3), rep insw
        STIR    RAM(BORDER - 8), 2

        /* OUTS: one exit for each element. */
        lea     0x10(%r13), %edx
        STRING_UP 1, RAM(STRING), RAM(0), outsb /* without REP */
        STRING_UP 1, RAM(STRING + 1), RAM(0), rep outsb
        STRING_UP 4, RAM(STRING + 2), RAM(0), rep outsb
        STRING_UP 17, RAM(STRING + 6), RAM(0), rep outsb
        lea     0x12(%r13), %edx
        STRING_UP 3, RAM(STRING), RAM(0), rep outsw
        lea     0x14(%r13), %edx
        STRING_UP 2, RAM(STRING), RAM(0), rep outsl
        STIR    RAM(STRING), 4

        lea     0x10(%r13), %edx
        STRING_DOWN 3, RAM(STRING + 2), RAM(0), rep outsb
        lea     0x12(%r13), %edx
        STRING_DOWN 2, RAM(STRING + 10), RAM(0), rep outsw
        lea     0x14(%r13), %edx
        STRING_DOWN 2, RAM(STRING + 20), RAM(0), rep outsl
        END_SHAPES

        /* More than the 1024 bytes that KVM asks for at once. */
        SHAPES  long_shapes
        lea     0x08(%r13), %edx
        STRING_UP 1030, RAM(0), RAM(2 * STRING), rep insb
        STIR    RAM(2 * STRING - 8), 131
        STRING_DOWN 1030, RAM(0), RAM(2 * STRING + 1029), rep insb
        STIR    RAM(2 * STRING - 8), 131
        lea     0x0c(%r13), %edx
        STRING_UP 300, RAM(0), RAM(BORDER - 300), rep insl
        STIR    RAM(BORDER - 304), 152
        END_SHAPES

        .section .note.GNU-stack, "", @progbits
