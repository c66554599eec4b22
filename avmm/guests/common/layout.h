/*
 * Numbers on which C, assembly and the linker script must agree. Each is defined here once.
 */
#pragma once

/* Selectors of the GDT in start.S. The low two bits are the ring that may use them. */
#define KERNEL_CODE32   0x08    /* only on the way to long mode */
#define KERNEL_CODE     0x10
#define KERNEL_DATA     0x18
#define USER_DATA       0x23
#define USER_CODE       0x2b
#define TASK_STATE      0x30    /* two slots: a 64-bit TSS descriptor has 16 bytes */

/* Interrupt vectors. 0..31 belong to the CPU; the two 8259s are moved to 32..47. */
#define VECTOR_PAGE     14
#define VECTOR_IRQ      32
#define VECTOR_IPI      48
#define VECTOR_SPURIOUS 63      /* old LAPICs force the low four bits to one */
#define VECTORS         64

/* Low memory, which an application processor can reach when it starts in real mode. */
#define TRAMPOLINE      0x8000
