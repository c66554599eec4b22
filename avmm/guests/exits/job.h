/*
 * One measurement, as C and the loops in loops.S see it.
 */
#pragma once

#define JOB_WHERE       0
#define JOB_COUNT       8
#define JOB_CYCLES      16
#define JOB_SUM         24

#ifndef __ASSEMBLER__
#include <stdint.h>

struct job {
        uint64_t where;         /* port or address */
        uint64_t count;         /* at least 1 */
        uint64_t cycles;        /* out: by the TSC */
        uint64_t sum;           /* out: of all values read */
        uint64_t string;        /* elements of one string access */
        uint64_t width;
};

typedef void loop(void *job);

loop out_1, out_2, out_4, in_1, in_2, in_4;
loop store_1, store_2, store_4, store_8, load_1, load_2, load_4, load_8;
loop string_out, string_in;

#define STRING_BYTES    16384
#endif
