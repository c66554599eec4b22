/*
 * What the VMM tells the guest at boot: command line and memory map from the PVH start info,
 * processors from the MP table.
 *
 * All of it is copied at once, because the originals are in RAM that the guest may overwrite.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define MAX_RANGES      16
#define MAX_CPUS        64
#define MEMORY_RAM      1

struct memory_range {
        uint64_t start, size;
        uint32_t type;          /* as in E820 */
};

struct boot {
        char command_line[1024];
        struct memory_range ranges[MAX_RANGES];
        int range_count;
        uint8_t apic_ids[MAX_CPUS];     /* the boot processor first */
        int cpu_count;
};

extern struct boot boot;

/* start_info is its physical address, or 0 if the loader has none. Everything is empty then. */
void read_start_info(uint64_t start_info);

/* Without a table there is one CPU, this one. Needs the LAPIC. */
void read_mp_table(void);
