/*
 * What one CPU works with: its checksum, and windows of its own, so that what its devices see does
 * not depend on other CPUs.
 */
#pragma once

#define WINDOW_SUM      0
#define WINDOW_PORTS    8
#define WINDOW_DEVICE   16
#define WINDOW_RAM      24
#define WINDOW_MSR      32

/*
 * CPU c has PORTS_BYTES ports from PORTS_BASE + c * PORTS_BYTES on, and so forth. The RAM has a
 * fixed place, below the image and what loaders leave behind, because its addresses are in the
 * sum, which must not depend on the linker.
 */
#define PORTS_BASE      0x200
#define PORTS_BYTES     0x20
#define DEVICE_BASE     0xd0000000
#define DEVICE_BYTES    0x10000
#define RAM_BASE        0x20000
#define RAM_BYTES       0x2000

#define MOST_CPUS       15      /* the ports of one more CPU would overlap the console's */

#ifndef __ASSEMBLER__
#include <stdint.h>

struct window {
        uint64_t sum;
        uint64_t ports, device, ram;    /* where they begin */
        uint64_t msr;
        uint64_t unused[3];             /* a cache line each */
};

/* Each function makes its shapes of access once, in the order of its source. */
typedef void shapes(struct window *window);

shapes port_shapes, string_shapes, long_shapes, mmio_shapes, straddle_shapes, sse_shapes;
shapes msr_shapes, vmcall_shape, vmmcall_shape;

/* Lets this CPU use SSE. */
void enable_sse(void);
#endif
